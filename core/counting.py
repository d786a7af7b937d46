"""Exact numbers of trainable parameters, counted on the meta device: no weights are loaded or made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .backbones.architectures import Architecture
from .errors import DoesNotFit
from .tuners import TUNERS, Variant, method_config, tuner_class

if TYPE_CHECKING:
    from torch import nn

    from .tuners.base import Tuner


@dataclass(frozen=True)
class Count:
    """A variant's trainable parameters, their share of the base's denoiser in percent, and what else there is.

    `stored` are the numbers in its file, `total` those of denoiser and tuner together.
    """

    method: str
    variant: Variant
    trainable: int
    percent: float
    stored: int
    total: int


def parameters(module: nn.Module) -> int:
    """The number of parameters, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count(base: Architecture, method: str, variant: Variant, denoiser: nn.Module | None = None) -> int:
    """The trainable parameters of a method's `variant` on `base`. `denoiser` spares building the base's again.

    Raises `DoesNotFit` where the base does not allow the variant.
    """
    return parameters(_built(base, method, variant, denoiser if denoiser is not None else base.denoiser()))


def _built(base: Architecture, method: str, variant: Variant, denoiser: nn.Module) -> Tuner:
    """The variant on the meta device."""
    conditions = tuple(f"condition{number}" for number in range(variant.conditions))
    config = method_config(method, variant.settings)
    return tuner_class(method).build(config, denoiser, conditions, base.vae_scale)


def class_row(base: Architecture) -> int:
    """What a class that the base does not know adds to a tuner; 0 for bases that are conditioned on text."""
    from .sites.inputs import class_tables

    return sum(table.width for table in class_tables(base.denoiser())) if base.family.by_class else 0


def counts(base: Architecture) -> list[Count]:
    """The variants of all methods on `base`; one that edits a site which the base does not have is left out."""
    denoiser = base.denoiser()
    total, rows = parameters(denoiser), []
    for method, row in TUNERS.items():
        for variant in row.variants:
            try:
                tuner = _built(base, method, variant, denoiser)
            except DoesNotFit:
                continue
            own, stored = parameters(tuner), sum(value.numel() for value in tuner.state_dict().values())
            rows.append(Count(method, variant, own, 100 * own / total, stored, total + own - tuner.replaced()))
    return rows
