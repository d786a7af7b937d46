"""Choosing layers: by the names of parts that a family knows, such as down_blocks, or by regular expressions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..backbones.families import Family, family_of_denoiser
from ..errors import DoesNotFit, UsageError
from .layers import Layer, layers


def family_of(denoiser: nn.Module) -> Family:
    """The family of a denoiser. Raises `UsageError` for one that is not supported."""
    config: Any = denoiser.config
    return family_of_denoiser({**config, "_class_name": type(denoiser).__name__})


def chosen_layers(denoiser: nn.Module, names: Sequence[str] | None = None) -> list[Layer]:
    """The layers of the named parts, or whose names match one of the expressions, in the denoiser's order.

    None: those that the family adapts by default. Raises `DoesNotFit` for a name that chooses no layer.
    """
    family = family_of(denoiser)
    chosen: set[Layer] = set()
    for name in family.adapted if names is None else names:
        try:
            chosen.update(layers(denoiser, family.parts.get(name, name)))
        except UsageError as error:
            raise DoesNotFit(f"layers={name}: {error} Parts of this base: {', '.join(family.parts)}.") from error
    return [layer for layer in layers(denoiser) if layer in chosen]
