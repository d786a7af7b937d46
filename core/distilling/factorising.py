"""The factors that a low-rank layer starts with, from its teacher's weight W (ELR-Diffusion, eq. 2).

With W = U S V^T cut at rank r: "paper" is up = U S, down = V^T; "balanced" puts a root of S on both, so that both learn
at one rate. "whitened" minimises the error of the layer's output instead of the weight's: with E[x x^T] = L L^T over
calibration inputs, W L = U S V^T is cut, and down = V^T L^-1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..backbones.thin import Form, divisible, replace, thin

Start = Literal["balanced", "paper", "whitened"]
RIDGE = 1e-4
"""Added to E[x x^T], as a share of its mean diagonal: directions that calibration never saw stay finite."""


def as_matrix(weight: Tensor, form: Form = "flat") -> Tensor:
    """A weight as the matrix that is factorised, outputs by inputs.

    (m, n) as it is; (m, n, k, k) flat as (m, n k k), spatial as (m k, n k) with the horizontal taps among the outputs.
    """
    if weight.dim() == 2:
        return weight
    if form == "flat":
        return weight.flatten(1)
    return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def sides(module: Any, form: Form = "flat") -> tuple[int, int]:
    """P and Q, the rows and columns of a layer's matrix: rank r costs r (P + Q) weights instead of P Q."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    high, wide = module.kernel_size
    if form == "flat":
        return module.out_channels, module.in_channels * high * wide
    return module.out_channels * wide, module.in_channels * high


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (P, k), S (k,) in falling order and V^T (k, Q) of a matrix (P, Q), k = min(P, Q).

    By way of the small triangular factor: of a convolution's 1280 x 11520 a quarter of LAPACK's time, equally exact.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = svd(matrix.mT)
        return left.mT, values, right.mT
    basis, triangle = torch.linalg.qr(matrix.mT)  # matrix = triangle^T basis^T
    left, values, right = torch.linalg.svd(triangle.mT)
    return left, values, right @ basis.mT


def singular_values(matrix: Tensor) -> Tensor:
    """S of `svd` alone, (k,)."""
    narrow = matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix
    return torch.linalg.svdvals(torch.linalg.qr(narrow, mode="r").R)


def factors(matrix: Tensor, rank: int, start: Start = "balanced", lower: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """up (P, r) and down (r, Q) for a matrix (P, Q), in float64. `lower` is L (n, n), for "whitened"."""
    wide = matrix.double()
    left, values, right = svd(wide if lower is None else whitened(wide, lower))
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    if lower is not None:
        right = unwhitened(right, lower)
    if start == "paper":
        return left * values, right
    # with L, the rows of `right` are no longer of length 1: both factors are given the same length
    lengths = right.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    share = (values / lengths).sqrt()
    return left * (values / share), right * share[:, None]


def factorised(
    module: Any, rank: int, form: Form = "flat", start: Start = "balanced", moment: Tensor | None = None
) -> Any:
    """The low-rank layer that approximates `module`. `moment` is E[x x^T] over its input channels, for "whitened"."""
    own = thin(module, rank, form)
    if own.down.is_meta:
        return own
    with torch.no_grad():
        matrix = as_matrix(module.weight, form)
        up, down = factors(matrix, rank, start, None if moment is None else root(moment))
        own.down.copy_(down.view(own.down.shape))
        if isinstance(module, nn.Linear) or form == "flat":
            own.up.copy_(up.view(own.up.shape))
        else:
            own.up[:, :, 0].copy_(up.view(module.out_channels, module.kernel_size[1], rank).transpose(1, 2))
        if module.bias is not None:
            own.bias.copy_(module.bias)
    return own


def root(moment: Tensor) -> Tensor:
    """L with L L^T = E[x x^T] (n, n), lower triangular, float64."""
    moment = moment.double()
    floor = RIDGE * moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.cholesky(moment + floor * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))


def whitened(matrix: Tensor, lower: Tensor) -> Tensor:
    """W L for a matrix (P, n taps) whose columns go over channels, then taps: the taps of a channel are alike."""
    by_tap = matrix.unflatten(1, (len(lower), -1)).mT
    return (by_tap @ lower).mT.flatten(1)


def unwhitened(matrix: Tensor, lower: Tensor) -> Tensor:
    """V L^-1, undoing `whitened`."""
    by_tap = matrix.unflatten(1, (len(lower), -1)).mT
    solved = torch.linalg.solve_triangular(lower, by_tap.flatten(0, 1), upper=False, left=False)
    return solved.view(by_tap.shape).mT.flatten(1)


def decompose(
    denoiser: nn.Module, ranks: Mapping[str, int], form: Form = "flat", start: Start = "balanced",
    moments: Mapping[str, Tensor] | None = None,
) -> nn.Module:  # fmt: skip
    """The denoiser with low-rank layers of these ranks, in place. "whitened" needs `moments` of their inputs."""
    modules = {name: denoiser.get_submodule(name) for name in ranks}
    replace(
        denoiser,
        {
            name: factorised(module, ranks[name], form, start, moments[name] if moments else None)
            for name, module in modules.items()
        },
    )
    return denoiser


def input_moments(denoiser: nn.Module, names: Iterable[str], run: Callable[[], object]) -> dict[str, Tensor]:
    """E[x x^T] (n, n) over the inputs x (n,) that layers are given during `run()`, in float64, on the CPU.

    Of a convolution x is the channels of one place: its taps are taken to be alike and not correlated.
    """
    sums: dict[str, tuple[Tensor, int]] = {}

    def measured(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            flat = (x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x).flatten(0, -2).float()
            seen, count = sums.get(name, (0, 0))
            sums[name] = seen + (flat.mT @ flat).double().cpu(), count + len(flat)

        return hook

    handles = [denoiser.get_submodule(name).register_forward_pre_hook(measured(name)) for name in names]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / count for name, (total, count) in sums.items()}


def layers_to_divide(denoiser: nn.Module, keep: Iterable[str] = ()) -> dict[str, Any]:
    """The linear and convolutional layers that may become low-rank, by name; those whose names begin with `keep` stay.

    The first and last layers of the denoiser stay too: they are small, and their widths are the latents'.
    """
    first_and_last = ("conv_in", "conv_out", "pos_embed.proj", "proj_out_2")
    return {
        name: module
        for name, module in denoiser.named_modules()
        if divisible(module) and name not in first_and_last and not name.startswith(tuple(keep) or ("\0",))
    }
