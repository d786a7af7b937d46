"""Which rank each layer gets: one share for all, one threshold for all, or what the user writes down."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..backbones.thin import Form
from ..errors import UsageError
from .factorising import as_matrix, root, sides, singular_values, whitened

TOLERANCE = 0.0005
"""How far below its budget a student may stay, as a share of it."""


def by_ratio(layers: Mapping[str, Any], ratio: float, form: Form = "flat") -> dict[str, int]:
    """r = floor(ratio P Q / (P + Q)), at least 1: every layer keeps that share of its weights.

    This single rule gives three of the paper's totals at 0.4225. A layer that would not get smaller is left out.
    Raises `UsageError` for a ratio that is not between 0 and 1.
    """
    if not 0 < ratio < 1:
        raise UsageError(f"ratio={ratio:g} is the share of the weights that is kept; give a number between 0 and 1.")
    ranks = {}
    for name, module in layers.items():
        p, q = sides(module, form)
        ranks[name] = max(1, int(ratio * p * q / (p + q)))
    return smaller(layers, ranks, form)


def by_energy(
    layers: Mapping[str, Any], budget: int, fixed: int, form: Form = "flat",
    moments: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Ranks that keep the most energy of all layers in `budget` parameters, `fixed` of which are not in the layers.

    A singular value s is kept where its share of its layer's energy, s^2 / sum s^2, is above a threshold per weight
    that it costs, P + Q; the threshold is found by bisection. Up to rounding that is the best choice for the sum of all
    layers' relative squared errors. They are the weights', or with `moments`, E[x x^T] of the inputs, the outputs'.
    What is left of the budget is filled up with the next ones. Shares, since the scales of layers say nothing of how
    much they matter: a norm may follow.
    Raises `UsageError` for a budget that is too small for rank 1, or that the base is within already.
    """
    dense = sum(module.weight.numel() for module in layers.values()) + fixed
    least = fixed + sum(min(module.weight.numel(), sum(sides(module, form))) for module in layers.values())
    if not least <= budget < dense:
        raise UsageError(
            f"a budget of {budget:,} parameters cannot be met: this base has {dense:,}, and with rank 1 in every "
            f"layer {least:,}."
        )
    spectra = {name: energies(module, form, moments[name] if moments else None) for name, module in layers.items()}

    def ranks_above(threshold: float) -> dict[str, int]:
        return {name: max(1, int((own > threshold).sum())) for name, own in spectra.items()}

    low, high = 0.0, max(own.max().item() for own in spectra.values())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if fixed + size(layers, ranks_above(middle), form) > budget else (low, middle)
    ranks = ranks_above(high)
    return smaller(layers, _filled(layers, ranks, spectra, budget - fixed, form), form)


def energies(module: Any, form: Form, moment: torch.Tensor | None = None) -> torch.Tensor:
    """s^2 / sum s^2 / (P + Q) of each singular value, in falling order: of W, or with E[x x^T] = L L^T of W L."""
    matrix = as_matrix(module.weight.detach(), form).double()
    squares = singular_values(matrix if moment is None else whitened(matrix, root(moment))).square()
    return squares / squares.sum().clamp(min=torch.finfo(torch.float64).tiny) / sum(sides(module, form))


def _filled(
    layers: Mapping[str, Any], ranks: dict[str, int], spectra: Mapping[str, torch.Tensor], budget: int, form: Form
) -> dict[str, int]:
    """More units, the strongest first, while they fit into the budget."""
    room = budget - size(layers, ranks, form)
    rest = sorted(
        ((value, name) for name, own in spectra.items() for value in own[ranks[name] :].tolist()[:64]), reverse=True
    )
    for _, name in rest:
        p, q = sides(layers[name], form)
        if (ranks[name] + 1) * (p + q) < p * q and p + q <= room:
            ranks[name] += 1
            room -= p + q
    return ranks


def by_map(layers: Mapping[str, Any], wanted: Mapping[str, int], form: Form = "flat") -> dict[str, int]:
    """The ranks that a user gives by layer name or regular expression; later ones override earlier ones.

    Raises `UsageError` for a name that matches no layer, and for a rank that is no saving.
    """
    ranks: dict[str, int] = {}
    for pattern, rank in wanted.items():
        try:
            names = [name for name in layers if name == pattern or re.fullmatch(pattern, name)]
        except re.error as error:
            raise UsageError(f"'{pattern}' is not a valid regular expression: {error}.") from error
        if not names:
            raise UsageError(f"'{pattern}' matches no layer that can be made low-rank.")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise UsageError(f"rank {rank!r} of '{pattern}' is not a whole number from 1 on.")
        ranks |= dict.fromkeys(names, rank)
    kept = smaller(layers, ranks, form)
    if large := sorted(ranks.keys() - kept.keys()):
        p, q = sides(layers[large[0]], form)
        raise UsageError(
            f"rank {ranks[large[0]]} of {large[0]} ({p} x {q}) saves nothing; give less than {p * q / (p + q):.0f}."
        )
    return kept


def smaller(layers: Mapping[str, Any], ranks: Mapping[str, int], form: Form = "flat") -> dict[str, int]:
    """The ranks of layers that get smaller by them: r (P + Q) < P Q, and less than a low-rank layer has already."""
    return {
        name: rank for name, rank in ranks.items() if rank * sum(sides(layers[name], form)) < own_size(layers[name])
    }


def own_size(module: Any) -> int:
    """The weights that a layer stores, without its bias."""
    return sum(parameter.numel() for name, parameter in module.named_parameters() if name != "bias")


def size(layers: Mapping[str, Any], ranks: Mapping[str, int], form: Form = "flat") -> int:
    """The weights of the layers, without biases, with these ranks; a layer without one keeps its own."""
    return sum(
        min(own_size(module), ranks[name] * sum(sides(module, form))) if name in ranks else own_size(module)
        for name, module in layers.items()
    )


def fixed_size(denoiser: nn.Module, layers: Mapping[str, Any]) -> int:
    """The parameters of the denoiser that are not weights of the layers."""
    return sum(p.numel() for p in denoiser.parameters()) - sum(own_size(module) for module in layers.values())
