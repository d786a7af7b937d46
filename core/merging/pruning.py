"""DiffScaler's branches within a budget of units (arXiv 2404.09976): those that matter most on calibration draws.

A branch adds U relu(D x); its layers may share D, and then their U count as one, stacked. Of its units h = relu(D x)
the R of largest |U_j| E[h_j] are kept, K, and what the dropped ones, O, added is fitted by them, by ridge regression:

    W = U_O E[h_O h_K^T] (E[h_K h_K^T] + l I)^-1,    U' = U_K + W,    l = RIDGE mean diag E[h_K h_K^T]

so that the penalty draws towards plain truncation, not towards nothing: on the draws the fit is never worse than just
leaving units out, and units that no draw has woken keep what they had. The moments are of the layers' inputs while the
base draws with the tuner, not of the batch on which the error of the output is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.loading import Backbone
from ..distilling.calibrating import answers
from ..distilling.factorising import RIDGE
from ..sites.attaching import tuned
from ..tuners.diffscaler import DiffScaler, key
from .affiners import groups_of, narrowed
from .measuring import random_hints

IMAGES, STEPS, SEED = 8, 8, 3
"""What is drawn for calibration."""


@dataclass(frozen=True)
class Moments:
    """Of a branch's units h (d,): E[h] (d,) and E[h h^T] (d, d), in float64."""

    mean: Tensor
    second: Tensor


@dataclass(frozen=True)
class Residual:
    """How far pruned branches are from whole ones on calibration draws: sqrt(E|U h - U' h_K|^2 / E|U h|^2) by layer.

    `mean` and `largest` are over the `layers` that lost units, `layer` is where it is largest. `truncated` is the mean
    without the fit. All are 0 where none lost any.
    """

    rank: int
    layers: int
    mean: float
    largest: float
    layer: str
    truncated: float

    def __str__(self) -> str:
        if not self.layers:
            return f"no layer has more than {self.rank} units: none were left out"
        return (
            f"{self.layers} layers cut to {self.rank} units: on calibration draws their branches are off by "
            f"{self.mean:.3g} of their size on average ({self.truncated:.3g} without the refit), at most by "
            f"{self.largest:.3g} in {self.layer}"
        )


def pruned(tuner: DiffScaler, backbone: Backbone, rank: int) -> tuple[DiffScaler, Residual]:
    """The tuner with at most `rank` units a branch, and what that costs; the tuner itself where none has more."""
    wide = [name for name, layers in groups_of(tuner).items() if tuner.dims[layers[0]] > rank]
    return fitted(tuner, backbone.denoiser, calibrated(tuner, backbone, wide) if wide else {}, rank)


def fitted(
    tuner: DiffScaler, denoiser: nn.Module, moments: Mapping[str, Moments], rank: int, ridge: float = RIDGE
) -> tuple[DiffScaler, Residual]:
    """`pruned` with the moments of every branch that has more than `rank` units, by its name. Gates must be in U."""
    kept: dict[str, list[int]] = {}
    ups: dict[str, Tensor] = {}
    off: dict[str, tuple[float, float]] = {}
    for shared, layers in groups_of(tuner).items():
        up = torch.cat([_up(tuner, name) for name in layers])
        if shared not in moments:
            kept[shared] = list(range(up.shape[1]))
            ups |= {name: tuner.affiners[key(name)].up.detach() for name in layers}
            continue
        own = moments[shared]
        chosen, rest = chosen_units(up, own.mean, rank)
        kept[shared] = chosen.tolist()
        for name in layers:
            whole = _up(tuner, name)
            change = whole[:, rest] @ refit(own.second, chosen, rest, ridge)
            ups[name] = whole[:, chosen] + change
            off[name] = _residuals(whole, chosen, rest, change, own.second)
    if not off:
        return tuner, Residual(rank, 0, 0.0, 0.0, "", 0.0)
    found = {name: pair[0] for name, pair in off.items()}
    worst = max(found, key=lambda name: found[name])
    truncated = sum(pair[1] for pair in off.values()) / len(off)
    residual = Residual(rank, len(off), sum(found.values()) / len(off), found[worst], worst, truncated)
    return narrowed(tuner, denoiser, kept, ups), residual


def chosen_units(up: Tensor, mean: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` units of largest |U_j| E[h_j], and the others, for U (m, d) and E[h] (d,); each in their order."""
    order = torch.argsort(up.norm(dim=0) * mean, descending=True, stable=True)
    return order[:rank].sort().values, order[rank:].sort().values


def refit(second: Tensor, chosen: Tensor, rest: Tensor, ridge: float = RIDGE) -> Tensor:
    """E[h_O h_K^T] (E[h_K h_K^T] + l I)^-1, (O, K): each dropped unit as a sum of those kept."""
    own = second[chosen][:, chosen]
    floor = ridge * own.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    own = own + floor * torch.eye(len(chosen), dtype=own.dtype)
    return torch.linalg.solve(own, second[chosen][:, rest]).mT


def _residuals(up: Tensor, chosen: Tensor, rest: Tensor, change: Tensor, second: Tensor) -> tuple[float, float]:
    """What is missing of a layer's U h (m, d), relative to its size: with `change` of the units kept, and without."""
    missing = torch.zeros_like(up)
    missing[:, rest] = up[:, rest]
    refitted = missing.clone()
    refitted[:, chosen] = -change

    def size(of: Tensor) -> float:
        return float(((of @ second) * of).sum().clamp(min=0).sqrt())

    whole = size(up)
    return (size(refitted) / whole, size(missing) / whole) if whole else (0.0, 0.0)


def _up(tuner: DiffScaler, name: str) -> Tensor:
    """W_up of a layer (m, d) in float64, on the CPU."""
    up: Any = tuner.affiners[key(name)].up
    return up.detach().double().cpu()


# ------------------------------------------------------------------------------------------------- calibration


def calibrated(tuner: DiffScaler, backbone: Backbone, shared: list[str]) -> dict[str, Moments]:
    """The moments of these branches while the base draws with the tuner; with random maps too, where it takes any."""
    generator = torch.Generator().manual_seed(SEED)

    def draw() -> None:
        with tuned(backbone.denoiser, tuner):
            for number, one in enumerate(answers(backbone, IMAGES, STEPS, SEED)):
                shown = random_hints(backbone, tuner.conditions, generator)[1:]
                if shown:
                    hints = shown[number % len(shown)]
                    backbone.family.predict(backbone.denoiser, one.noisy, one.t, one.rows, hints)

    return hidden_moments(tuner, shared, draw)


@torch.no_grad()
def hidden_moments(tuner: DiffScaler, shared: list[str], run: Callable[[], object]) -> dict[str, Moments]:
    """The moments of what these branches return during `run()`; of one that never ran they are 0."""
    sums: dict[str, tuple[Any, Any, int]] = {}

    def measured(name: str) -> Callable[..., None]:
        def hook(branch: Any, args: tuple, h: Tensor) -> None:
            flat = (h if branch.linear else h.movedim(1, -1)).flatten(0, -2)
            flat = flat.to(torch.promote_types(h.dtype, torch.float32))
            mean, second, count = sums[name]
            mean, second = mean + flat.sum(0).double().cpu(), second + (flat.mT @ flat).double().cpu()
            sums[name] = mean, second, count + len(flat)

        return hook

    for name in shared:
        wide = len(tuner.branches[key(name)].down)  # pyright: ignore[reportArgumentType]
        sums[name] = torch.zeros(wide, dtype=torch.float64), torch.zeros(wide, wide, dtype=torch.float64), 0
    handles = [tuner.branches[key(name)].register_forward_hook(measured(name)) for name in shared]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: Moments(mean / max(n, 1), second / max(n, 1)) for name, (mean, second, n) in sums.items()}
