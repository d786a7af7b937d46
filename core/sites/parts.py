"""Choosing layers: by the names of parts that a family knows, such as down_blocks, or by regular expressions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..backbones.families import FAMILIES, Family, family_of_denoiser
from ..errors import DoesNotFit, UsageError
from .layers import Layer, layers

PARTS = {part for family in FAMILIES for part in family.parts}
"""Every family's parts. As an expression, a transformer's `blocks` would match a U-Net's down_blocks."""


def family_of(denoiser: nn.Module) -> Family:
    """The family of a denoiser. Raises `UsageError` for one that is not supported."""
    config: Any = denoiser.config
    return family_of_denoiser({**config, "_class_name": type(denoiser).__name__})


def chosen_layers(denoiser: nn.Module, names: Sequence[str] | None = None) -> list[Layer]:
    """The layers of the named parts, or whose names match one of the expressions, in the denoiser's order.

    None: those that the family adapts by default. Raises `DoesNotFit` for a name that chooses no layer, and for a part
    that only bases of another family have.
    """
    family = family_of(denoiser)
    chosen: set[Layer] = set()
    for name in family.adapted if names is None else names:
        if name in PARTS - family.parts.keys():
            raise DoesNotFit(f"layers={name}: this base has no such part; it has {', '.join(family.parts)}.")
        try:
            chosen.update(layers(denoiser, family.parts.get(name, name)))
        except UsageError as error:
            raise DoesNotFit(f"layers={name}: {error} Parts of this base: {', '.join(family.parts)}.") from error
    return [layer for layer in layers(denoiser) if layer in chosen]
