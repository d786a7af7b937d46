"""DiffScaler's Affiner (arXiv 2404.09976, equation 5): y = (1 + a) W x + s W_up relu(W_down x) + b_hat + b.

The frozen layer gives y_0 = W x + b_hat, and the Affiner adds a (y_0 - b_hat) + s W_up relu(W_down x) + b. Training
keeps only h = relu(W_down x) and y for backward, not y_0; see `Lean`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..sites.layers import Layer

NEAR = 0.25
"""Below this, 1 + a is too small to divide by."""


def pointwise(x: Tensor, weight: Tensor, linear: bool, bias: Tensor | None = None) -> Tensor:
    """weight (m, d) on the channels of x, (..., d) of a linear layer or (B, d, h, w) of a convolution."""
    return F.linear(x, weight, bias) if linear else F.conv2d(x, weight[:, :, None, None], bias)


def along(vector: Tensor, linear: bool) -> Tensor:
    """A vector over channels, shaped to meet (..., m) or (B, m, h, w)."""
    return vector if linear else vector[:, None, None]


def by_channel(x: Tensor, linear: bool) -> Tensor:
    """(..., m) or (B, m, h, w) as (N, m)."""
    return (x if linear else x.movedim(1, -1)).flatten(0, -2)


# ---------------------------------------------------------------------------------------------------- the branch


def middle(site: Layer) -> tuple[int, int]:
    """Row and column, in a layer's input, of the middle of its first window: (0, 0) for the usual paddings."""
    if site.padding == "same":
        return 0, 0
    padding = (0, 0) if isinstance(site.padding, str) else site.padding
    top, left = ((k - 1) // 2 - p for k, p in zip(site.kernel, padding, strict=True))
    return top, left


class Branch(nn.Module):
    """h = relu(W_down x), and the gate s: what layers with the same input may share.

    For a convolution W_down is 1x1 with the layer's stride and reads the middle of the layer's window; where windows
    do not overlap (patches), it has the layer's kernel and reads all of it. At the input layer it also has columns for
    conditions: W_down [z; c] = W_down z + W_c c.
    """

    def __init__(self, site: Layer, dim: int, gate: bool, bias: bool, columns: dict[str, int]) -> None:
        super().__init__()
        patches = site.padding in ((0, 0), "valid") and site.kernel == site.stride
        self.linear, self.stride, self.first = site.linear, site.stride, (0, 0) if patches else middle(site)
        shape = () if site.linear else site.kernel if patches else (1, 1)
        self.down = nn.Parameter(nn.init.kaiming_normal_(torch.empty(dim, site.inputs, *shape)))
        self.columns = nn.ParameterDict(
            {name: nn.init.kaiming_normal_(torch.empty(dim, width, *shape)) for name, width in columns.items()}
        )
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.gate = nn.Parameter(torch.zeros(())) if gate else None

    def forward(self, x: Tensor, like: Tensor, given: Iterable[tuple[str, float, Tensor]] = ()) -> Tensor:
        """h for the layer's input x: (..., d), or (B, d, h, w) with the sides of `like`, the layer's output.

        `given` are the conditions' names, weights and features (B, C, H, W) on the grid of x.
        """
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.linear:
            return F.linear(x, self.down.to(x.dtype), bias).relu()
        z = self._reduced(x, self.down, bias)
        for name, weight, features in given:
            z = z + weight * self._reduced(features.to(x.dtype), self.columns[name])
        return z[..., : like.shape[-2], : like.shape[-1]].relu()

    def _reduced(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        top, left = self.first
        return F.conv2d(x[..., top:, left:], weight.to(x.dtype), bias, self.stride)


# --------------------------------------------------------------------------------------------------- the Affiner


class Affiner(nn.Module):
    """What one layer has of its own: a, b and W_up. What it has not is None."""

    def __init__(self, site: Layer, dim: int, scale: bool, shift: bool, gate: bool, bias: bool) -> None:
        super().__init__()
        width, self.linear = site.outputs, site.linear
        self.scale = nn.Parameter(torch.zeros(width)) if scale else None
        self.shift = nn.Parameter(torch.zeros(width)) if shift else None
        up = torch.zeros(width, dim)
        self.up = nn.Parameter(nn.init.kaiming_normal_(up) if gate else up) if dim else None
        self.bias = nn.Parameter(torch.zeros(width)) if dim and bias else None

    def forward(self, y: Tensor, h: Tensor | None, gate: Tensor | None, fixed: Tensor | None) -> Tensor | None:
        """What is added to the frozen layer's output y, whose own bias is `fixed` (b_hat); None for nothing."""
        return change(y, h, self.scale, self.up, gate, self.offset(gate), fixed, self.linear)

    def lean(
        self, y: Tensor, h: Tensor | None, gate: Tensor | None, layer: Any, x: Tensor, near: Tensor | None
    ) -> Tensor:
        """y plus what is added. `near` are the rows where 1 + a is too small to divide by; x is the layer's input."""
        inputs = (y, h, self.scale, self.up, gate, self.offset(gate), None if near is None else x)
        return Lean.apply(*inputs, layer, near, self.linear)

    def offset(self, gate: Tensor | None) -> Tensor | None:
        """All that is added whatever the input: b, and s times the bias of W_up."""
        if self.bias is None:
            return self.shift
        own = self.bias if gate is None else gate * self.bias
        return own if self.shift is None else own + self.shift


def gated(up: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """s W_up in the activations' dtype."""
    return (up if gate is None else gate * up).to(dtype)


def change(
    y: Tensor, h: Tensor | None, a: Tensor | None, up: Tensor | None, gate: Tensor | None, offset: Tensor | None,
    fixed: Tensor | None, linear: bool,
) -> Tensor | None:  # fmt: skip
    """a (y - b_hat) + s W_up h + offset; None where there is none of them."""
    shift, total = None if offset is None else offset.to(y.dtype), None
    if h is not None and up is not None:
        total = pointwise(h.to(y.dtype), gated(up, gate, y.dtype), linear, shift)
    elif shift is not None:
        total = along(shift, linear).expand_as(y)
    if a is None:
        return total
    scaled = along(a.to(y.dtype), linear) * (y if fixed is None else y - along(fixed.to(y.dtype), linear))
    return scaled if total is None else total + scaled


# ----------------------------------------------------------------------------------------------------- less memory


class Lean(torch.autograd.Function):
    """y = y_0 + `change`, keeping y and h for backward where autograd would keep y_0 - b_hat besides.

    With g the gradient of y and c = b_hat + offset, W x = (y - s W_up h - c) / (1 + a), so

        da = sum g W x = (sum g y - rowsum(s W_up * (g^T h)) - c sum g) / (1 + a).

    g^T h is needed for W_up anyway, and the layer that follows keeps y anyway. Where 1 + a is near zero, y does not
    determine W x; there W x is computed again from the layer's input.
    """

    @staticmethod
    def forward(ctx: Any, y, h, a, up, gate, offset, x, layer, near, linear):
        """As `Affiner.lean`; a method of autograd's, so its arguments are the tensors that may need gradients."""
        added = change(y, h, a, up, gate, offset, layer.bias, linear)
        out = y.clone() if added is None else y + added
        ctx.save_for_backward(None if a is None else out, h, a, up, gate, offset, x, near)
        ctx.layer, ctx.linear = layer, linear
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g):
        """Gradients of y, h, a, up, gate and offset."""
        out, h, a, up, gate, offset, x, near = ctx.saved_tensors
        wide, linear, bias = torch.promote_types(g.dtype, torch.float32), ctx.linear, ctx.layer.bias
        flat = by_channel(g, linear)
        sums = flat.sum(0, dtype=wide)
        dy, dh, da, dup, dgate = g, None, None, None, None
        branch = 0.0
        if h is not None:
            outer = (flat.mT @ by_channel(h.to(g.dtype), linear)).to(wide)  # g^T h, (m, d)
            dh = pointwise(g, gated(up, gate, g.dtype).mT, linear)
            each = (up * outer).sum(1)
            dup, branch = (outer, each) if gate is None else (gate * outer, gate * each)
            dgate = None if gate is None else each.sum()
        if a is not None:
            dy = torch.addcmul(g, along(a.to(g.dtype), linear), g)
            const = sum(part for part in (bias, offset) if part is not None)
            da = ((flat * by_channel(out, linear)).sum(0, dtype=wide) - branch - const * sums) / (1 + a)
            if near is not None:
                da[near] = (flat[:, near] * by_channel(again(ctx.layer, x, near), linear)).sum(0, dtype=wide)
        return dy, dh, da, dup, dgate, None if offset is None else sums, None, None, None, None


def again(layer: Any, x: Tensor, rows: Tensor) -> Tensor:
    """W x of some rows of a frozen linear or convolutional layer, without its bias."""
    weight, x = layer.weight[rows], x.to(layer.weight.dtype)
    return (
        F.linear(x, weight) if isinstance(layer, nn.Linear) else F.conv2d(x, weight, None, layer.stride, layer.padding)
    )
