"""Swift's SCEdit folders against its modules, restated in plain torch on a real U-Net."""

import json
import re
from types import MethodType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sctool.core.backbones.architectures import architecture
from sctool.core.errors import UsageError
from sctool.core.exchange.foreign import Foreign, read_foreign
from sctool.core.exchange.scepter import Scepter
from sctool.core.exchange.swift import Swift
from sctool.core.sites.attaching import tuned
from sctool.core.sites.skips import skips
from sctool.core.tuners import method_config, tuner_class

from ..tiny import dit, unet

FORMAT = Swift()
RESNETS = r"^unet\.up_blocks\.\d+\.resnets\.\d+$"
"""The targets of swift's example for diffusers, text_to_image_synthesis.py."""


# ------------------------------------------------------------------------------------- swift's modules, restated


class SCEAdapter(nn.Module):
    """swift/tuners/scetuning/scetuning_components.py."""

    def __init__(self, dim, length):
        super().__init__()
        self.ln1, self.activate, self.ln2 = nn.Linear(dim, length), nn.GELU(), nn.Linear(length, dim)

    def forward(self, x):
        return x + self.ln2(self.activate(self.ln1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class SCETunerModule(nn.Module):
    def __init__(self, dim, length):
        super().__init__()
        self.dim, self.tuner_op = dim, SCEAdapter(dim, length)

    def forward(self, x):
        return self.tuner_op(x)


def prepare(model, target_modules, dims, mode="decoder", down_ratio=1.0, adapter="default"):
    """What `SCETuning.prepare_model` in scetuning.py does; returns the keys that it saves."""
    if isinstance(target_modules, str):
        target_modules = [name for name, _ in model.named_modules() if re.fullmatch(target_modules, name)]
    assert len(target_modules) == len(dims)
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    for target, dim in zip(target_modules, dims, strict=True):
        module = model.get_submodule(target)
        module = module[-1] if isinstance(module, nn.ModuleList) else module
        module.add_module(f"scetuner_{adapter}", SCETunerModule(dim, int(dim * down_ratio)).to(dtype))
        module.forward_origin = module.forward
        module.forward = MethodType(decoding if mode == "decoder" else encoding, module)
    generator = torch.Generator().manual_seed(4)
    keys = [key for key in model.state_dict() if f"scetuner_{adapter}" in key]
    with torch.no_grad():
        for key in keys:
            value = model.get_parameter(key)
            if not value.is_meta:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return keys


def decoding(self, x, *args, **kwargs):
    [tuner] = [child for name, child in self.named_children() if name.startswith("scetuner_")]
    hidden, skip = torch.split(x, x.shape[1] - tuner.dim, 1)
    return self.forward_origin(torch.cat([hidden, tuner(skip)], 1), *args, **kwargs)


def encoding(self, *args, **kwargs):
    [tuner] = [child for name, child in self.named_children() if name.startswith("scetuner_")]
    return tuner(self.forward_origin(*args, **kwargs))


class Whole(nn.Module):
    """A pipeline of one module called unet, as in modelscope."""

    def __init__(self, net):
        super().__init__()
        self.unet = net


class Scepters(nn.Module):
    """Of scepter's U-Net, `lsc_identity` and `output_blocks` alone; called `model` in LatentDiffusion."""

    def __init__(self, count):
        super().__init__()
        self.model = nn.Module()
        self.model.lsc_identity = nn.ModuleList(nn.Identity() for _ in range(count))
        self.model.output_blocks = nn.ModuleList(nn.Sequential(nn.Identity()) for _ in range(count))


# ------------------------------------------------------------------------------------------------------- helpers


def base(net, name="tiny"):
    return SimpleNamespace(denoiser=net, vae_scale=8, id=name)


def decoder_dims(net):
    return [site.channels for site in skips(net)][::-1]


def folder(tmp_path, model, keys, suffix="safetensors", **config):
    """`SwiftModel.save_pretrained` in swift/tuners/base.py: one folder an adapter."""
    path = tmp_path / "default"
    path.mkdir()
    state = {key: model.state_dict()[key].contiguous() for key in keys}
    if suffix == "safetensors":
        save_file(state, path / "adapter_model.safetensors", {"format": "pt"})
    else:
        torch.save(state, path / "adapter_model.bin")
    stated = {"swift_type": "SCETUNING", "tuner_op": "SCEAdapter", "hint_modules": None, "down_ratio": 1.0}
    (path / "adapter_config.json").write_text(json.dumps({**stated, **config}))
    return path


def built(reading, net):
    tuner = tuner_class(reading.method).build(method_config(reading.method, reading.config), net, reading.conditions, 8)
    tuner.load_state_dict(reading.state)
    return tuner


def run(net, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    latents, embeds = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
    return net(latents.to(dtype), torch.tensor([7]), embeds.to(dtype)).sample


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(("down_ratio", "adapter"), [(1.0, "default"), (0.3, "0_SwiftSCETuning")])
def test_decoder_mode_in_diffusers_edits_as_swift_does(tmp_path, suffix, down_ratio, adapter):
    model, net = Whole(unet().double()), unet().double()
    dims = decoder_dims(net)
    keys = prepare(model, RESNETS, dims, "decoder", down_ratio, adapter)
    path = folder(tmp_path, model, keys, suffix, tuner_mode="decoder", dims=dims, down_ratio=down_ratio)
    foreign = read_foreign(path)
    assert FORMAT.fits(foreign)
    assert not Scepter().fits(foreign)
    reading = FORMAT.read(foreign, base(net), None)
    assert set(reading.used) == set(foreign.tensors)
    assert reading.config == {"ratio": down_ratio}
    assert reading.used[f"unet.up_blocks.0.resnets.0.scetuner_{adapter}.tuner_op.ln1.weight"] == "sc.3.down.weight"
    with tuned(net, built(reading, net).double()):
        out = run(net)
    torch.testing.assert_close(out, run(model.unet), rtol=1e-10, atol=1e-10)
    assert (out - run(net)).abs().max() > 1e-3


def test_some_targets_are_some_skips(tmp_path):
    model, net = unet().double(), unet().double()
    targets = ["up_blocks.0.resnets.1", "up_blocks.1.resnets"]  # a list of layers stands for its last one
    keys = prepare(model, targets, [8, 8])
    reading = FORMAT.read(read_foreign(folder(tmp_path, model, keys, dims=[8, 8])), base(net), None)
    assert reading.config == {"ratio": 1.0, "skips": (0, 2)}
    with tuned(net, built(reading, net).double()):
        out = run(net)
    torch.testing.assert_close(out, run(model), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("pattern", "mode"),
    [
        (r"model.lsc_identity\.\d+$", "identity"),  # scepter's yamls, *_sce_t2i_swift.yaml
        (r"model.output_blocks\.\d+$", "decoder"),
        (r"model.output_blocks\.\d+\.0$", "decoder"),
    ],
)
@pytest.mark.parametrize("says", [True, False])
def test_in_scepters_unet_targets_are_in_the_decoders_order(tmp_path, pattern, mode, says):
    net = unet()
    model = Scepters(4)
    keys = prepare(model, pattern, decoder_dims(net), mode, 0.5, "0_SwiftSCETuning")
    path = folder(tmp_path, model, keys, **({"tuner_mode": mode} if says else {}))
    foreign = read_foreign(path)
    reading = FORMAT.read(foreign, base(net), None)
    assert set(reading.used) == set(foreign.tensors)
    for key, name in reading.used.items():
        number = int(re.findall(r"\.(\d+)\.", key)[0])
        assert name.startswith(f"sc.{3 - number}.")
        assert torch.equal(reading.state[name], foreign.tensors[key])
    built(reading, net)


@pytest.mark.parametrize(("name", "parameters"), [("sd15", 19_680_000), ("sd21", 19_680_000), ("sdxl", 9_841_920)])
def test_the_known_bases(name, parameters):
    net, twin = architecture(name).denoiser(), architecture(name).denoiser()
    with torch.device("meta"):
        keys = prepare(Whole(twin), RESNETS, decoder_dims(net))
    state = {key: value for key, value in Whole(twin).state_dict().items() if key in keys}
    reading = FORMAT.read(Foreign("x.bin", state, {"tuner_mode": "decoder"}), base(net), None)
    assert reading.config == {"ratio": 1.0}
    assert set(reading.used) == set(keys)
    assert sum(value.numel() for value in reading.state.values()) == parameters


# -------------------------------------------------------------------------------- what is refused, in one or two lines


def message(foreign, backbone, condition=None):
    with pytest.raises(UsageError) as caught:
        FORMAT.read(foreign, backbone, condition)
    text = str(caught.value)
    assert len(text) < 300
    assert "\n" not in text
    return text


ENCODER_TARGETS = ["conv_in", "down_blocks.0.attentions.0", "down_blocks.0.downsamplers", "down_blocks.1.resnets.0"]


@pytest.mark.parametrize("says", [True, False])
def test_encoder_mode_is_refused_by_name(tmp_path, says):
    model = unet()
    keys = prepare(model, ENCODER_TARGETS, [8, 8, 8, 16], "encoder")
    foreign = read_foreign(folder(tmp_path, model, keys, **({"tuner_mode": "encoder"} if says else {})))
    text = message(foreign, base(unet()))
    assert ("tuner_mode=encoder" if says else "edits conv_in (no tuner_mode)") in text


def test_modes_and_places_must_belong_together(tmp_path):
    model = unet()
    keys = prepare(model, RESNETS.replace(r"unet\.", ""), decoder_dims(model), "identity")
    text = message(read_foreign(folder(tmp_path, model, keys, tuner_mode="identity")), base(unet()))
    assert "edits up_blocks.0.resnets.0 (tuner_mode=identity)" in text


def decoder_file(tmp_path, drop=(), dims=None, **config):
    model = unet()
    keys = prepare(model, RESNETS.replace(r"unet\.", ""), dims or decoder_dims(model))
    kept = [key for key in keys if not key.startswith(tuple(drop))]
    return read_foreign(folder(tmp_path, model, kept, tuner_mode="decoder", dims=decoder_dims(model), **config))


@pytest.mark.parametrize(
    ("drop", "named"),
    [
        (["up_blocks.0.resnets.0.scetuner_default.tuner_op.ln2.bias"], "has no ln2.bias for skip 3"),
        (["up_blocks.0.resnets.0.scetuner_default.tuner_op.ln1.weight"], "has no ln1.weight for skip 3"),
        (["up_blocks.1."], "has no adapters for 2 of its 4 targets"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, drop, named):
    assert named in message(decoder_file(tmp_path, drop), base(unet()))


def test_a_file_of_another_base_is_refused(tmp_path):
    deeper = unet(block_out_channels=(8, 24))
    assert "does not fit base 'tiny'" in message(decoder_file(tmp_path), base(deeper))
    smaller = unet(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    (tmp_path / "b").mkdir()
    assert "the base has no up_blocks.1.resnets.0" in message(decoder_file(tmp_path / "b"), base(smaller))
    (tmp_path / "c").mkdir()
    assert "DiTTransformer2DModel" in message(decoder_file(tmp_path / "c"), base(dit()))


def test_an_adapter_narrower_than_its_skip_is_refused(tmp_path):
    foreign = decoder_file(tmp_path, dims=[16, 8, 4, 8])
    assert "is (4, 4), and skip 1 is 8 wide" in message(foreign, base(unet()))


def test_hints_conditions_and_two_adapters_are_refused(tmp_path):
    foreign = decoder_file(tmp_path)
    assert "hint_modules" in message(
        Foreign(foreign.path, foreign.tensors, {**foreign.config, "hint_modules": ["conv_in"]}), base(unet())
    )
    assert "leave out --cond canny" in message(foreign, base(unet()), "canny")
    twice = {key.replace("default", "other"): value for key, value in foreign.tensors.items()}
    both = Foreign(foreign.path, {**foreign.tensors, **twice}, foreign.config)
    assert "more than one tuner" in message(both, base(unet()))


def test_keys_of_anything_else_are_not_used(tmp_path):
    foreign = decoder_file(tmp_path)
    more = {"text_encoder.q_proj.lora_A.weight": torch.ones(1)}
    reading = FORMAT.read(Foreign(foreign.path, {**foreign.tensors, **more}, foreign.config), base(unet()), None)
    assert set(reading.used) == set(foreign.tensors)
    assert not FORMAT.fits(Foreign(foreign.path, more))
    assert FORMAT.methods == ()
