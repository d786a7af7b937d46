"""Tuner files in, one tuner or base out: loading, the rule, the measured error, and what the result was made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..backbones.loading import Backbone
from ..backbones.saving import save_base
from ..checkpoint import load_tuner, save_tuner
from ..chosen import Chosen
from ..errors import SctoolError, UsageError
from ..files import sha256
from ..tuners.base import Tuner
from .folding import folded
from .measuring import MergeError, compare, fixed_batch, outputs
from .pruning import Residual
from .table import check_methods, check_options, find_rule, merged

NO_RULE = "none"
"""Of a single tuner at its own strength."""
EXACT = 1e-4
"""The largest difference that rounding in float32 explains, of outputs whose values are of the size of 1."""


@dataclass(frozen=True)
class Merged:
    """What a merge gave: the tuner, or the base that holds it, and how far it is from the tuners side by side.

    `error` is None where they cannot act side by side: then the rule is the definition.
    """

    tuner: Tuner
    rule: str
    exact: bool
    error: MergeError | None
    sources: list[dict[str, Any]]
    maps: dict[str, Any]
    residual: Residual | None = None
    """Of a rule that leaves units out: how far the branches are off."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rule": self.rule,
            "exact": self.exact,
            "error": asdict(self.error) if self.error else None,
            **({"residual": asdict(self.residual)} if self.residual else {}),
            "of": self.sources,
        }


def load(files: Sequence[Chosen], backbone: Backbone, force: bool = False) -> list[Tuner]:
    """The tuners. Raises `SctoolError` for one of another base, unless `force`, or with values that are not finite."""
    tuners = []
    for one in files:
        if not math.isfinite(one.scale):
            raise UsageError(f"the weight of {one.name} is {one.scale}; give a finite number.")
        tuner = load_tuner(one.file, backbone, force)
        for name, value in tuner.state_dict().items():
            if not torch.isfinite(value).all():
                raise SctoolError(f"tuner '{one.file}' has values that are not finite, in {name}; it cannot be merged.")
        tuners.append(tuner)
    return tuners


def merge(
    files: Sequence[Chosen], backbone: Backbone, rule: str | None = None, *, max_error: float | None = None,
    force: bool = False, **options: Any,
) -> Merged:  # fmt: skip
    """One tuner of several, each with its scale as its weight; of a single one, the same with another strength.

    max_error: the largest difference of the denoiser's output that is allowed; `EXACT` when not given for an exact
    rule, and any for others. options: `rank` and `density` of the rules that take them.
    Raises `UsageError` for tuners that cannot be merged, and `SctoolError` for a difference above `max_error`.
    """
    rank = options.get("rank")
    if alone(files, rule, rank):
        [tuner] = load(files, backbone, force)
        return Merged(tuner, NO_RULE, True, None, sources(files), maps_of(files))
    method = check_methods([one.meta["method"] for one in files])
    name, chosen = find_rule(method, rule, rank)
    tuners, weights = load(files, backbone, force), [one.scale for one in files]
    tuner = merged(tuners, weights, backbone.denoiser, chosen, **options)
    tuner.use(backbone)
    residual = error = None
    if chosen.shrink:
        tuner, residual = chosen.shrink(tuner, backbone, check_options(chosen, options)["rank"])
        tuner.use(backbone)
    if chosen.additive:
        batch = fixed_batch(backbone, tuner.conditions, tuner.classes)
        expected = list(outputs(backbone, batch, tuners, weights))
        error = compare(backbone, expected, batch, [tuner], [1.0])
        check_error(error, EXACT if chosen.exact and max_error is None else max_error)
    return Merged(tuner, name, chosen.exact, error, sources(files), maps_of(files), residual)


def alone(files: Sequence[Chosen], rule: str | None, rank: int | None) -> bool:
    """Whether it is a single tuner at its own strength and width, which needs no rule to become itself."""
    return len(files) == 1 and files[0].scale == 1 and rule is None and rank is None


def sources(files: Sequence[Chosen]) -> list[dict[str, Any]]:
    """What a result was made of, for its description."""
    return [
        {
            "file": Path(one.name).name,
            **({"task": one.meta["task"]} if one.meta.get("task") else {}),
            "weight": one.scale,
            "sha256": sha256(one.file),
        }
        for one in files
    ]


def maps_of(files: Sequence[Chosen]) -> dict[str, Any]:
    """How the maps of all conditions were made."""
    return {condition: how for one in files for condition, how in one.meta.get("maps", {}).items()}


def check_error(error: MergeError, most: float | None) -> None:
    """Raises `SctoolError` where the largest difference is above `most`, or is not a number."""
    if not math.isfinite(error.largest) or (most is not None and error.largest > most):
        raise SctoolError(
            f"the result differs from the tuners side by side by up to {error.largest:.3g} (mean {error.mean:.3g}; the "
            f"tuners change the output by {error.effect:.3g} on average), above the allowed {most:g}. Nothing was "
            "written; allow more with --max-error."
        )


def write(result: Merged, path: str | Path, backbone: Backbone) -> Path:
    """Writes the tuner's file into the folder `path`; its description says what it was made of."""
    return save_tuner(path, result.tuner, backbone, maps=result.maps, merged=result.as_json())


def write_base(
    result: Merged, path: str | Path, backbone: Backbone, *, approximate: bool = False, max_error: float | None = None
) -> tuple[Path, MergeError]:
    """Writes a plain diffusers folder of the base with the tuner in its weights; returns it, and how far it is off.

    approximate: allow what does not fold exactly. Raises `DoesNotFit` without it, and `SctoolError` for a difference
    above `max_error` (`EXACT` when not given for what is exact).
    """
    tuner = result.tuner
    batch = fixed_batch(backbone, tuner.conditions, tuner.classes)
    denoiser = folded(backbone, tuner, batch if approximate else None)
    expected = list(outputs(backbone, batch, [tuner], [1.0]))
    base = list(outputs(backbone, batch, [], []))
    with backbone.replaced(denoiser):
        found = list(outputs(backbone, batch, [], []))
    error = MergeError.between(found, expected, base)
    check_error(error, max_error if approximate or max_error is not None else EXACT)
    return save_base(path, backbone, denoiser, card(result, backbone, error)), error


def card(result: Merged, backbone: Backbone, error: MergeError) -> str:
    """The model card of a base that holds a tuner."""
    parts = "\n".join(
        f"- {one['file']}{', task ' + one['task'] if 'task' in one else ''}, weight {one['weight']:g}, "
        f"SHA-256 {one['sha256']}"
        for one in result.sources
    )
    return (
        f"---\nlicense: {backbone.licence}\n---\n\nThe base {backbone.id} with tuners of method "
        f"{result.tuner.method} in its weights (rule {result.rule}):\n\n{parts}\n\nOn a fixed batch in float32 its "
        f"output differs from that of the base with the tuner attached by at most {error.largest:.3g}, on average by "
        f"{error.mean:.3g}; the tuner changes it by {error.effect:.3g} on average.\n"
    )
