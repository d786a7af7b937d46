"""Uni-ControlNet's local adapter and ELR-Diffusion's: norms, encoder copies, and updates folded into them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sctool.core.distilling.factorising import decompose, layers_to_divide
from sctool.core.distilling.ranks import by_ratio
from sctool.core.sites.attaching import channel, tuned
from sctool.core.sites.site import Inputs
from sctool.core.tuners import method_config, tuner_class
from sctool.core.tuners.encoder_copy import encoder_states
from sctool.core.tuners.fdn import FDN, bias

from ..tiny import unet


def given() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents, text = (torch.randn(2, *shape, generator=generator).double() for shape in ((4, 8, 8), (3, 8)))
    return latents, torch.tensor([10, 900]), text, torch.rand(2, 3, 32, 32, generator=generator).double()


def affine_net() -> Any:
    """A U-Net whose norms have scales and shifts that are not 1 and 0."""
    net = unet(layers_per_block=2).double()
    torch.manual_seed(2)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.add_(0.3 * torch.randn_like(module.weight))
                module.bias.add_(0.3 * torch.randn_like(module.bias))
    return net


def build(method: str, net: Any, conditions: tuple = ("canny",), shaken: bool = True, **settings: Any) -> Any:
    torch.manual_seed(1)
    tuner = tuner_class(method).build(method_config(method, settings), net, conditions, 4).double()
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(shaken * 0.1 * torch.randn_like(parameter))
    return tuner


def test_fdn_starts_as_the_pretrained_norm_and_follows_its_equation() -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16, 1e-5).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    z, f = torch.randn(2, 16, 6, 6).double(), torch.randn(2, 5, 6, 6).double()
    for start, same in (("pretrained", True), ("default", False)):
        fdn = FDN(norm, 5, start).double()
        with torch.no_grad():
            if start == "pretrained":  # the biases were made in float32
                bias(fdn.gamma).copy_(norm.weight - 1)
                bias(fdn.beta).copy_(norm.bias)
        fdn.features = torch.zeros_like(f)
        assert torch.allclose(fdn(z), norm(z), rtol=0, atol=1e-12) == same
        fdn.features = f
        gamma, beta = (F.conv2d(f, layer.weight, layer.bias, padding=1) for layer in (fdn.gamma, fdn.beta))  # type: ignore[arg-type]
        mean, var = (g(z.view(2, 4, -1), -1).view(2, 4, 1) for g in (torch.mean, lambda x, d: x.var(d, unbiased=False)))
        plain = ((z.view(2, 4, -1) - mean) / (var + 1e-5).sqrt()).view_as(z)
        torch.testing.assert_close(fdn(z), plain * (1 + gamma) + beta, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["uni-controlnet", "elr"])
def test_without_features_the_copy_computes_the_base_s_states(method: str) -> None:
    net, (latents, t, text, _) = affine_net(), given()
    tuner = build(method, net, shaken=False)
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: seen.extend(reversed(kwargs["res_hidden_states_tuple"])), with_kwargs=True
        )
        for block in net.up_blocks
    ]
    hooks.append(net.mid_block.register_forward_hook(lambda module, args, output: seen.insert(0, output)))
    net(latents, t, text)
    for hook in hooks:
        hook.remove()
    zeros = [torch.zeros_like(one) for one in tuner.extractor(torch.zeros(2, 3, 32, 32).double())]
    with tuned(net, tuner), torch.no_grad():
        states, middle = encoder_states(tuner.encoder(), Inputs(latents, t, {"encoder_hidden_states": text}), zeros)
    for ours, theirs in zip([middle, *reversed(states)], seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # FDN's biases were made in float32


@pytest.mark.parametrize("settings", [{}, {"n": 3, "rank": 5}, {"ratio": 0.4}])
def test_elr_folded_into_a_copy_is_elr(settings: dict) -> None:
    net, (latents, t, text, hint) = affine_net(), given()
    tuner = build("elr", net, ("canny", "depth"), **settings)
    hints = channel({"canny": hint})
    with torch.no_grad():
        base = net(latents, t, text).sample
        with tuned(net, tuner, scales=0.6):
            expected = net(latents, t, text, cross_attention_kwargs=hints).sample
        with tuned(net, tuner.folded(net), scales=0.6):
            folded = net(latents, t, text, cross_attention_kwargs=hints).sample
    torch.testing.assert_close(folded, expected, rtol=0, atol=1e-6)
    assert (expected - base).abs().max() > 1e-2


def test_elr_stores_no_weight_of_the_base() -> None:
    net = unet(layers_per_block=2)
    elr = build("elr", net)
    assert {name.split(".")[0] for name in elr.state_dict()} == {"extractor", "zero", "fdn", "updates"}
    with tuned(net, elr):
        assert {name.split(".")[0] for name in elr.state_dict()} == {"extractor", "zero", "fdn", "updates"}
        shared = elr.encoder().down_blocks[0].resnets[0].conv1.weight
        assert shared is net.down_blocks[0].resnets[0].conv1.weight, "the copy's weights are the base's own"


@pytest.mark.parametrize("method", ["uni-controlnet", "elr", "controllora"])
def test_a_student_can_be_controlled(method: str) -> None:
    net = unet(layers_per_block=2)
    decompose(net, by_ratio(layers_to_divide(net), 0.5))
    net.requires_grad_(False).double()
    tuner, (latents, t, text, hint) = build(method, net), given()
    with torch.no_grad():
        base = net(latents, t, text).sample
        with tuned(net, tuner):
            ours = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint})).sample
        assert torch.equal(net(latents, t, text).sample, base)
    assert (ours - base).abs().max() > 1e-3


def test_absent_maps_are_zeros_and_the_order_is_the_conditions() -> None:
    tuner, (*_, hint) = build("uni-controlnet", unet(), ("canny", "color", "depth")), given()
    joined = tuner.joined({"depth": hint, "canny": 2 * hint})
    torch.testing.assert_close(joined, torch.cat([2 * hint, torch.zeros_like(hint), hint], 1))
