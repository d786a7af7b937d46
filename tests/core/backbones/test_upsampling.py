"""Upsampling in phases is diffusers' upsampling, and touches nothing but it."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D

from sctool.core.backbones.upsampling import PhaseUpsample2D, fold_upsampling


def unet():
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
        )
        .requires_grad_(False)
        .eval()
    )


@pytest.mark.parametrize("sides", [(1, 1), (2, 3), (7, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_equal_the_originals(sides, bias):
    torch.manual_seed(0)
    original = Upsample2D(3, use_conv=True, out_channels=5, bias=bias).double().requires_grad_(False)
    phases, x = PhaseUpsample2D(original), torch.randn(2, 3, *sides, dtype=torch.double, requires_grad=True)
    expected, found = original(x), phases(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, g), torch.autograd.grad(expected, x, g), rtol=1e-12, atol=1e-12
    )


def test_another_size_goes_the_original_way():
    original = Upsample2D(3, use_conv=True).requires_grad_(False)
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(PhaseUpsample2D(original)(x, (7, 9)), original(x, (7, 9)))
    assert PhaseUpsample2D(original)(x, torch.Size((8, 8))).shape == (1, 3, 8, 8)


def test_a_unet_keeps_its_weights_keys_and_function():
    net = unet()
    state, x, text = copy.deepcopy(net.state_dict()), torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8)
    expected = net(x, 3, text).sample
    assert (len(fold_upsampling(net).done), len(fold_upsampling(net).done)) == (1, 0)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    torch.testing.assert_close(net(x, 3, text).sample, expected)
    net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(copy.deepcopy(net)(x, 3, text).sample, expected)
    odd = torch.randn(1, 4, 9, 7)
    torch.testing.assert_close(net(odd, 3, text[:1]).sample, unet()(odd, 3, text[:1]).sample)


def test_what_is_trained_or_hooked_stays():
    net = unet().requires_grad_(True)
    assert len(fold_upsampling(net).done) == 0
    net.requires_grad_(False)
    net.up_blocks[0].upsamplers[0].conv.register_forward_hook(lambda *_: None)
    assert len(fold_upsampling(net).done) == 0
    assert type(net.up_blocks[0].upsamplers[0]) is Upsample2D


def test_every_upsampler_of_a_deeper_unet_is_folded_and_counted():
    net = UNet2DConditionModel(
        block_out_channels=(8, 8, 16), down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3,
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip
    net.requires_grad_(False).eval()
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    expected = net(x, 3, text).sample
    assert len(fold_upsampling(net).done) == 2
    assert sum(isinstance(module, PhaseUpsample2D) for module in net.modules()) == 2
    torch.testing.assert_close(net(x, 3, text).sample, expected)


def other(**changes):
    """A holder of an upsampler whose convolution differs from the plain one in one respect."""
    upsampler = Upsample2D(4, use_conv=changes.pop("use_conv", True), norm_type=changes.pop("norm_type", None))
    if changes:
        upsampler.conv = torch.nn.Conv2d(4, 4, **{"kernel_size": 3, "padding": 1, **changes})
    return torch.nn.Sequential(upsampler).requires_grad_(False)


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_size": 5, "padding": 2}, {"padding": 2}, {"stride": 2}, {"dilation": 2}, {"groups": 2},
        {"padding_mode": "reflect"}, {"use_conv": False}, {"norm_type": "ln_norm"},
    ],
    ids=str,
)  # fmt: skip
def test_upsamplers_of_another_kind_stay(changes):
    assert len(fold_upsampling(other(**changes)).done) == 0
    assert len(fold_upsampling(other()).done) == 1


def test_an_upsampler_with_any_hook_stays():
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        for part in (0, 1):
            net = other()
            getattr((net[0], net[0].conv)[part], register)(lambda *_: None)
            assert len(fold_upsampling(net).done) == 0


def test_folded_weights_keep_their_precision_and_the_modules_mode():
    net = other().to(torch.bfloat16).eval()
    fold_upsampling(net)
    assert net[0].phases.dtype == torch.bfloat16
    assert net[0].phases.shape == (16, 4, 2, 2)
    assert not net[0].training
    assert "phases" not in " ".join(net.state_dict())
