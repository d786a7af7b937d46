"""Operations that keep less: values bit for bit, gradients as autograd's, and what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sctool.core.lean.functions import frozen_conv2d, gated_gelu, gelu_conv2d, norm_silu
from sctool.core.measure import saved_bytes

GEOMETRY = [
    {}, {"padding": (1, 1)}, {"stride": (2, 2), "padding": (1, 1)}, {"stride": (2, 1), "padding": (0, 2)},
    {"dilation": (2, 2), "padding": (2, 2)}, {"groups": 2, "padding": (1, 1)}, {"stride": (3, 2), "dilation": (1, 2)},
]  # fmt: skip


def gradients(out, *inputs):
    torch.manual_seed(9)
    return torch.autograd.grad(out, inputs, torch.randn(out.shape).to(out.dtype))


def same(found, expected, dtype):
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 3e-6, "atol": 3e-6}
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("options", GEOMETRY, ids=str)
def test_a_frozen_convolution(options, last, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 8, dtype=dtype)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    weight = torch.randn(6, 4 // options.get("groups", 1), 3, 3, dtype=dtype)
    bias = torch.randn(6, dtype=dtype, requires_grad=True)
    expected, found = F.conv2d(x, weight, bias, **options), frozen_conv2d(x, weight, bias, **options)
    assert torch.equal(found, expected)
    for one, other in zip(gradients(found, x, bias), gradients(expected, x, bias), strict=True):
        same(one, other, dtype)
    assert saved_bytes(nn.Identity(), lambda: frozen_conv2d(x, weight, bias, **options)) == weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [False, True])
def test_a_norm_with_its_activation(last, dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 8, 5, 6, dtype=dtype)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    norm = nn.GroupNorm(4, 8, eps=1e-5).to(dtype).requires_grad_(False)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    expected, found = F.silu(norm(x)), norm_silu(x, 4, norm.weight, norm.bias, 1e-5)
    assert torch.equal(found, expected)
    same(*gradients(found, x), *gradients(expected, x), dtype)
    assert saved_bytes(norm, lambda: norm_silu(x, 4, norm.weight, norm.bias, 1e-5)) == x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gate(dtype):
    torch.manual_seed(0)
    both = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    value, gate = both.chunk(2, -1)
    expected, found = value * F.gelu(gate), gated_gelu(both)
    assert torch.equal(found, expected)
    same(*gradients(found, both), *gradients(expected, both), dtype)
    assert saved_bytes(nn.Identity(), lambda: gated_gelu(both)) == both.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kernel", "bias"), [(1, True), (3, True), (1, False)])
def test_a_trained_convolution_after_gelu(kernel, bias, dtype):
    torch.manual_seed(0)
    z = torch.randn(2, 4, 5, 6, dtype=dtype, requires_grad=True)
    conv = nn.Conv2d(4, 3, kernel, padding=kernel // 2, bias=bias).to(dtype)
    expected, found = conv(F.gelu(z)), gelu_conv2d(z, conv.weight, conv.bias, (kernel // 2,) * 2)
    assert torch.equal(found, expected)
    inputs = (z, *conv.parameters())
    for one, other in zip(gradients(found, *inputs), gradients(expected, *inputs), strict=True):
        same(one, other, dtype)
    assert saved_bytes(conv, lambda: gelu_conv2d(z, conv.weight, conv.bias, (kernel // 2,) * 2)) == z.nbytes


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, dtype=torch.double) for shape in ((1, 4, 4, 4), (4, 4, 3, 3), (4,)))
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: frozen_conv2d(x, weight, bias, (2, 2), (1, 1)), x)
    assert torch.autograd.gradcheck(lambda x: norm_silu(x, 2, bias, bias, 1e-5), x)
    assert torch.autograd.gradcheck(gated_gelu, x)
    weight.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: gelu_conv2d(*given, (1, 1)), (x, weight, bias))


def test_nothing_is_recorded_without_a_gradient():
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 1, 1)
    with torch.no_grad():
        asked = x.clone().requires_grad_()
        assert frozen_conv2d(asked, weight, None).grad_fn is None
    assert frozen_conv2d(x, weight, None).grad_fn is None
    assert norm_silu(x, 1, torch.ones(2), torch.ones(2), 1e-5).grad_fn is None
    assert gated_gelu(x).grad_fn is None


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_under_autocast_precisions_are_autograds(precision):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(6, 4, 3, 3)
    norm = nn.GroupNorm(2, 4).requires_grad_(False)
    with torch.autocast("cpu", precision):
        pairs = [
            (frozen_conv2d(x, weight, None), F.conv2d(x, weight)),
            (norm_silu(x, 2, norm.weight, norm.bias, 1e-5), F.silu(norm(x))),
            (gelu_conv2d(x, weight, None), F.conv2d(F.gelu(x), weight)),
        ]
    for found, expected in pairs:
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        torch.testing.assert_close(gradients(found, x), gradients(expected, x), rtol=0.02, atol=0.02)
