"""Control baselines: what our hooks add is what diffusers' own U-Net does with the same models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNetControlNetXSModel
from torch import Tensor

from sctool.core.backbones.architectures import architecture
from sctool.core.distilling.factorising import decompose, layers_to_divide
from sctool.core.distilling.ranks import by_ratio
from sctool.core.errors import DoesNotFit, UsageError
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


@pytest.mark.parametrize("channels", [1, 3])
def test_t2i_adapter_is_diffusers_adapter(channels: int) -> None:
    net = unet(layers_per_block=2).double()
    tuner = build("t2i-adapter", net, channels=channels)
    latents, t, text, hint = inputs()
    with torch.no_grad():
        features = tuner.adapters["canny"](hint if channels == 3 else hint.mean(1, keepdim=True))
        expected = net(latents, t, text, down_intrablock_additional_residuals=[f.clone() for f in features]).sample
        with tuned(net, tuner):
            ours = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint})).sample
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        assert (expected - net(latents, t, text).sample).abs().max() > 1e-3


def merged_by_diffusers(net: Any, adapter: Any) -> Any:
    merged = UNetControlNetXSModel.from_unet(net, adapter).double().eval()
    for name, module in merged.named_modules():  # diffusers gives the base's norms another epsilon than they had
        if isinstance(module, torch.nn.GroupNorm) and "ctrl" not in name and "attentions" not in name:
            module.eps = 1e-5
    return merged


@pytest.mark.parametrize("blocks", [("CrossAttnDownBlock2D", "DownBlock2D"), ("DownBlock2D", "CrossAttnDownBlock2D")])
@pytest.mark.parametrize(("own_time", "mix"), [(True, 1.0), (True, 0.5), (False, 1.0)])
def test_controlnet_xs_is_diffusers_merged_model(blocks: tuple, own_time: bool, mix: float) -> None:
    ups = tuple(block.replace("Down", "Up") for block in reversed(blocks))
    sizes = {"block_out_channels": (8, 16), "attention_head_dim": (2, 4), "norm_num_groups": 4}
    net = unet(layers_per_block=2, down_block_types=blocks, up_block_types=ups, **sizes).double()
    tuner = build("controlnet-xs", net, ratio=0.5, heads=(1, 2), time_embedding=own_time, time_mix=mix)
    tuner.float().double()  # diffusers merges in float32
    latents, t, text, hint = inputs()
    with torch.no_grad():
        merged = merged_by_diffusers(net, tuner.adapters["canny"])
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


def sdxl() -> Any:
    """SDXL's levels, small: the first without attention, two more, pooled text and sizes beside the prompt."""
    return unet(
        block_out_channels=(8, 16, 16), layers_per_block=2, transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4, 4),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,
    ).double()  # fmt: skip


def added(method: str, net: Any, tuner: Any, call: dict[str, Any], hint: Tensor) -> Any:
    """What diffusers' own code gives for SDXL with the tuner's model."""
    [model] = tuner.in_diffusers().values()
    if method == "controlnet-xs":
        return merged_by_diffusers(net, model)(**call, controlnet_cond=hint, return_dict=False)[0]
    if method == "t2i-adapter":
        return net(**call, down_intrablock_additional_residuals=model(hint)).sample
    down, mid = model(**call, controlnet_cond=hint, return_dict=False)
    return net(**call, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample


@pytest.mark.parametrize("method", ["controlnet", "t2i-adapter", "controlnet-xs"])
def test_sdxl_is_controlled_as_by_diffusers(method: str) -> None:
    net = sdxl()
    tuner = build(method, net, **({"ratio": 0.5} if method == "controlnet-xs" else {})).float().double()
    latents, t, text, hint = inputs()
    pooled = torch.randn(2, 10, generator=torch.Generator().manual_seed(4)).double()
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64], [32, 32, 4, 4, 64, 64]]).double()
    call = {"sample": latents, "timestep": t, "encoder_hidden_states": text}
    call |= {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    with torch.no_grad():
        expected, base = added(method, net, tuner, call, hint), net(**call).sample
        with tuned(net, tuner):
            ours = net(**call, cross_attention_kwargs=channel({"canny": hint})).sample
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    assert (ours - base).abs().max() > 1e-3


def test_levels_that_no_adapter_has_the_sides_of_are_refused() -> None:
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D")
    net = unet(down_block_types=blocks, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    with pytest.raises(DoesNotFit, match="halved 1, 1 times"):
        tuner_class("t2i-adapter").build(method_config("t2i-adapter", {}), net, ("canny",), 4)


@pytest.mark.parametrize("method", ["controlnet", "controlnet-xs"])
def test_networks_compute_in_the_base_s_half_precision(method: str) -> None:
    net = unet(layers_per_block=2, attention_head_dim=(2, 4))
    settings: dict[str, Any] = {"ratio": 0.5} if method == "controlnet-xs" else {}
    tuner = build(method, net, **settings).float()
    latents, t, text, hint = (value.float() if value.is_floating_point() else value for value in inputs())
    hints, dtypes = channel({"canny": hint}), set()
    with torch.no_grad():
        with tuned(net, tuner):
            wide = net(latents, t, text, cross_attention_kwargs=hints).sample
        for module in tuner.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
        with tuned(net.bfloat16(), tuner):
            half = net(latents.bfloat16(), t, text.bfloat16(), cross_attention_kwargs=hints).sample
    assert dtypes == {torch.bfloat16}
    assert (half.float() - wide).norm() < 0.05 * wide.norm()


def test_checkpointing_recomputes_the_copy_too() -> None:
    net = unet(layers_per_block=2).double()
    tuner = build("controlnet", net)
    latents, t, text, hint = inputs()
    first, calls, gradients = tuner.nets["canny"].down_blocks[0].resnets[0], [], []
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            tuner.recompute()
        calls.clear()
        tuner.zero_grad()
        with tuned(net, tuner):
            out = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint})).sample
        out.square().mean().backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([parameter.grad.clone() for parameter in tuner.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_a_base_that_diffusers_adapter_cannot_name_gives_no_folder_for_it() -> None:
    net = unet(layers_per_block=2, attention_head_dim=(2, 4), in_channels=6, out_channels=6)
    tuner = tuner_class("controlnet-xs").build(method_config("controlnet-xs", {"ratio": 0.5}), net, ("canny",), 4)
    assert tuner.in_diffusers() == {}


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
    for method in ("controlnet", "t2i-adapter", "controlnet-xs"):
        with pytest.raises(DoesNotFit, match="is for U-Nets"):
            tuner_class(method).build(method_config(method, {}), dit(), ("canny",), 4)
        with pytest.raises(UsageError, match="add --cond"):
            tuner_class(method).build(method_config(method, {}), unet(), (), 4)
    for method in ("controlnet", "controlnet-xs"):
        with pytest.raises(DoesNotFit, match="needs a middle block"):
            tuner_class(method).build(method_config(method, {}), unet(mid_block_type=None), ("canny",), 4)


def test_the_papers_counts() -> None:
    for base, method, count in (
        ("sd21", "controlnet", 364_228_240), ("sd15", "controlnet", 361_279_120), ("sd15", "t2i-adapter", 77_369_280),
        ("sd21", "controlnet-xs", 55_301_776),
    ):  # fmt: skip
        known = architecture(base)
        tuner = tuner_class(method).build(method_config(method, {}), known.denoiser(), ("canny",), 8)
        assert sum(p.numel() for p in tuner.parameters()) == count


@pytest.mark.slow
def test_the_counts_on_sdxl() -> None:
    known = architecture("sdxl")
    denoiser = known.denoiser()
    for method, count in (("controlnet", 1_251_014_160), ("t2i-adapter", 79_028_160)):  # published as 1251M and 79M
        tuner = tuner_class(method).build(method_config(method, {}), denoiser, ("canny",), 8)
        assert sum(p.numel() for p in tuner.parameters()) == count
