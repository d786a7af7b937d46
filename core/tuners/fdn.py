"""How Uni-ControlNet brings maps into a network: features at every scale, and a norm whose scale and shift they make.

Zhao et al. 2023, arXiv 2305.16322, section 3.2, and the authors' code (ShihaoZhaoZSH/Uni-ControlNet), from which the
widths and strides are. ELR-Diffusion (eq. 8) uses the same, with its convolutions of low rank as an option.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from .scedit import conv

PRE = (32, 64, 64, 128, 128)
"""Widths of the extractor's first convolutions."""
LEVELS = (192, 256, 384, 512)
"""Widths of its features, a level each; further levels are WIDER wider each."""
WIDER = 128


class Conv(nn.Conv2d):
    """A convolution whose float32 weights follow its input's precision."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h', w')."""
        return conv(input, self)


class LowRankConv(nn.Module):
    """A k x k convolution to `rank` channels, then a 1x1: rank (C k k + C') numbers, and biases.

    It starts with the variance of one convolution's start, not of two in a row.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, rank: int) -> None:
        super().__init__()
        self.down = Conv(inputs, rank, kernel, stride, kernel // 2, bias=False)
        self.up = Conv(rank, outputs, 1)
        nn.init.normal_(self.down.weight, std=self.down.weight[0].numel() ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h', w')."""
        return self.up(self.down(x))


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, ratio: float | None = None, zero: bool = False
) -> nn.Module:
    """A convolution padded by half its kernel; with `ratio`, of the rank that keeps that share of its weights.

    r = floor(ratio P Q / (P + Q)) of the weight as a P x Q matrix (ELR-Diffusion's uniform rule, inferred from its
    printed counts); of full rank where that saves nothing. `zero`: it starts at zero.
    """
    rows, columns = outputs, inputs * kernel**2
    rank = max(1, math.floor((ratio or 1) * rows * columns / (rows + columns)))
    thin = ratio is not None and rank * (rows + columns) < rows * columns
    layer = (
        LowRankConv(inputs, outputs, kernel, stride, rank)
        if thin
        else Conv(inputs, outputs, kernel, stride, kernel // 2)
    )
    if zero:
        nn.init.zeros_(last(layer).weight)
        nn.init.zeros_(bias(layer))
    return layer


def last(layer: nn.Module) -> Conv:
    """The convolution that makes the layer's outputs."""
    layer = layer.up if isinstance(layer, LowRankConv) else layer
    assert isinstance(layer, Conv)
    return layer


def bias(layer: nn.Module) -> Tensor:
    """The bias of the layer's outputs."""
    found = last(layer).bias
    assert found is not None
    return found


def level_widths(levels: int, widen: float) -> list[int]:
    """Widths of the features at each of `levels` scales, `widen` times the published ones."""
    more = range(LEVELS[-1] + WIDER, LEVELS[-1] + WIDER * max(1, levels), WIDER)
    return [max(1, round(widen * width)) for width in (*LEVELS, *more)][:levels]


class Extractor(nn.Module):
    """Concatenated maps (B, 3 M, H, W) in 0..1 to features at every scale of a U-Net's encoder.

    Five convolutions, then one a level, with SiLU after each; a zero convolution leads off every level. The first level
    is on the latent's grid, H / f: for an autoencoder of factor f = 8 the second and fourth convolution and the first
    level halve, as published. Another factor drops the last of these strides or adds some elsewhere; `strides` are
    those between the levels. Raises `UsageError` for a factor that cannot be reached.
    """

    def __init__(
        self, channels: int, widths: Sequence[int], strides: Sequence[int], vae_scale: int, widen: float,
        ratio: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        halvings = round(math.log2(vae_scale))
        if 2**halvings != vae_scale or halvings > 6:
            raise UsageError(f"the autoencoder's factor is {vae_scale}; maps can be reduced by 1, 2, 4 … 64.")
        halving = (1, 3, 5, 0, 2, 4)[:halvings]
        pre = [channels, *(max(1, round(widen * width)) for width in PRE)]
        steps = [2 if place in halving else 1 for place in range(len(PRE) + 1)]
        self.pre = nn.ModuleList(
            convolution(a, b, 3, stride, ratio) for (a, b), stride in zip(pairwise(pre), steps[:-1], strict=True)
        )
        self.levels = nn.ModuleList(
            convolution(a, b, 3, stride, ratio)
            for (a, b), stride in zip(pairwise([pre[-1], *widths]), [steps[-1], *strides], strict=True)
        )
        self.zero = nn.ModuleList(convolution(width, width, 3, 1, ratio, zero=True) for width in widths)

    def forward(self, maps: Tensor) -> list[Tensor]:
        """Features of each level, (B, widths[i], h_i, w_i)."""
        for layer in self.pre:
            maps = F.silu(layer(maps))
        features = []
        for level, zero in zip(self.levels, self.zero, strict=True):
            maps = F.silu(level(maps))
            features.append(zero(maps))
        return features


class FDN(nn.Module):
    """Feature denormalization (eq. 8): norm(z) (1 + gamma(f)) + beta(f), in the place of a `GroupNorm` with f beside z.

    gamma and beta are 3x3 convolutions. The published start throws the norm's own scale and shift away; with
    `start="pretrained"` the biases hold them, so that without features it is that norm.
    """

    def __init__(self, norm: nn.GroupNorm, width: int, start: str = "pretrained", ratio: float | None = None) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.gamma = convolution(width, norm.num_channels, 3, 1, ratio)
        self.beta = convolution(width, norm.num_channels, 3, 1, ratio)
        if start == "pretrained":
            with torch.no_grad():
                bias(self.gamma).copy_(norm.weight.float() - 1 if norm.affine else torch.tensor(0.0))
                bias(self.beta).copy_(norm.bias if norm.affine else torch.tensor(0.0))

    features: Tensor | None = None
    """f (B, width, h, w) of the call under way. Set around each call, see `encoder_copy.injected`."""

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) to the same."""
        assert self.features is not None
        f = self.features[..., : z.shape[-2], : z.shape[-1]]  # unpadded downsamplers round odd sides down
        f = f.to(z.dtype)
        return F.group_norm(z, self.groups, eps=self.eps) * (1 + self.gamma(f)) + self.beta(f)
