"""Operations that keep less for backward than autograd does; values are the usual ones, bit for bit.

Autograd keeps the input of every convolution, also where the weight is frozen and its gradient, all that the input is
for, is never computed (pytorch issue 133566). It keeps the results of cheap operations that backward could repeat.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Pair = tuple[int, int]


def wanted(*tensors: Tensor | None) -> bool:
    """Whether backward will ask for a gradient of any of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def as_autocast(*tensors: Tensor | None) -> list[Any]:
    """The tensors as autocast gives them to a convolution: in its precision where it is on."""
    kind = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None or not t.is_floating_point() else t.to(dtype) for t in tensors]


# -------------------------------------------------------------------------------------------------- convolutions


class FrozenConv2d(torch.autograd.Function):
    """A convolution whose weight is frozen: backward needs the weight alone, dx = W^T g (and db = sum g)."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, stride, padding, dilation, groups):
        """As `F.conv2d`; a method of autograd's, so its arguments are the tensors that may need gradients."""
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.sides = (stride, padding, dilation, groups), x.shape[-2:]
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g):
        """Gradients of x and the bias."""
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        dx = None
        if ctx.needs_input_grad[0]:
            rest = tuple(
                side - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
                for side, out, s, p, d, k in zip(
                    ctx.sides, g.shape[-2:], stride, padding, dilation, weight.shape[-2:], strict=True
                )
            )
            dx = F.conv_transpose2d(g, weight, None, stride, padding, rest, groups, dilation)
        return dx, None, g.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None, None, None, None


def frozen_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair = (1, 1), padding: Pair = (0, 0),
    dilation: Pair = (1, 1), groups: int = 1,
) -> Tensor:  # fmt: skip
    """`F.conv2d` of x (B, I, h, w) that keeps no activation. The weight (O, I / groups, k, k) gets no gradient."""
    if not wanted(x, bias):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return FrozenConv2d.apply(*as_autocast(x, weight, bias), stride, padding, dilation, groups)


# -------------------------------------------------------------------------------------------- norm and activations


class FrozenNormSiLU(torch.autograd.Function):
    """silu(group_norm(x)) with frozen weights, of which x alone is kept."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, groups, eps):
        """As `norm_silu`."""
        out = F.silu(F.group_norm(x, groups, weight, bias, eps))
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps, ctx.dtype = groups, eps, out.dtype  # under autocast a norm may be float32
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g):
        """The gradient of x, from the norm's value made again."""
        x, weight, bias = ctx.saved_tensors
        dtype = x.dtype
        x, weight, bias = (t if t.dtype == ctx.dtype else t.to(ctx.dtype) for t in (x, weight, bias))
        layout = channels_last(x)
        x = x.contiguous(memory_format=layout)
        shape = (x.shape[0], x.shape[1], x[0, 0].numel(), ctx.groups)
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *shape, ctx.eps)
        g = torch.ops.aten.silu_backward(g, y).contiguous(memory_format=layout)
        dx = torch.ops.aten.native_group_norm_backward(g, x, mean, rstd, weight, *shape, [True, False, False])[0]
        return dx.to(dtype), None, None, None, None


def channels_last(x: Tensor) -> torch.memory_format:
    """The layout in which the norm's kernels take x (B, C, h, w): on a CPU its own, elsewhere the plain one."""
    own = x.device.type == "cpu" and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if own else torch.contiguous_format


def norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(group_norm(x)) of x (B, C, h, w), weights frozen."""
    if not wanted(x):
        return F.silu(F.group_norm(x, groups, weight, bias, eps))
    return FrozenNormSiLU.apply(x, weight, bias, groups, eps)


class GatedGELU(torch.autograd.Function):
    """GEGLU (Shazeer 2020, arXiv 2002.05202): u gelu(v) of (u, v), of which these alone are kept."""

    @staticmethod
    def forward(ctx: Any, both):
        """As `gated_gelu`."""
        ctx.save_for_backward(both)
        value, gate = both.chunk(2, -1)
        return value * F.gelu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g):
        """The gradients of u and v, side by side."""
        (both,) = ctx.saved_tensors
        value, gate = both.chunk(2, -1)
        return torch.cat([g * F.gelu(gate), torch.ops.aten.gelu_backward(g * value, gate)], -1)


def gated_gelu(both: Tensor) -> Tensor:
    """u gelu(v) of (..., 2 d), u and v being its halves."""
    if not wanted(both):
        value, gate = both.chunk(2, -1)
        return value * F.gelu(gate)
    return GatedGELU.apply(both)


class GELUConv2d(torch.autograd.Function):
    """A trained convolution of gelu(z), of which z alone is kept."""

    @staticmethod
    def forward(ctx: Any, z, weight, bias, padding):
        """As `gelu_conv2d`."""
        ctx.save_for_backward(z, weight)
        ctx.padding, ctx.biased = padding, bias is not None
        return F.conv2d(F.gelu(z), weight, bias, 1, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g):
        """Gradients of z, weight and bias."""
        z, weight = ctx.saved_tensors
        sizes = [weight.shape[0]] if ctx.biased else None
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.biased]
        dh, dw, db = torch.ops.aten.convolution_backward(
            g, F.gelu(z), weight, sizes, [1, 1], list(ctx.padding), [1, 1], False, [0, 0], 1, mask
        )
        return None if dh is None else torch.ops.aten.gelu_backward(dh, z), dw, db, None


def gelu_conv2d(z: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair = (0, 0)) -> Tensor:
    """A convolution with weight (O, I, k, k), stride 1, of gelu(z), z (B, I, h, w)."""
    if not wanted(z, weight, bias):
        return F.conv2d(F.gelu(z), weight, bias, 1, padding)
    z, weight, bias = as_autocast(z, weight, bias)
    return GELUConv2d.apply(z, weight, bias, padding)
