"""Families: recognised, loaded, called and sampled through one contract; unsupported bases are refused early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from sctool.cli import run
from sctool.core.backbones.architectures import KNOWN, architecture
from sctool.core.backbones.bases import downsampling_factor, resolution
from sctool.core.backbones.families import FAMILIES, family_of_denoiser, family_of_pipeline
from sctool.core.backbones.families.base import Family
from sctool.core.backbones.loading import autoencoder_dtype, load_backbone
from sctool.core.config import SampleConfig
from sctool.core.errors import UsageError
from sctool.core.sampling import Request, sample_images


@pytest.mark.parametrize("base", KNOWN)
def test_known_bases_are_recognised_and_dummy_rows_run_through_them(base: str) -> None:
    shapes = architecture(base)
    family = shapes.family
    assert family.name == {"sdxl": "sdxl", "dit-xl-2": "dit"}.get(base, "sd")
    small = {"block_out_channels": [8] * len(KNOWN[base].get("block_out_channels", [0] * 4)), "norm_num_groups": 4}
    small |= {"attention_head_dim": 4, "transformer_layers_per_block": 1}
    with torch.device("meta"):
        net = family.build_denoiser({**shapes.config, **small})
    latents = torch.empty(2, 4, 16, 16, device="meta")
    out = family.predict(net, latents, torch.zeros(2, device="meta"), family.dummy_rows(net.config, 2, "meta"))
    assert out.shape == latents.shape
    assert family.latent_size(shapes.config) * 8 == {"sd15": 512, "sd21": 768, "sdxl": 1024, "dit-xl-2": 256}[base]


def test_rows_of_the_size_are_among_the_dummy_rows() -> None:
    for family, base in zip(FAMILIES, ("sd15", "sdxl", "dit-xl-2"), strict=True):
        rows = family.dummy_rows(architecture(base).denoiser().config, 3, "cpu")
        for name, row in family.size_rows(3, 512, torch.device("cpu")).items():
            assert rows[name].shape == row.shape


def test_predict_is_the_denoisers_own_call() -> None:
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,
    )  # fmt: skip
    family = family_of_denoiser(net.config)
    rows = {
        "prompt_embeds": torch.randn(2, 3, 8), "pooled": torch.randn(2, 10),
        **family.size_rows(2, 64, torch.device("cpu")),
    }  # fmt: skip
    latents, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 7])
    added = {"text_embeds": rows["pooled"], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    expected = net(latents, t, rows["prompt_embeds"], added_cond_kwargs=added).sample
    assert torch.equal(family.predict(net, latents, t, rows), expected)
    assert family.dummy_rows(net.config, 1, "cpu")["pooled"].shape == (1, 10)


class Pipeline:
    """Stands for a diffusers pipeline: notes what it is called with."""

    vae_scale_factor = 8

    def __call__(self, **arguments: Any) -> tuple[torch.Tensor]:
        self.arguments = arguments
        return (arguments["latents"] + 1,)


@pytest.mark.parametrize("family", FAMILIES[:2], ids=lambda family: family.name)
def test_sampling_is_one_call_of_the_pipeline_with_the_configs_steps_and_guidance(family: Family) -> None:
    pipe, noise = Pipeline(), torch.randn(3, 4, 6, 5)
    rows = {"prompt_embeds": torch.randn(3, 7, 2), "pooled": torch.randn(3, 4)}
    null = {"prompt_embeds": torch.randn(1, 7, 2), "pooled": torch.randn(1, 4)}
    config = SampleConfig(steps=11, guidance=3.5, rescale=0.25)
    hints = {"canny": torch.rand(3, 3, 48, 40)}
    assert torch.equal(family.sample(pipe, noise, rows, null, config, {"hint": hints}), noise + 1)
    plain = {name: value for name, value in pipe.arguments.items() if not isinstance(value, torch.Tensor)}
    assert plain == {
        "height": 48, "width": 40, "num_inference_steps": 11, "guidance_scale": 3.5, "guidance_rescale": 0.25,
        "output_type": "latent", "return_dict": False, "cross_attention_kwargs": {"hint": hints},
    }  # fmt: skip
    expected = {"latents": noise, "prompt_embeds": rows["prompt_embeds"]}
    expected["negative_prompt_embeds"] = null["prompt_embeds"].repeat(3, 1, 1)
    if family.name == "sdxl":
        expected["pooled_prompt_embeds"] = rows["pooled"]
        expected["negative_pooled_prompt_embeds"] = null["pooled"].repeat(3, 1)
    assert pipe.arguments.keys() - plain.keys() == expected.keys()
    assert all(torch.equal(pipe.arguments[name], value) for name, value in expected.items())
    family.sample(pipe, noise, rows, null, config, None)
    assert "cross_attention_kwargs" not in pipe.arguments


class Encoding:
    """Stands for a pipeline's prompt encoder of either kind."""

    text_encoder = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs

    def encode_prompt(
        self, prompt: list[str], device: Any, num_images_per_prompt: int, do_classifier_free_guidance: bool
    ) -> tuple[torch.Tensor | None, ...]:
        assert (device, num_images_per_prompt, do_classifier_free_guidance) == (torch.device("cpu"), 1, False)
        lengths = torch.tensor([float(len(text)) for text in prompt])
        return (lengths[:, None, None], None, lengths[:, None] * 10, None)[: self.outputs]


def test_prompts_are_encoded_once_each_without_guidance() -> None:
    sd, sdxl, _ = FAMILIES
    rows = sd.encode_prompts(Encoding(2), ["a", "bcd"])
    assert rows.keys() == {"prompt_embeds"}
    assert rows["prompt_embeds"].flatten().tolist() == [1, 3]
    rows = sdxl.encode_prompts(Encoding(4), ["a", "bcd"])
    assert rows["prompt_embeds"].shape == (2, 1, 1)
    assert rows["pooled"].flatten().tolist() == [10, 30]


def test_the_shorter_of_two_tokenizers_decides_what_is_too_long() -> None:
    def tokenizer(most: int) -> Any:
        def encode(prompt: str, truncation: bool, verbose: bool) -> Any:
            return SimpleNamespace(input_ids=list(prompt)[: most if truncation else None])

        encode.model_max_length = most  # pyright: ignore[reportFunctionMemberAccess]
        return encode

    both = SimpleNamespace(tokenizer=tokenizer(9), tokenizer_2=tokenizer(4))
    assert [FAMILIES[1].too_long(both, "x" * length) for length in (4, 5, 10)] == [False, True, True]
    one = SimpleNamespace(tokenizer=tokenizer(4), tokenizer_2=None)
    assert [FAMILIES[0].too_long(one, "x" * length) for length in (4, 5)] == [False, True]


def test_the_training_size_is_the_first_side_where_a_config_has_two() -> None:
    assert [FAMILIES[0].latent_size({"sample_size": size}) for size in (64, [32, 48])] == [64, 32]


def test_sizes_are_numbers_of_full_precision_whatever_the_batch() -> None:
    ids = FAMILIES[1].size_rows(2, 1000, torch.device("cpu"))["time_ids"]
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[1000, 1000, 0, 0, 1000, 1000]] * 2
    assert FAMILIES[0].size_rows(2, 1000, torch.device("cpu")) == {}


def test_dummy_rows_have_the_encoders_shapes() -> None:
    rows = {name: tuple(row.shape) for name, row in FAMILIES[1].dummy_rows(KNOWN["sdxl"], 3, "cpu").items()}
    assert rows == {"prompt_embeds": (3, 77, 2048), "pooled": (3, 1280), "time_ids": (3, 6)}


def test_hints_reach_the_denoiser_through_its_open_channel() -> None:
    calls = []

    class Denoiser(torch.nn.Module):
        dtype = torch.bfloat16

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Any]:
            calls.append((args, kwargs))
            return (args[0],)

    latents, t, rows = torch.randn(1, 4, 2, 2), torch.tensor([5]), {"prompt_embeds": torch.randn(1, 3, 2)}
    hints = {"canny": torch.rand(1, 3, 16, 16)}
    for given in (hints, None, {}):
        assert FAMILIES[0].predict(Denoiser(), latents, t, rows, given).dtype == torch.bfloat16
        (sample, timestep, embeds), options = calls.pop()
        assert sample.dtype == embeds.dtype == torch.bfloat16
        assert timestep is t
        assert options == {"return_dict": False, **({"cross_attention_kwargs": {"hint": hints}} if given else {})}


def altered(base: Path, folder: Path, channels: int) -> Path:
    """A copy of the base whose U-Net's config says another number of input channels; its weights are unreadable."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": channels}))
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.write_bytes(b"not read")
    return folder


@pytest.mark.parametrize(("channels", "kind"), [(9, "an inpainting base"), (5, "image inputs of its own")])
def test_bases_that_take_more_than_noisy_latents_are_refused_before_loading(
    tiny_base: Path, pictures: Path, tmp_path: Path, channels: int, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(altered(tiny_base, tmp_path / "base", channels))
    with pytest.raises(UsageError, match=kind):
        load_backbone(base)
    for words in (
        ["train", "--base", base, "--data", str(pictures), "--steps", "1", "--out", str(tmp_path / "runs")],
        ["sample", "a hat", "--base", base, "--no-tuner", "--out", str(tmp_path / "out")],
    ):
        assert run(words) == 2
        error = capsys.readouterr().err
        assert f"{channels} input channels" in error
        assert "unexpected" not in error
    assert not (tmp_path / "out").exists()


def test_other_pipelines_are_refused_by_name(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusionInpaintPipeline"}))
    with pytest.raises(UsageError, match=r"StableDiffusionInpaintPipeline.*--cond mask"):
        load_backbone(str(tmp_path / "base"))
    with pytest.raises(UsageError, match="supported are StableDiffusionPipeline, StableDiffusionXLPipeline"):
        family_of_pipeline("FluxPipeline", "flux")
    with pytest.raises(UsageError, match="not supported"):
        family_of_denoiser({"_class_name": "FluxTransformer2DModel"})


def test_resolution_needs_the_configs_alone(tiny_base: Path) -> None:
    assert resolution(str(tiny_base)) == 32
    assert resolution("mini") == 64


def test_prompts_longer_than_the_text_encoder_reads_are_counted(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = load_backbone(str(tiny_base))
    assert backbone.pipe.tokenizer.model_max_length == 16
    assert not backbone.too_long("x" * 14)
    assert backbone.too_long("x" * 15)
    words = ["sample", "x" * 15, "short", "--base", str(tiny_base), "--no-tuner", "--steps", "1"]
    assert run([*words, "--out", str(tmp_path / "out")]) == 0
    assert "1 of 2 prompts are longer than the text encoder reads" in capsys.readouterr().err.replace("\n", " ")


def test_the_autoencoder_is_never_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert autoencoder_dtype("cpu") == torch.float32
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert autoencoder_dtype("cuda") == dtype


def test_the_autoencoders_precision_is_part_of_the_latents_identity(tiny_base: Path) -> None:
    full, half = (load_backbone(str(tiny_base), vae_dtype=dtype) for dtype in (None, torch.bfloat16))
    assert full.latents_id != half.latents_id
    assert full.conditioning_id == half.conditioning_id
    mean, std = half.encode_images(torch.rand(1, 3, 32, 32) * 2 - 1)
    assert mean.dtype == std.dtype == torch.float32


def test_an_autoencoder_that_has_encoded_all_decodes_in_float32_on_the_cpu(tiny_base: Path) -> None:
    backbone = load_backbone(str(tiny_base), vae_dtype=torch.bfloat16)
    backbone.free_encoders()
    assert backbone.vae.dtype == torch.float32
    assert backbone.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 32, 32)


def test_the_plan_looks_for_latents_where_training_keeps_them(
    tiny_base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sctool.annotators.training_sets import open_training_sets
    from sctool.core.config import TrainConfig
    from sctool.core.training import plan

    loaded = []
    monkeypatch.setattr(plan, "autoencoder_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(plan, "load_backbone", lambda *a, **k: loaded.append(load_backbone(*a, **k)) or loaded[0])
    config = TrainConfig(base=str(tiny_base), data=str(pictures))
    plan.plan_run(config, open_training_sets(config, 32, quiet=True)[0])
    assert loaded[0].latents_id[1] == "torch.bfloat16"


def test_sizes_and_samplers_that_do_not_fit_the_base(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(str(tiny_base))
    backbone.check_size(40)
    with pytest.raises(UsageError, match="size=36 is not divisible by 8"):
        backbone.check_size(36)
    monkeypatch.setattr(type(backbone.family), "schedulers", lambda self: {"euler": object})
    with pytest.raises(UsageError, match="unknown scheduler for this base 'ddim'"):
        next(sample_images(backbone, [Request("a", 0)], SampleConfig(steps=1)))


def test_downsampling_factor_is_read_from_either_config() -> None:
    assert downsampling_factor({"block_out_channels": [1, 2, 3, 4]}) == 8
    assert downsampling_factor({"encoder_block_out_channels": [1] * 6}) == 32
    with pytest.raises(UsageError, match="block_out_channels"):
        downsampling_factor({})
