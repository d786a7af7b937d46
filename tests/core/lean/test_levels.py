"""Every level of memory: gradients as without it, limits for SD 1.5, and the base as it was afterwards."""

from __future__ import annotations

import copy
import functools
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sctool.core.backbones.architectures import architecture
from sctool.core.backbones.thin import make_thin
from sctool.core.config import LEVELS
from sctool.core.lean.keeping import KeepingConv2d, KeepingGEGLU, KeepingNorm, KeepingThinConv2d
from sctool.core.lean.levels import economize
from sctool.core.lean.recomputing import PutOff, RecomputedAttention, RecomputedGEGLU
from sctool.core.measure import saved_bytes
from sctool.core.sites.parts import family_of
from sctool.core.training.memory import fake_twin
from sctool.core.training.model import build_model
from sctool.core.tuners import method_config, tuner_class

from ..tiny import dit, unet

LEAN = LEVELS[1:]


def student():
    """The tiny U-Net with low-rank layers of both forms."""
    return make_thin(
        make_thin(unet(), {"up_blocks.1.resnets.0.conv1": 3, "mid_block.resnets.0.conv2": 2}),
        {"up_blocks.1.resnets.1.conv1": 3, "up_blocks.1.attentions.0.proj_in": 2}, "spatial",
    ).requires_grad_(False).eval()  # fmt: skip


NETS = {"unet": unet, "linear": functools.partial(unet, use_linear_projection=True), "dit": dit, "student": student}
CASES = [
    ("unet", "scedit", (), {}), ("unet", "scedit", ("canny", "color"), {"cascade": "zero-heads"}),
    ("unet", "scedit", (), {"operator": "conv"}), ("unet", "scedit", (), {"operator": "resprefix"}),
    ("linear", "scedit", ("canny",), {}), ("student", "scedit", (), {}), ("student", "lora", (), {}),
    ("unet", "lora", (), {}), ("unet", "diffscaler", (), {}),
    ("unet", "diffscaler", ("canny",), {"layers": ["up_blocks"]}),
    ("unet", "dora", (), {}), ("unet", "full", (), {}), ("unet", "bitfit", (), {}), ("unet", "difffit", (), {}),
    ("unet", "controlnet", ("canny",), {}), ("unet", "elr", ("canny",), {}), ("unet", "controllora", ("canny",), {}),
    ("dit", "lora", (), {}), ("dit", "diffscaler", (), {}), ("dit", "full", (), {}), ("dit", "difffit", (), {}),
]  # fmt: skip


def build(net, method, conditions, settings, dtype=torch.float32) -> Any:
    torch.manual_seed(1)
    tuner = tuner_class(method).build(method_config(method, settings), net, conditions, vae_scale=4)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return tuner.to(dtype)


def given(net, conditions, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    text, latents = (torch.randn(2, *shape, generator=generator).to(dtype) for shape in ((3, 8), (4, 8, 8)))
    hints = {name: torch.rand(2, 3, 32, 32, generator=generator).to(dtype) for name in conditions}
    rows = {"label": torch.tensor([0, 1])} if family_of(net).by_class else {"prompt_embeds": text}
    return latents, torch.tensor([3, 500]), rows, hints or None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("net", "method", "conditions", "settings"), CASES, ids=str)
def test_gradients_are_those_without_it(net, method, conditions, settings, dtype):
    expected: list[torch.Tensor] = []
    bound, kept = (3e-6 if dtype == torch.float32 else 1e-12), []
    for level in LEVELS:
        denoiser = NETS[net]().to(dtype)
        tuner = build(denoiser, method, conditions, settings, dtype)
        model = build_model(denoiser, tuner, level=level).to(memory_format=torch.channels_last)
        arguments = given(denoiser, conditions, dtype)
        if dtype == torch.float32:
            kept.append(saved_bytes(model, partial(model, *arguments)))
        out = model(*arguments)
        out.square().mean().backward()
        found = [out.detach(), *(p.grad for p in tuner.parameters())]
        expected = expected or found
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= bound * other.norm().clamp_min(1e-6), level
        assert all(p.grad is None for p in denoiser.parameters() if not p.requires_grad)
    if kept:
        assert kept[3] < kept[2] < kept[1] <= kept[0]
        assert kept[4] < kept[1]


@pytest.mark.parametrize("level", LEAN)
@pytest.mark.parametrize("net", NETS)
def test_the_base_is_restored_and_meanwhile_the_same(net, level):
    method = "lora" if net == "dit" else "scedit"
    denoiser = NETS[net]().to(memory_format=torch.channels_last)
    tuner, modules, state = build(denoiser, method, (), {}), dict(denoiser.named_modules()), denoiser.state_dict()
    parameters, arguments = dict(denoiser.named_parameters()), given(denoiser, ())[:3]
    with torch.no_grad():
        base = family_of(denoiser).output(denoiser, *arguments)
    exchange = economize(denoiser, level)
    assert exchange.done
    assert denoiser.state_dict().keys() == state.keys()
    assert list(dict(denoiser.named_parameters())) == list(parameters)
    with torch.no_grad():
        assert torch.equal(family_of(denoiser).output(denoiser, *arguments), base)
    exchange.remove()
    model = build_model(denoiser, tuner, level=level)
    model(*arguments).mean().backward()
    model.attachment.detach()
    now = dict(denoiser.named_modules())
    assert now.keys() == modules.keys()
    assert all(now[name] is module for name, module in modules.items())
    assert all(p is parameters[name] for name, p in denoiser.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.modules())
    with torch.no_grad():
        assert torch.equal(family_of(denoiser).output(denoiser, *arguments), base)


@pytest.mark.parametrize("level", LEAN)
@pytest.mark.parametrize("method", ["scedit", "lora", "diffscaler"])
def test_a_deep_copy_is_independent_and_detaches_itself(method, level):
    net = unet()
    model = build_model(net, build(net, method, (), {}), level=level)
    arguments = given(net, ())
    out = model(*arguments)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(twin(*arguments), out, rtol=0, atol=0)
    twin(*arguments).mean().backward()
    assert all(p.grad is None for p in model.tuners.parameters())
    twin.attachment.detach()
    assert not any("core.lean" in type(module).__module__ for module in twin.denoiser.modules())
    assert any("core.lean" in type(module).__module__ for module in model.denoiser.modules())
    with torch.no_grad():
        expected = unet()(arguments[0], arguments[1], arguments[2]["prompt_embeds"]).sample
        assert torch.equal(twin.denoiser(arguments[0], arguments[1], arguments[2]["prompt_embeds"]).sample, expected)


def kinds(net: nn.Module) -> dict[type, int]:
    found = [type(module) for module in net.modules()]
    return {kind: found.count(kind) for kind in set(found)}


def test_what_is_trained_or_looked_at_is_not_exchanged():
    net = unet()
    resnet, block = net.up_blocks[1].resnets[0], net.up_blocks[1].attentions[0].transformer_blocks[0]
    resnet.conv1.weight.requires_grad_(True)
    resnet.norm2.bias.requires_grad_(True)
    block.norm3.register_forward_hook(lambda *_: None)
    block.norm1.weight.requires_grad_(True)
    economize(net, "lower")
    assert type(resnet.conv1) is nn.Conv2d
    assert type(resnet.conv2) is KeepingConv2d
    assert (type(resnet.norm1), type(resnet.norm2), type(resnet.nonlinearity)) == (nn.GroupNorm, nn.GroupNorm, nn.SiLU)
    assert (type(block.norm1), type(block.norm2), type(block.norm3)) == (nn.LayerNorm, PutOff, nn.LayerNorm)
    assert type(block.attn1) is RecomputedAttention
    assert type(block.ff.net[0]) is RecomputedGEGLU
    assert kinds(net)[KeepingNorm] > 4


def test_hooks_fire_once_in_forward_and_can_be_removed_through_either():
    net, calls = unet(), []
    convolution = net.up_blocks[1].resnets[0].conv1
    handle = convolution.register_forward_hook(lambda *_: calls.append("before"))
    exchange = economize(net, "normal")
    stand_in = net.up_blocks[1].resnets[0].conv1
    assert stand_in is not convolution
    stand_in.register_forward_hook(lambda *_: calls.append("after"))
    latents, t, rows, _ = given(net, ())
    net(latents, t, rows["prompt_embeds"])
    assert calls == ["before", "after"]
    handle.remove()
    exchange.remove()
    net(latents, t, rows["prompt_embeds"])
    assert calls == ["before", "after", "after"]


def test_the_gate_of_a_trained_layer_and_the_thin_layers_of_a_student():
    net = unet().requires_grad_(True)
    economize(net, "normal")
    assert KeepingConv2d not in kinds(net)
    assert kinds(net)[KeepingGEGLU] == sum(name.endswith("ff.net.0") for name, _ in net.named_modules())
    thin = student()
    economize(thin, "normal")
    assert kinds(thin)[KeepingThinConv2d] == 4


# --------------------------------------------------------------------------------------------- limits on SD 1.5

LIMITS = {"normal": 330e6, "low": 220e6, "lower": 165e6, "minimum": 65e6}
"""Bytes saved for an image of 512 px in bfloat16 by SC-Tuner."""


@pytest.fixture(scope="module")
def stable_diffusion():
    return architecture("sd15").denoiser()


def saved(base: nn.Module, level: str, method: str = "scedit", conditions: tuple[str, ...] = ()) -> int:
    """Saved by a forward pass of one image, without the copies of float32 weights in the denoiser's precision."""
    with torch.device("meta"):
        tuner = tuner_class(method).build(method_config(method, {}), base, conditions)
    with FakeTensorMode():
        twins: Any = fake_twin(base, torch.bfloat16), fake_twin(tuner)
        model = build_model(*twins, level=level)
        text = torch.randn(1, 77, 768, dtype=torch.bfloat16)
        hints = {name: torch.rand(1, 3, 512, 512, dtype=torch.bfloat16) for name in conditions}
        latents = torch.randn(1, 4, 64, 64, dtype=torch.bfloat16)
        call = partial(model, latents, torch.zeros(1), {"prompt_embeds": text}, hints or None)
        copies = 2 * sum(p.numel() for p in tuner.parameters()) if level != "minimum" else 0
        return saved_bytes(model, call) - copies


@pytest.mark.parametrize("level", LEAN)
def test_the_limits_of_sc_tuner(stable_diffusion, level):
    assert 0.9 * LIMITS[level] < saved(stable_diffusion, level) <= LIMITS[level]


def test_the_limit_of_csc_tuner_whose_stem_is_computed_again(stable_diffusion):
    assert saved(stable_diffusion, "normal", conditions=("canny",)) <= 365e6
