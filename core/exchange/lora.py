"""LoRA and DoRA between formats: the factors of every layer, whatever the file calls them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UsageError
from ..sites.layers import find_module
from ..sites.parts import family_of
from ..tuners.peft_layers import ADAPTER, DoRA, LoRA
from .foreign import Reading


@dataclass
class Factors:
    """One layer's update alpha / r B A, with A (r, n, ...) and B (m, r, ...), and DoRA's magnitude (m,).

    alpha is r where a file gives none.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    alpha: float | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        assert self.a is not None
        return len(self.a)


Layers = dict[str, Factors]
"""By the layers' names in diffusers."""


def factors_of(tuner: LoRA) -> Layers:
    """The factors of a tuner's layers, float32 on the CPU."""
    found: Layers = {}
    for site, layer in tuner.adapted.items():
        a, b = (part[ADAPTER].weight.detach().float().cpu() for part in (layer.lora_A, layer.lora_B))
        magnitude = None
        if isinstance(tuner, DoRA):
            magnitude = layer.lora_magnitude_vector[ADAPTER].weight.detach().float().cpu().flatten()
        found[site.name] = Factors(a, b, layer.scaling[ADAPTER] * len(a), magnitude)
    return found


def reading(layers: Layers, used: Mapping[str, str], denoiser: nn.Module, what: str) -> Reading:
    """The tuner of these factors. `used` as in `Reading`; `what` the file is, for messages.

    Raises `UsageError` for a layer without both factors, for one whose shapes are not the denoiser's, and for a file
    in which some layers have a magnitude and others have none.
    """
    check(layers, denoiser, what)
    state: dict[str, Tensor] = {}
    for name, own in layers.items():
        module: Any = find_module(denoiser, name)
        kernel = (1, 1) if isinstance(module, nn.Conv2d) else ()
        assert own.a is not None
        assert own.b is not None
        first = (own.rank, *module.weight.shape[1:])
        state[f"{name}.lora_A.{ADAPTER}.weight"] = own.a.reshape(first)
        state[f"{name}.lora_B.{ADAPTER}.weight"] = own.b.reshape(module.weight.shape[0], own.rank, *kernel)
        if own.magnitude is not None:
            shape = (1, -1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,)
            state[f"{name}.lora_magnitude_vector.{ADAPTER}.weight"] = own.magnitude.reshape(shape)
    method = "dora" if all(own.magnitude is not None for own in layers.values()) else "lora"
    return Reading(method, settings(layers, denoiser), (), state, used)


def check(layers: Layers, denoiser: nn.Module, what: str) -> None:
    """Raises `UsageError` as `reading`."""
    if not layers:
        raise UsageError(f"{what} has no layer of a denoiser.")
    if len({own.magnitude is None for own in layers.values()}) == 2:
        raise UsageError(f"{what} has magnitudes of DoRA for some layers only; no tuner here is half of each.")
    modules = dict(denoiser.named_modules())
    for name, own in layers.items():
        module: Any = modules.get(name)
        if own.a is None or own.b is None:
            raise UsageError(f"{what}: {name} has one factor of two; the file is not complete.")
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise UsageError(f"{what} adapts {name}, which is no layer of this base; give the base that it is for.")
        outputs, inputs = module.weight.shape[0], math.prod(module.weight.shape[1:])
        theirs = own.b.numel() // own.rank, own.a.numel() // own.rank
        if theirs != (outputs, inputs) or own.b.numel() % own.rank or own.b.shape[1] != own.rank:
            raise UsageError(
                f"{what}: {name} is for {theirs[1]} inputs and {theirs[0]} outputs, this base's has {inputs} and "
                f"{outputs}; give the base that it is for."
            )


def settings(layers: Layers, denoiser: nn.Module) -> dict[str, Any]:
    """The method's settings: the commonest rank and alpha, and those of the layers that have others."""
    ranks = {name: own.rank for name, own in layers.items()}
    alphas = {name: float(own.rank if own.alpha is None else own.alpha) for name, own in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    if all(alphas[name] == ranks[name] for name in layers):
        scaling: dict[str, Any] = {}  # alpha is the rank, whatever that is
    else:
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        scaling = {"alpha": alpha, "alphas": {name: own for name, own in alphas.items() if own != alpha}}
    return {
        "rank": rank,
        "ranks": {name: own for name, own in ranks.items() if own != rank},
        "layers": choice(layers, denoiser),
        **scaling,
    }


def choice(names: Mapping[str, Any], denoiser: nn.Module) -> tuple[str, ...]:
    """What chooses these layers of a denoiser: a part of it where there is one, else their names as one expression."""
    every = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for part, pattern in family_of(denoiser).parts.items():
        if {name for name in every if re.search(pattern, name)} == names.keys():
            return (part,)
    return (f"^({'|'.join(re.escape(name) for name in sorted(names))})$",)
