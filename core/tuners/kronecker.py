"""Kronecker updates of weights: dW = sum_i A_i (x) (u_i v_i), applied without ever making dW (ELR-Diffusion, eq. 9)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DoesNotFit


class Kronecker(nn.Module):
    """The update of one `Linear` or `Conv2d` with weight (K, D): n terms of rank `rank`, n^3 + rank (K + D) numbers.

    A_i is (n, n), u_i (K / n, rank), v_i (rank, D / n). K and the layer's inputs are padded to multiples of n; a
    convolution's D is its padded inputs times the kernel's places. u starts at 0, so that dW does; v ~ N(0, 1 / D),
    A ~ N(0, 1) / n. Raises `DoesNotFit` for a grouped or dilated convolution, or one that is not padded with zeros.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, n: int, rank: int) -> None:
        super().__init__()
        self.n, self.rank = n, rank
        self.linear = isinstance(layer, nn.Linear)
        if not isinstance(layer, nn.Linear):
            if (layer.groups, layer.dilation, layer.padding_mode) != (1, (1, 1), "zeros"):
                raise DoesNotFit("a grouped or dilated convolution, or one not padded with zeros, has no update here.")
            self.stride, self.padding = layer.stride, layer.padding
        self.inputs, self.outputs, self.kernel = size(layer)
        rows, columns = math.ceil(self.outputs / n), math.ceil(self.inputs / n) * math.prod(self.kernel)
        self.A = nn.Parameter(torch.randn(n, n, n) / n)
        self.u = nn.Parameter(torch.zeros(n, rows, rank))
        self.v = nn.Parameter(torch.randn(n, rank, columns) * (n * columns) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """dW x for the layer's input x: (..., inputs) for a linear layer, (B, inputs, h, w) for a convolution."""
        return self._linear(x) if self.linear else self._conv(x)

    def _linear(self, x: Tensor) -> Tensor:
        """With x as n blocks x_j of D / n: block k of the output is sum_i u_i sum_j A_i[k, j] v_i x_j."""
        A, u, v = (weight.to(x.dtype) for weight in (self.A, self.u, self.v))
        x = F.pad(x, (0, -self.inputs % self.n)).unflatten(-1, (self.n, -1))
        h = F.linear(x, v.flatten(0, 1)).unflatten(-1, (self.n, self.rank))  # (..., j, i, r)
        h = torch.einsum("ikj,...jir->...kir", A.to(h.dtype), h).flatten(-2)
        return F.linear(h, u.movedim(0, 1).flatten(1)).flatten(-2)[..., : self.outputs]

    def _conv(self, x: Tensor) -> Tensor:
        """The same with v as a convolution of n groups; A and u are joined into a 1x1 of n * n * rank inputs.

        Groups read x where it is: cutting a channels-last x into blocks would copy it, and keep the copy for backward.
        """
        A, u, v = (weight.to(x.dtype) for weight in (self.A, self.u, self.v))
        if self.inputs % self.n:
            x = F.pad(x, (0, 0, 0, 0, 0, -self.inputs % self.n))
        filters = v.flatten(0, 1).unflatten(-1, (-1, *self.kernel)).repeat(self.n, 1, 1, 1)
        h = F.conv2d(x, filters, None, self.stride, self.padding, groups=self.n)  # (B, j i r, h, w)
        mix = torch.einsum("ikj,ipr->kpjir", A, u).flatten(0, 1).flatten(1)[: self.outputs]
        return F.conv2d(h, mix[..., None, None].to(h.dtype))

    def materialised(self) -> Tensor:
        """dW in the shape of the layer's weight: (K, D), or (K, inputs, *kernel) for a convolution."""
        whole = torch.einsum("ikj,ipr,irq->kpjq", self.A, self.u, self.v).flatten(0, 1)[: self.outputs]
        if self.linear:
            return whole.flatten(1)[:, : self.inputs]
        return whole.unflatten(-1, (-1, *self.kernel)).flatten(1, 2)[:, : self.inputs]

    def fits(self, layer: nn.Linear | nn.Conv2d) -> bool:
        """Whether the layer is of the kind and size that the update is for."""
        return self.linear == isinstance(layer, nn.Linear) and (self.inputs, self.outputs, self.kernel) == size(layer)


def size(layer: nn.Linear | nn.Conv2d) -> tuple[int, int, tuple[int, ...]]:
    """Inputs, outputs and kernel; (1, 1) for a linear layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, (1, 1)
    return layer.in_channels, layer.out_channels, layer.kernel_size
