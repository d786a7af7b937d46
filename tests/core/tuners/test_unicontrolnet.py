"""Uni-ControlNet's local adapter: its structure restated plainly in float64, and the copy on other kinds of U-Nets."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sctool.core.errors import DoesNotFit, SctoolError, UsageError
from sctool.core.measure import saved_bytes
from sctool.core.sites.attaching import channel, tuned
from sctool.core.sites.layers import layers
from sctool.core.sites.site import Inputs
from sctool.core.training.model import build_model
from sctool.core.tuners import method_config, tuner_class
from sctool.core.tuners.encoder_copy import encoder_states, own_copy
from sctool.core.tuners.fdn import Extractor, level_widths

from ..tiny import dit, unet

BOTH = pytest.mark.parametrize("method", ["uni-controlnet", "elr"])


def build(method: str, net: Any, conditions: tuple = ("canny",), vae_scale: int = 4, **settings: Any) -> Any:
    torch.manual_seed(1)
    tuner = tuner_class(method).build(method_config(method, settings), net, conditions, vae_scale)
    tuner.to(net.dtype)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tuner


def given(side: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    hint = torch.rand(2, 3, 4 * side, 4 * side).to(dtype)
    return torch.randn(2, 4, side, side).to(dtype), torch.tensor([10, 900]), torch.randn(2, 3, 8).to(dtype), hint


# ------------------------------------------------------------------------------------------- the paper, restated


class Plain:
    """The adapter in plain operations on its weights by name; attention and its text are diffusers' own modules.

    For `tiny.unet`: two levels, one residual block each, the first with attention and a downsampler; factor 4.
    """

    def __init__(self, tuner: Any) -> None:
        self.w, self.copy = dict(tuner.state_dict()), tuner.copy

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def features(self, maps: Tensor) -> list[Tensor]:
        for number, stride in enumerate((1, 2, 1, 2, 1)):
            maps = F.silu(self.conv(f"extractor.pre.{number}", maps, stride))
        first = F.silu(self.conv("extractor.levels.0", maps))
        second = F.silu(self.conv("extractor.levels.1", first, 2))
        return [self.conv("extractor.zero.0", first), self.conv("extractor.zero.1", second)]

    def norm(self, name: str, x: Tensor, f: Tensor | None) -> Tensor:
        """A GroupNorm of 4 groups, or eq. 8 with features f."""
        grouped = x.view(len(x), 4, -1)
        mean, var = grouped.mean(-1, keepdim=True), grouped.var(-1, keepdim=True, unbiased=False)
        plain = ((grouped - mean) / (var + 1e-5).sqrt()).view_as(x)
        if f is not None:
            return plain * (1 + self.conv(f"{name}.gamma", f)) + self.conv(f"{name}.beta", f)
        return plain * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def block(self, name: str, x: Tensor, emb: Tensor, f: Tensor | None = None) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x, f)))
        h = h + self.linear(f"{name}.time_emb_proj", F.silu(emb))[:, :, None, None]
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h, f)))
        shortcut = f"{name}.conv_shortcut"
        return h + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.w else x)

    def states(self, latents: Tensor, t: Tensor, text: Tensor, maps: Tensor) -> list[Tensor]:
        """What goes to the skips in encoder order, and last to the middle."""
        rates = torch.exp(-math.log(10000) * torch.arange(4) / 4)
        angles = (t[:, None].float() * rates).float()
        emb = torch.cat([angles.cos(), angles.sin()], 1).double()
        emb = self.linear("copy.time_embedding.linear_1", emb)
        emb = self.linear("copy.time_embedding.linear_2", F.silu(emb))
        f = self.features(maps)
        one = self.conv("copy.conv_in", latents)
        attention = self.copy.down_blocks[0].attentions[0]
        two = self.block("copy.down_blocks.0.resnets.0", one, emb, f[0])
        two = attention(two, encoder_hidden_states=text, return_dict=False)[0]
        three = self.conv("copy.down_blocks.0.downsamplers.0.conv", two, 2)
        four = self.block("copy.down_blocks.1.resnets.0", three, emb, f[1])
        middle = self.block("copy.mid_block.resnets.0", four, emb)
        middle = self.copy.mid_block.attentions[0](middle, encoder_hidden_states=text, return_dict=False)[0]
        middle = self.block("copy.mid_block.resnets.1", middle, emb)
        return [self.conv(f"zero.{i}", state) for i, state in enumerate((one, two, three, four, middle))]


@pytest.mark.parametrize("fdn_start", ["pretrained", "default"])
def test_the_whole_adapter_is_the_paper_s(fdn_start: str) -> None:
    net, (latents, t, text, hint) = unet().double(), given()
    tuner = build("uni-controlnet", net, ("canny", "depth"), fdn_start=fdn_start)
    with torch.no_grad():
        with tuned(net, tuner):
            kwargs = channel({"depth": hint})  # canny is absent
            ours = net(latents, t, text, cross_attention_kwargs=kwargs).sample
        base = net(latents, t, text).sample
        *skips, middle = Plain(tuner).states(latents, t, text, torch.cat([0 * hint, hint], 1))
        more = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}  # a ControlNet's way
        theirs = net(latents, t, text, **more).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # the sines are float32 in diffusers
    assert (ours - base).abs().max() > 0.1


def test_one_map_serves_a_batch_and_guidance_and_no_map_leaves_the_base() -> None:
    net, (latents, t, text, hint) = unet().double(), given()
    tuner = build("uni-controlnet", net, ("canny", "depth"))
    with torch.no_grad(), tuned(net, tuner):
        one, many = {"canny": hint[:1], "depth": hint}, {"canny": hint[:1].repeat(2, 1, 1, 1), "depth": hint}
        outs = [net(latents, t, text, cross_attention_kwargs=channel(hints)).sample for hints in (one, many)]
        torch.testing.assert_close(*outs)
        single = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint[:1]})).sample
        two = net(latents, t, text, cross_attention_kwargs=channel({"canny": one["canny"].expand(2, -1, -1, -1)}))
        torch.testing.assert_close(single, two.sample)
        alone = net(latents, t, text).sample
    assert torch.equal(alone, net(latents, t, text).sample)


# ------------------------------------------------------------------------------------------------- the extractor


def strides(extractor: Extractor) -> list[int]:
    return [layer.stride[0] for layer in (*extractor.pre, *extractor.levels)]  # type: ignore[union-attr]


def test_the_extractor_is_as_published_for_factor_8() -> None:
    extractor = Extractor(21, level_widths(4, 1.0), [2, 2, 2], 8, 1.0)
    sizes = [(layer.in_channels, layer.out_channels) for layer in (*extractor.pre, *extractor.levels)]  # type: ignore[union-attr]
    assert sizes == [
        (21, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 192), (192, 256), (256, 384), (384, 512)
    ]  # fmt: skip
    assert strides(extractor) == [1, 2, 1, 2, 1, 2, 2, 2, 2]
    features = extractor(torch.rand(1, 21, 64, 64))
    assert [tuple(f.shape[1:]) for f in features] == [(192, 8, 8), (256, 4, 4), (384, 2, 2), (512, 1, 1)]
    assert not any(f.any() for f in features), "zero convolutions"


@BOTH
def test_living_features_differ_between_maps_from_the_first_step_on(method: str) -> None:
    net, (latents, t, text, hint) = unet().double(), given()
    torch.manual_seed(0)
    tuner: Any = tuner_class(method).build(method_config(method, {"features": "alive"}), net, ("canny",), 4).double()
    features = tuner.extractor(hint)
    assert all((f[0] - f[1]).std() > 0.2 for f in features)
    with torch.no_grad(), tuned(net, tuner):
        out = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint})).sample
    assert torch.equal(out, net(latents, t, text).sample), "it starts as the base"
    with tuned(net, tuner):
        net(latents, t, text, cross_attention_kwargs=channel({"canny": hint})).sample.square().sum().backward()
    assert all(own.weight.grad.any() for own in tuner.zero), "the first step moves what leads the copy's states off"
    with torch.no_grad(), tuned(net, tuner):
        for own in tuner.zero:
            own.weight -= 0.01 * own.weight.grad.sign()
        shown, other = (
            net(latents, t, text, cross_attention_kwargs=channel({"canny": maps})).sample for maps in (hint, 1 - hint)
        )
    assert (shown - other).abs().max() > 1e-3, "after one step maps make a difference"


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16, 32, 64])
def test_features_are_on_the_grid_of_every_level_for_every_factor(factor: int) -> None:
    extractor = Extractor(3, level_widths(3, 0.25), [2, 1], factor, 0.25)
    features = extractor(torch.rand(1, 3, 5 * factor, 7 * factor))
    assert [tuple(f.shape[2:]) for f in features] == [(5, 7), (3, 4), (3, 4)]


def test_other_factors_and_more_levels() -> None:
    with pytest.raises(UsageError, match="factor is 6"):
        Extractor(3, [8], [], 6, 1.0)
    assert level_widths(6, 1.0) == [192, 256, 384, 512, 640, 768]
    assert level_widths(2, 0.25) == [48, 64]


# ------------------------------------------------------------------------------------- the copy on kinds of U-Nets

KINDS = {
    "two layers": {"layers_per_block": 2},
    "unpadded": {"downsample_padding": 0},
    "no middle": {"mid_block_type": None},
    "plain middle": {"mid_block_type": "UNetMidBlock2D"},
    "sdxl": {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 29,
        "use_linear_projection": True, "transformer_layers_per_block": 2,
    },
    "classes": {"num_class_embeds": 5},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "time_embedding_act_fn": "silu"},
    "centred": {"center_input_sample": True},
}  # fmt: skip


def arguments(kind: str) -> dict[str, Any]:
    if kind == "sdxl":
        generator = torch.Generator().manual_seed(5)
        ids, pooled = (torch.rand(2, n, generator=generator, dtype=torch.float64) for n in (6, 5))
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    return {"class_labels": torch.tensor([1, 4])} if kind == "classes" else {}


@pytest.mark.parametrize("side", [8, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_computes_what_the_base_s_encoder_does(kind: str, side: int) -> None:
    net = unet(**KINDS[kind]).double()
    latents, t, text, _ = given(side)
    seen: list[Any] = [None]
    handles = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: seen.extend(reversed(kwargs["res_hidden_states_tuple"])), with_kwargs=True
        )
        for block in net.up_blocks
    ]
    if net.mid_block is not None:
        handles.append(net.mid_block.register_forward_hook(lambda module, args, out: seen.__setitem__(0, out)))
    net(latents, t, text, **arguments(kind))
    for handle in handles:
        handle.remove()
    tuner = tuner_class("uni-controlnet").build(method_config("uni-controlnet", {}), net, ("canny",), 4).double()
    zeros = [0 * f for f in tuner.extractor(torch.zeros(2, 3, 4 * side, 4 * side).double())]
    inputs = Inputs(latents, t, {"encoder_hidden_states": text, **arguments(kind)})
    states, middle = encoder_states(tuner.encoder(), inputs, zeros)
    for ours, theirs in zip([middle, *reversed(states)], seen, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # FDN's biases were made in float32
    assert (middle is None) == (kind == "no middle")


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_both_methods_act_on_it(method: str, kind: str) -> None:
    net, (latents, t, text, hint) = unet(**KINDS[kind]).double(), given(7)
    tuner = build(method, net)
    with torch.no_grad(), tuned(net, tuner):
        out = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint}), **arguments(kind)).sample
    assert (out - net(latents, t, text, **arguments(kind)).sample).abs().max() > 1e-3


@BOTH
def test_what_is_hooked_to_the_base_does_not_act_on_the_copy(method: str) -> None:
    net, (latents, t, text, hint) = unet().double(), given()
    tuner = build(method, net)
    inputs = Inputs(latents, t, {"encoder_hidden_states": text})
    with torch.no_grad():
        with tuned(net, tuner):
            expected = tuner.encode({"canny": hint}, inputs)
        handles = [net.get_submodule(one.name).register_forward_hook(lambda m, a, out: out + 1) for one in layers(net)]
        again = build(method, net)
        with tuned(net, again):
            found = again.encode({"canny": hint}, inputs)
    for handle in handles:
        handle.remove()
    for ours, theirs in zip(*(next(iter(one.values())) for one in (found, expected)), strict=True):
        assert torch.equal(ours, theirs)


def test_tied_weights_stay_tied_in_a_copy() -> None:
    net = unet(layers_per_block=2)
    net.down_blocks[0].resnets[1].conv2.weight = net.down_blocks[0].resnets[1].conv1.weight
    copy = own_copy(net)
    assert copy.down_blocks[0].resnets[1].conv2.weight is copy.down_blocks[0].resnets[1].conv1.weight
    assert copy.down_blocks[0].resnets[1].conv1.weight is not net.down_blocks[0].resnets[1].conv1.weight


@BOTH
def test_gradient_checkpointing_recomputes_the_copy_too(method: str) -> None:
    latents, t, text, hint = given()
    inputs, rows, outs, saved = Inputs(latents, t, {"encoder_hidden_states": text}), {"prompt_embeds": text}, [], []
    for level in ("plain", "minimum"):
        net = unet(layers_per_block=2).double()
        tuner = build(method, net)
        model = build_model(net, tuner, level=level)
        saved.append(saved_bytes(model, partial(tuner.encode, {"canny": hint}, inputs)))
        first = model(latents, t, rows, {"canny": hint}).square().mean()
        second = model(latents, t, rows, {"canny": 1 - hint}).square().mean()  # features change before the backward
        (first + second).backward()
        outs.append([first, *(p.grad for p in tuner.parameters())])
    for plain, recomputed in zip(*outs, strict=True):
        torch.testing.assert_close(plain, recomputed)
    assert saved[1] < 0.7 * saved[0]


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_float32_weights(method: str, dtype: torch.dtype) -> None:
    net, (latents, t, text, hint) = unet(), given(dtype=torch.float32)
    tuner = build(method, net)
    with torch.no_grad():
        with tuned(net, tuner):
            exact = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint})).sample
        net.to(dtype)
        with tuned(net, tuner):
            low = net(latents.to(dtype), t, text.to(dtype), cross_attention_kwargs=channel({"canny": hint})).sample
    assert low.dtype == dtype
    assert {p.dtype for p in tuner.parameters()} == {torch.float32}
    assert (low.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@BOTH
@pytest.mark.parametrize("other", ["bitfit", "difffit"])
def test_low_precision_beside_methods_that_train_the_base_s_weights(method: str, other: str) -> None:
    net, (latents, t, text, hint) = unet(), given(dtype=torch.float32)
    tuner, swapping = build(method, net), tuner_class(other).build(method_config(other, {}), net)
    with torch.no_grad():
        for parameter in swapping.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        with tuned(net, swapping, tuner):
            exact = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint})).sample
        net.to(torch.bfloat16)
        latents, text = latents.bfloat16(), text.bfloat16()
        for pair in ((swapping, tuner), (tuner, swapping)):
            with tuned(net, *pair):
                low = net(latents, t, text, cross_attention_kwargs=channel({"canny": hint})).sample
            assert (low.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


# -------------------------------------------------------------------------------------------------------- refusals


@BOTH
def test_what_does_not_fit_is_said(method: str) -> None:
    with pytest.raises(DoesNotFit, match=f"{method} copies a U-Net's encoder"):
        build(method, dit())
    with pytest.raises(UsageError, match="add --cond"):
        build(method, unet(), ())
    blocks = {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
    with pytest.raises(DoesNotFit, match="cannot copy a U-Net with AttnDownBlock2D"):
        build(method, unet(**blocks))
    net = unet()
    tuner = build(method, net, ("canny", "depth"))
    with pytest.raises(UsageError, match="'depth' has no weight of its own"), tuned(net, tuner, weights={"depth": 0.5}):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    with tuned(net, tuner, weights={"depth": 1.0}):
        pass


def test_elr_is_on_one_denoiser_at_a_time_and_on_one_like_its_own() -> None:
    net, twin = unet(), unet()
    tuner = build("elr", net)
    with tuned(net, tuner), pytest.raises(SctoolError, match="detach it first"), tuned(twin, tuner):
        pass
    for other in (unet(layers_per_block=2), unet(block_out_channels=(8, 24)), unet(cross_attention_dim=12)):
        with pytest.raises(SctoolError, match="for another base"), tuned(other, tuner):
            pass
    with tuned(twin, tuner):
        pass


def test_elr_names_a_layer_that_it_cannot_update() -> None:
    net = unet()
    net.down_blocks[0].resnets[0].conv1 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    with pytest.raises(DoesNotFit, match=r"down_blocks\.0\.resnets\.0\.conv1: a grouped"):
        build("elr", net)
