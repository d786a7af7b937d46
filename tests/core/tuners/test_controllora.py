"""ControlLoRA against the original's formulas, restated as diffusers' attention processors, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sctool.core.errors import DoesNotFit, UsageError
from sctool.core.sites.attaching import channel, tuned
from sctool.core.tuners import method_config, tuner_class

from ..tiny import dit, unet


def build(net: Any, conditions: tuple = ("canny",), vae_scale: int = 4, **settings: Any) -> Any:
    torch.manual_seed(1)
    config = method_config("controllora", settings)
    tuner = tuner_class("controllora").build(config, net, conditions, vae_scale).double()
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tuner


def given(side: int = 8, scale: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    hint = torch.rand(2, 3, scale * side, scale * side).double()
    return torch.randn(2, 4, side, side).double(), torch.tensor([10, 900]), torch.randn(2, 3, 8).double(), hint


def block(w: dict[str, Tensor], name: str, x: Tensor, groups: int = 32) -> Tensor:
    """The original's ConvBlock2D, and its Downsample2D with padding 0 where there is one."""
    x = F.silu(F.group_norm(x, 32, w[f"{name}.before.weight"], w[f"{name}.before.bias"], 1e-6))
    kernel = w[f"{name}.conv.weight"]
    x = F.conv2d(x, kernel, w[f"{name}.conv.bias"], padding=kernel.shape[-1] // 2)
    x = F.silu(F.group_norm(x, groups, w[f"{name}.after.weight"], w[f"{name}.after.bias"], 1e-6))
    if f"{name}.halving.weight" in w:
        x = F.conv2d(F.pad(x, (0, 1, 0, 1)), w[f"{name}.halving.weight"], w[f"{name}.halving.bias"], 2)
    return x


def states(w: dict[str, Tensor], hint: Tensor, levels: int, groups: int, condition: str = "canny") -> list[Tensor]:
    """Control states of each level as tokens."""
    own = {name.removeprefix(f"encoders.{condition}."): value for name, value in w.items()}
    c, found = F.conv2d(hint, own["conv_in.weight"], own["conv_in.bias"], padding=1), []
    for number in range(4):
        c = block(own, f"pre.{number}", c)
    for number in range(levels):
        c = block(own, f"levels.{number - 1}", c) if number else c
        found.append(block(own, f"heads.{number}", c, groups).flatten(2).transpose(1, 2))
    return found


class Processor:
    """ControlLoRACrossAttnProcessor of version 1, with control_self_add and nothing added afterwards."""

    def __init__(self, w: dict[str, Tensor], name: str, control: Tensor) -> None:
        self.w, self.name, self.control = w, name.removesuffix(".processor").replace(".", "/"), control

    def lora(self, kind: str, layer: str, x: Tensor) -> Tensor:
        name = f"{kind}.{self.name}/{layer}"
        return x @ self.w[f"{name}.down.weight"].T @ self.w[f"{name}.up.weight"].T

    def __call__(self, attn: Any, h: Tensor, encoder_hidden_states: Any = None, *rest: Any, **more: Any) -> Tensor:
        text = h if encoder_hidden_states is None else encoder_hidden_states
        control = self.control + self.lora("controls", "to_q", self.control)
        q = attn.to_q(h) + self.lora("loras", "to_q", h + control)
        k = attn.to_k(text) + self.lora("loras", "to_k", text)
        v = attn.to_v(text) + self.lora("loras", "to_v", text)
        q, k, v = (one.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for one in (q, k, v))
        out = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out) + self.lora("loras", "to_out/0", out)


def test_the_whole_method_is_the_original_s() -> None:
    net, (latents, t, text, hint) = unet().double(), given()
    tuner = build(net)
    w = dict(tuner.state_dict())
    with torch.no_grad():
        with tuned(net, tuner):
            ours = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint})).sample
        base, levels = net(latents, t, text).sample, states(w, hint, 2, 4)
        level_of = {"down_blocks.0": 0, "mid_block": 1, "up_blocks.1": 0}
        net.set_attn_processor(
            {
                name: Processor(w, name, next(levels[i] for part, i in level_of.items() if name.startswith(part)))
                for name in net.attn_processors
            }
        )
        theirs = net(latents, t, text).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert (ours - base).abs().max() > 0.1


def test_conditions_are_summed_with_their_weights() -> None:
    net, (*_, hint) = unet().double(), given()
    tuner = build(net, ("canny", "depth"))
    features = tuner.encode({"canny": hint, "depth": 1 - hint})
    w = dict(tuner.state_dict())
    for name, own in (("canny", hint), ("depth", 1 - hint)):
        for number, expected in enumerate(states(w, own, 2, 4, name)):
            torch.testing.assert_close(features[name][number], expected, rtol=0, atol=1e-10)
    latents, t, text, _ = given()
    with torch.no_grad():
        outs = []
        for weights in ({"canny": 1.0, "depth": 0.0}, {"canny": 5.0, "depth": 0.0}, None):
            with tuned(net, tuner, weights=weights):
                kwargs = channel({"canny": hint, "depth": 1 - hint})
                outs.append(net(latents, t, text, cross_attention_kwargs=kwargs).sample)
        with tuned(net, tuner):
            alone = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint})).sample
    torch.testing.assert_close(outs[0], alone)
    torch.testing.assert_close(outs[1], alone)
    assert not torch.allclose(outs[2], alone, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_black_map_says_nothing_instead_of_rounding_errors(dtype: torch.dtype) -> None:
    tuner = build(unet()).to(dtype)
    hint = torch.rand(2, 3, 32, 32, dtype=dtype)
    hint[1] = 0
    for own in tuner.encode({"canny": hint})["canny"].values():
        assert own[0].any()
        assert not own[1].any()


@pytest.mark.parametrize(("vae_scale", "side"), [(1, 8), (2, 8), (4, 7), (8, 8), (16, 6)])
@pytest.mark.parametrize("padding", [0, 1])
def test_states_are_on_the_grid_of_every_level(vae_scale: int, side: int, padding: int) -> None:
    net = unet(downsample_padding=padding).double()
    tuner, (latents, t, text, hint) = build(net, vae_scale=vae_scale), given(side, vae_scale)
    with torch.no_grad(), tuned(net, tuner):
        ours = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint})).sample
    assert ours.shape == latents.shape


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(DoesNotFit, match="brings maps to a U-Net's attention"):
        build(dit())
    with pytest.raises(UsageError, match="add --cond"):
        build(unet(), ())
    with pytest.raises(UsageError, match="factor is 32"):
        build(unet(), vae_scale=32)
    with pytest.raises(UsageError, match="unknown condition 'depht'"):
        build(unet(), ("depth",), weights={"depht": 2.0})
