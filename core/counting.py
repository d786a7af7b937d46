"""Exact numbers of trainable parameters, counted on the meta device: no weights are loaded or made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .backbones.architectures import Architecture
from .tuners import method_config, tuner_class

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Variant:
    """A method with settings, as it is counted. `conditions` is how many condition maps it is controlled by."""

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    conditions: int = 0


VARIANTS = (
    Variant("full fine-tuning", "full"),
    Variant("SC-Tuner", "scedit"),
    Variant("SC-Tuner, ratio 1/5", "scedit", {"ratio": 0.2}),
    Variant("SC-Tuner, ratio 1/10", "scedit", {"ratio": 0.1}),
    Variant("SC-Tuner, skips 0,11", "scedit", {"skips": [0, 11]}),
    Variant("SC-Tuner, skips 0,3,6,9,11", "scedit", {"skips": [0, 3, 6, 9, 11]}),
    Variant("SC-Tuner, conv", "scedit", {"operator": "conv"}),
    Variant("SC-Tuner, ResPrefix", "scedit", {"operator": "resprefix"}),
    Variant("CSC-Tuner, kernel 1", "scedit", {"kernel": 1}, 1),
    Variant("CSC-Tuner, kernel 3", "scedit", {"kernel": 3}, 1),
    Variant("CSC-Tuner, skips 0,3,4,6,7,9,11", "scedit", {"skips": [0, 3, 4, 6, 7, 9, 11]}, 1),
    Variant("CSC-Tuner, dual conv", "scedit", {"dual": True}, 1),
    Variant("CSC-Tuner, zero heads", "scedit", {"cascade": "zero-heads"}, 1),
    Variant("CSC-Tuner, 2 conditions", "scedit", {}, 2),
)  # the settings of SCEdit's tables 1, 2, 5 and 6, and our heads


@dataclass(frozen=True)
class Count:
    """A variant's trainable parameters, and their share of the base's denoiser in percent."""

    variant: Variant
    trainable: int
    percent: float


def parameters(module: nn.Module) -> int:
    """The number of parameters, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count(base: Architecture, variant: Variant, denoiser: nn.Module | None = None) -> int:
    """The trainable parameters of `variant` on `base`. `denoiser` spares building the base's U-Net again."""
    denoiser = denoiser if denoiser is not None else base.denoiser()
    conditions = tuple(f"condition{number}" for number in range(variant.conditions))
    config = method_config(variant.method, variant.settings)
    return parameters(tuner_class(variant.method).build(config, denoiser, conditions, base.vae_scale))


def counts(base: Architecture) -> list[Count]:
    """All variants that exist on `base`: one that edits a skip which the base does not have is left out."""
    from .sites.wiring import skips

    denoiser = base.denoiser()
    total, last = parameters(denoiser), len(skips(denoiser)) - 1
    fitting = [variant for variant in VARIANTS if max(variant.settings.get("skips", [0])) <= last]
    rows = [(variant, count(base, variant, denoiser)) for variant in fitting]
    return [Count(variant, trainable, 100 * trainable / total) for variant, trainable in rows]
