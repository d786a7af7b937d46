"""LoRA and DoRA in the formats of peft, diffusers and kohya: read back, and run by those tools themselves."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sctool.core.backbones.architectures import architecture
from sctool.core.backbones.loading import Backbone, load_backbone
from sctool.core.checkpoint import save_tuner
from sctool.core.errors import DoesNotFit, SctoolError, UsageError
from sctool.core.exchange.exporting import export
from sctool.core.exchange.importing import read_tuner, write_tuner
from sctool.core.exchange.kohya import names_of
from sctool.core.exchange.ldm import ldm_name
from sctool.core.exchange.table import FORMATS, format_for
from sctool.core.sites.attaching import tuned
from sctool.core.tuners import TUNERS, method_config, tuner_class

ATTENTION = {"rank": 2, "alpha": 3.0, "layers": ["attention"]}
WHOLE = {"rank": 2, "layers": ["whole"], "ranks": {"conv_in": 4}, "alpha": 4.0, "alphas": {"conv_out": 0.5}}
CASES = [("lora", ATTENTION), ("lora", WHOLE), ("dora", ATTENTION), ("dora", WHOLE)]
TO = ("peft", "diffusers", "kohya", "comfyui")


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Backbone:
    return load_backbone(str(tiny_base))


def trained(method: str, config: dict[str, Any], base: Backbone) -> Any:
    tuner = tuner_class(method).build(method_config(method, config), base.denoiser, (), base.vae_scale)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return tuner


def exported(method: str, config: dict[str, Any], base: Backbone, folder: Path, to: str) -> tuple[Any, list[Path]]:
    tuner = trained(method, config, base)
    file = save_tuner(folder / "own", tuner, base)
    return tuner, export(file, base, to, folder / "theirs")


def output(net: nn.Module, base: Backbone, *tuners: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    rows = base.encode_prompts(["a photo", "a hat"])
    with torch.no_grad(), tuned(net, *tuners):
        return base.family.output(net, latents, torch.tensor([100, 700]), rows)


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize(("method", "config"), CASES)
def test_what_is_written_is_read_bit_for_bit(
    method: str, config: dict[str, Any], to: str, base: Backbone, tmp_path: Path
) -> None:
    tuner, files = exported(method, config, base, tmp_path, to)
    found = read_tuner(files[0].parent, base)
    assert found.tuner.method == method
    ours, theirs = tuner.state_dict(), found.tuner.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for site, layer in tuner.adapted.items():
        assert found.tuner.adapted[site].scaling == layer.scaling
    assert list(found.unused) == []
    assert found.used.keys() == load_file(files[0]).keys()
    assert torch.equal(output(base.denoiser, base, tuner), output(base.denoiser, base, found.tuner))


@pytest.mark.parametrize(("method", "config"), CASES)
def test_peft_itself_loads_it(method: str, config: dict[str, Any], base: Backbone, tmp_path: Path) -> None:
    tuner, files = exported(method, config, base, tmp_path, "peft")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base.denoiser), str(files[0].parent)).eval()
    expected, found = output(base.denoiser, base, tuner), output(theirs.get_base_model(), base)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, output(base.denoiser, base), atol=1e-3)


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize(("method", "config"), CASES[:3])
def test_a_pipeline_of_diffusers_loads_it(
    method: str, config: dict[str, Any], to: str, base: Backbone, tmp_path: Path, tiny_base: Path
) -> None:
    if (method, to) == ("dora", "kohya"):
        pytest.skip("diffusers leaves the magnitudes of such files out")
    tuner, files = exported(method, config, base, tmp_path, to)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipe.load_lora_weights(str(files[0].parent), weight_name=files[0].name)
    expected, found = output(base.denoiser, base, tuner), output(pipe.unet, base)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_peft_s_own_folder_is_read(base: Backbone, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "conv1"], rank_pattern={"mid_block.*to_q": 2},
        alpha_pattern={"conv1": 8}, init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base.denoiser), config).eval()  # type: ignore[arg-type]
    model.save_pretrained(str(tmp_path / "peft"))
    found = read_tuner(tmp_path / "peft", base)
    expected = output(model.get_base_model(), base)
    torch.testing.assert_close(output(base.denoiser, base, found.tuner), expected, rtol=0, atol=1e-5)


def test_older_files_of_diffusers_are_read(base: Backbone, tmp_path: Path) -> None:
    tuner = trained("lora", {"rank": 2, "layers": ["attention"]}, base)
    newer, older = {}, {}
    for site, layer in tuner.adapted.items():
        holder, _, leaf = site.name.removesuffix(".0").rpartition(".")
        for part, own in (("down", layer.lora_A), ("up", layer.lora_B)):
            newer[f"unet.{site.name}.lora.{part}.weight"] = own["default"].weight.detach()
            older[f"{holder}.processor.{leaf}_lora.{part}.weight"] = own["default"].weight.detach()
    for number, state in enumerate((newer, older)):
        save_file(state, tmp_path / f"{number}.safetensors")
        found = read_tuner(tmp_path / f"{number}.safetensors", base)
        assert torch.equal(output(base.denoiser, base, found.tuner), output(base.denoiser, base, tuner))


# ------------------------------------------------------------------------------------------------ names of layers


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_the_original_code_s_names_are_those_that_diffusers_converts(name: str) -> None:
    known = architecture(name)
    denoiser: Any = known.denoiser()
    theirs = {}
    for key, value in denoiser.state_dict().items():
        layer, _, leaf = key.rpartition(".")
        translated = ldm_name(layer, denoiser)
        assert translated is not None, layer
        theirs[f"model.diffusion_model.{translated}.{leaf}"] = value
    assert len(theirs) == len(denoiser.state_dict())
    config = {**denoiser.config, "class_embed_type": None}
    back = convert_ldm_unet_checkpoint(dict(theirs), config)
    assert {name: value.shape for name, value in back.items()} == {
        name: value.shape for name, value in denoiser.state_dict().items()
    }


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_no_two_layers_share_a_name(name: str) -> None:
    denoiser = architecture(name).denoiser()
    layers = [n for n, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    names = names_of(denoiser)
    assert len(names) == 2 * len(layers)
    assert sorted(set(names.values())) == sorted(layers)
    if name == "sdxl":
        assert names["input_blocks_4_1_transformer_blocks_0_attn1_to_q"] == (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        )


# ------------------------------------------------------------------------------------------------------- refusals


def kohya_file(base: Backbone, folder: Path, **more: Tensor) -> Path:
    _, [file] = exported("lora", ATTENTION, base, folder, "kohya")
    tensors = {**load_file(file), **more}
    save_file({key: value for key, value in tensors.items() if value.numel()}, file)
    return file


def test_a_key_that_would_be_dropped_is_an_error(base: Backbone, tmp_path: Path) -> None:
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"
    file = kohya_file(base, tmp_path, **{text: torch.ones(2, 2)})
    with pytest.raises(UsageError, match=rf"1 keys that would be dropped: {text}. --ignore"):
        read_tuner(file, base)
    with pytest.raises(UsageError, match="not a valid regular expression"):
        read_tuner(file, base, ignore=["("])
    found = read_tuner(file, base, ignore=["^lora_te"])
    assert list(found.unused) == [text]
    written = json.loads((write_tuner(tmp_path / "out", found, base)).with_suffix(".json").read_text())
    assert written["imported"]["left_out"] == [text]
    assert len(written["imported"]["sha256"]) == 64


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lora_unet_conv_in.hada_w1_a", torch.ones(2, 2), "is LoHa, which is not supported"),
        ("lora_unet_conv_in.lokr_w1", torch.ones(2, 2), "is LoKr of LyCORIS"),
        ("lora_unet_convin.lora_up.weight", torch.ones(2, 2), "adapts convin, which is no layer of --base"),
        ("lora_unet_conv_in.lora_up.weight", torch.ones(8, 2, 1, 1), "one factor of two"),
        ("lora_unet_conv_in.dora_scale", torch.ones(1, 4, 1, 1), "norm over inputs"),
    ],
)
def test_what_kohya_s_files_may_not_have(key: str, value: Tensor, said: str, base: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        read_tuner(kohya_file(base, tmp_path, **{key: value}), base)


def test_damaged_and_foreign_files_are_refused(base: Backbone, tmp_path: Path) -> None:
    file = kohya_file(base, tmp_path)
    tensors = load_file(file)
    first = next(key for key in tensors if key.endswith("lora_up.weight"))
    broken = {**tensors, first: torch.full_like(tensors[first], float("nan"))}
    save_file(broken, tmp_path / "nan.safetensors")
    with pytest.raises(SctoolError, match="not finite"):
        read_tuner(tmp_path / "nan.safetensors", base)
    wrong = {**tensors, first: torch.cat([tensors[first]] * 2)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(UsageError, match="give the base that it is for"):
        read_tuner(tmp_path / "wrong.safetensors", base)
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SctoolError, match="damaged"):
        read_tuner(tmp_path / "cut.safetensors", base)
    save_file({"head.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"in no known format .* Its keys: head.weight"):
        read_tuner(tmp_path / "other.safetensors", base)
    with pytest.raises(UsageError, match="is a tuner of sctool already"):
        read_tuner(tmp_path / "own" / "tuner.safetensors", base)
    (tmp_path / "picture.jpg").write_text("hello")
    with pytest.raises(UsageError, match="is no file of weights"):
        read_tuner(tmp_path / "picture.jpg", base)
    with pytest.raises(UsageError, match="there is no"):
        read_tuner(tmp_path / "none.safetensors", base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no file of weights"):
        read_tuner(tmp_path / "empty", base)


class Code:
    """What a malicious file would do on loading."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/tmp/sctool-was-here").touch, ())


def test_a_pickle_with_code_is_not_run(base: Backbone, tmp_path: Path) -> None:
    tensors = load_file(kohya_file(base, tmp_path))
    torch.save({**tensors, "x": Code()}, tmp_path / "code.bin")
    with pytest.raises(SctoolError, match="holds more than tensors"):
        read_tuner(tmp_path / "code.bin", base)
    assert not Path("/tmp/sctool-was-here").exists()
    torch.save({"state_dict": tensors}, tmp_path / "fine.bin")
    assert read_tuner(tmp_path / "fine.bin", base).tuner.method == "lora"
    (tmp_path / "text.bin").write_text("hello")
    with pytest.raises(SctoolError, match=r"text.bin"):
        read_tuner(tmp_path / "text.bin", base)


def test_settings_of_peft_without_a_counterpart_are_refused(base: Backbone, tmp_path: Path) -> None:
    _, files = exported("lora", ATTENTION, base, tmp_path, "peft")
    config = json.loads(files[1].read_text())
    files[1].write_text(json.dumps({**config, "use_rslora": True}))
    with pytest.raises(UsageError, match="use_rslora=True is not supported"):
        read_tuner(files[1].parent, base)


def test_a_tuner_without_effect_is_not_exported(base: Backbone, tmp_path: Path) -> None:
    untrained = tuner_class("lora").build(method_config("lora", ATTENTION), base.denoiser, (), base.vae_scale)
    file = save_tuner(tmp_path / "own", untrained, base)
    with pytest.raises(SctoolError, match="changes no output of its base"):
        export(file, base, "peft", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_a_format_that_cannot_hold_a_method_says_what_can() -> None:
    for form in FORMATS:
        for method in TUNERS:
            if method in form.methods:
                assert format_for(form.name, method) is form
            elif form.methods:
                with pytest.raises(DoesNotFit, match=rf"--to {form.name} cannot hold {method}"):
                    format_for(form.name, method)
    with pytest.raises(DoesNotFit, match="--into-base writes a base"):
        format_for("peft", "bitfit")
    with pytest.raises(DoesNotFit, match=r"--to comfyui can\."):
        format_for("peft", "diffscaler")
    with pytest.raises(UsageError, match="Did you mean 'kohya'"):
        format_for("kohia", "lora")


def test_what_comfyui_s_node_does_not_take_is_not_written(base: Backbone, tmp_path: Path) -> None:
    for name, method, conditions in (
        ("sc", "scedit", ()),
        ("plain", "diffscaler", ()),
        ("edges", "diffscaler", ("canny",)),
    ):
        tuner = tuner_class(method).build(method_config(method, {}), base.denoiser, conditions, base.vae_scale)
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.add_(0.1)
        save_tuner(tmp_path / name, tuner, base)
    for name in ("sc", "plain"):
        [file] = export(tmp_path / name / "tuner.safetensors", base, "comfyui", tmp_path / f"{name}-comfyui")
        assert file == tmp_path / f"{name}-comfyui" / f"{name}-comfyui.safetensors"
        assert file.read_bytes() == (tmp_path / name / "tuner.safetensors").read_bytes()
    with pytest.raises(DoesNotFit, match="with conditions or new classes"):
        export(tmp_path / "edges" / "tuner.safetensors", base, "comfyui", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    dit = load_backbone("mini-dit")
    tuner = tuner_class("diffscaler").build(method_config("diffscaler", {}), dit.denoiser, (), dit.vae_scale)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.1)
    file = save_tuner(tmp_path / "dit", tuner, dit)
    with pytest.raises(DoesNotFit, match="are for U-Nets, and mini-dit is none"):
        export(file, dit, "comfyui", tmp_path / "out")
