"""ControlNet and T2I-Adapter: what our hooks add is what diffusers' own U-Net does with the same models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNetControlNetXSModel
from torch import Tensor

from sctool.core.backbones.architectures import architecture
from sctool.core.distilling.factorising import decompose, layers_to_divide
from sctool.core.distilling.ranks import by_ratio
from sctool.core.errors import DoesNotFit
from sctool.core.sites.attaching import channel, tuned
from sctool.core.tuners import method_config, tuner_class
from sctool.core.tuners.controlnet import encoder_widths

from ..tiny import dit, unet


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents, text = (torch.randn(2, *shape, generator=generator).double() for shape in ((4, 8, 8), (3, 8)))
    return latents, torch.tensor([10, 900]), text, torch.rand(2, 3, 32, 32, generator=generator).double()


def build(method: str, net: Any, conditions: tuple = ("canny",), **settings: Any) -> Any:
    torch.manual_seed(1)
    tuner = tuner_class(method).build(method_config(method, settings), net, conditions, 4).double().eval()
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tuner


def test_controlnet_is_diffusers_controlnet() -> None:
    net = unet(layers_per_block=2).double()
    tuner = build("controlnet", net, ("canny", "color"))
    latents, t, text, hint = inputs()
    with torch.no_grad():
        sums: Any = None
        for name, alpha in (("canny", 0.25), ("color", 0.75)):
            down, mid = tuner.nets[name](latents, t, text, hint, conditioning_scale=alpha, return_dict=False)
            states = [*down, mid]
            sums = states if sums is None else [a + b for a, b in zip(sums, states, strict=True)]
        expected = net(
            latents, t, text, down_block_additional_residuals=sums[:-1], mid_block_additional_residual=sums[-1]
        ).sample
        hints = channel({"canny": hint, "color": hint})
        with tuned(net, tuner, weights={"canny": 1.0, "color": 3.0}):
            ours = net(latents, t, text, cross_attention_kwargs=hints).sample
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("blocks", [("CrossAttnDownBlock2D", "DownBlock2D"), ("DownBlock2D", "CrossAttnDownBlock2D")])
def test_t2i_adapter_is_diffusers_adapter(blocks: tuple) -> None:
    ups = tuple(block.replace("Down", "Up") for block in reversed(blocks))
    net = unet(layers_per_block=2, down_block_types=blocks, up_block_types=ups).double()
    tuner = build("t2i-adapter", net)
    latents, t, text, hint = inputs()
    features = [f.detach() for f in tuner.adapters["canny"](hint)]
    if blocks[0] == "DownBlock2D":  # there diffusers adds after the downsampling
        features[0] = torch.nn.functional.avg_pool2d(features[0], 2)
        tuner.encode = lambda hints, inputs=None: {"canny": features}
    with torch.no_grad():
        expected = net(latents, t, text, down_intrablock_additional_residuals=[f.clone() for f in features]).sample
        with tuned(net, tuner):
            ours = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint})).sample
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        assert (expected - net(latents, t, text).sample).abs().max() > 1e-3


@pytest.mark.parametrize("blocks", [("CrossAttnDownBlock2D", "DownBlock2D"), ("DownBlock2D", "CrossAttnDownBlock2D")])
@pytest.mark.parametrize("own_time", [True, False])
def test_controlnet_xs_is_diffusers_merged_model(blocks: tuple, own_time: bool) -> None:
    ups = tuple(block.replace("Down", "Up") for block in reversed(blocks))
    sizes = {"block_out_channels": (8, 16), "attention_head_dim": (2, 4), "norm_num_groups": 4}
    net = unet(layers_per_block=2, down_block_types=blocks, up_block_types=ups, **sizes).double()
    tuner = build("controlnet-xs", net, ratio=0.5, heads=(1, 2), time_embedding=own_time)
    tuner.float().double()  # diffusers merges in float32
    latents, t, text, hint = inputs()
    with torch.no_grad():
        merged = UNetControlNetXSModel.from_unet(net, tuner.adapters["canny"]).double().eval()
        for name, module in merged.named_modules():  # diffusers gives the base's norms another epsilon than they had
            if isinstance(module, torch.nn.GroupNorm) and "ctrl" not in name and "attentions" not in name:
                module.eps = 1e-5
        expected = merged(latents, t, text, controlnet_cond=hint, conditioning_scale=0.7, return_dict=False)[0]
        base = net(latents, t, text).sample
        with tuned(net, tuner, scales=0.7 if not own_time else 1.0):
            ours = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint})).sample
            without = net(latents, t, text).sample
        if own_time:  # a scale also scales the time embedding's change here, so compare at 1
            expected = merged(latents, t, text, controlnet_cond=hint, conditioning_scale=1.0, return_dict=False)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(without, base, rtol=0, atol=0)
    assert (ours - base).abs().max() > 1e-3


def test_the_published_start_is_not_the_base() -> None:
    net = unet()
    torch.manual_seed(0)
    tuner = tuner_class("t2i-adapter").build(method_config("t2i-adapter", {"start": "random"}), net, ("canny",), 4)
    assert all(f.abs().max() > 0 for f in tuner.encode({"canny": torch.rand(1, 3, 32, 32)})["canny"])


def test_maps_end_on_the_latents_grid() -> None:
    assert encoder_widths(8) == (16, 32, 96, 256)
    assert [len(encoder_widths(scale)) for scale in (1, 2, 4, 16)] == [1, 2, 3, 5]


def test_a_student_s_copy_has_the_product_s_weights() -> None:
    net = unet()
    decompose(net, by_ratio(layers_to_divide(net), 0.5))
    tuner = tuner_class("controlnet").build(method_config("controlnet", {}), net, ("canny",), 4)
    copy = tuner.nets["canny"].down_blocks[0].resnets[0].conv1.weight
    torch.testing.assert_close(copy, net.down_blocks[0].resnets[0].conv1.weight, rtol=0, atol=1e-6)


def test_only_u_nets_with_maps() -> None:
    for method in ("controlnet", "t2i-adapter"):
        with pytest.raises(DoesNotFit, match="is for U-Nets"):
            tuner_class(method).build(method_config(method, {}), dit(), ("canny",), 4)
        with pytest.raises(DoesNotFit, match="add --cond"):
            tuner_class(method).build(method_config(method, {}), unet(), (), 4)


def test_the_papers_counts() -> None:
    for base, method, count in (
        ("sd21", "controlnet", 364_228_240), ("sd15", "controlnet", 361_279_120), ("sd15", "t2i-adapter", 77_369_280),
        ("sd21", "controlnet-xs", 55_301_776),
    ):  # fmt: skip
        known = architecture(base)
        tuner = tuner_class(method).build(method_config(method, {}), known.denoiser(), ("canny",), 8)
        assert sum(p.numel() for p in tuner.parameters()) == count
