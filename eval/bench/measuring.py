"""What is measured on drawn images: which figures this machine can compute, and each folder's, done once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...annotators import make_annotators
from ...annotators.base import Annotator
from ...core.errors import SctoolError, UsageError
from ...core.files import sha256
from ..control.adherence import EVALUATOR
from ..control.table import scores
from ..evaluate import evaluate
from ..features.clip_weights import choose_clip
from ..options import Options
from ..report.compare import differing
from ..results import Figure, Results
from .pieces import Piece
from .workshop import Workshop

DISTANCE, CLIP, TO_BASE = "distance", "clip", "to_base"
"""Keys of figures whose names depend on the network that measures them."""
PER_SEED = ("seeds", "prompts_sha256", "hints_sha256", "maps_sha256", "references_sha256")
"""Parts of a figure's protocol that differ between seeds; between rows nothing may."""
PER_MODEL = ("base_hash",)
"""Parts that differ between rows where the table's arms have bases of their own."""


def options(shop: Workshop, metrics: tuple[str, ...], reference: str | None = None, *, quiet: bool = True) -> Options:
    """How `sctool evaluate` is asked."""
    how = shop.settings.measuring
    clip = {"clip_model": how.clip_model, "clip_weights": how.clip_weights} if "clip" in metrics else {}
    judges = {"evaluators": how.evaluators} if "control" in metrics else {}
    return Options(
        metrics=metrics, features=how.features, weights=how.weights, reference=reference, offline=shop.offline,
        quiet=quiet, **clip, **judges,
    )  # fmt: skip


def available(shop: Workshop) -> tuple[tuple[str, ...], list[str]]:
    """The metrics that are measured on every folder, and why others are not; asked before anything is trained.

    Raises `UsageError` for weights that were given and cannot be used.
    """
    metrics, notes, how = ["fid"], list[str](), shop.settings.measuring
    conditions = shop.settings.first.conditions
    judges = {a.name: a for a in make_annotators(how.evaluators, flag=EVALUATOR)} if how.evaluators else {}
    if useless := [name for name in judges if name not in conditions]:
        raise UsageError(f"{EVALUATOR} {useless[0]} does nothing here: --cond is {','.join(conditions)}.")
    if shop.settings.form.clip:
        try:
            choose_clip(
                how.features, model=how.clip_model, weights=how.clip_weights, base=shop.settings.base,
                offline=shop.offline, device=shop.device,
            )  # fmt: skip
            metrics.append("clip")
        except SctoolError as error:
            if how.clip_model or how.clip_weights:
                raise
            notes.append(f"CLIP score is not measured: {error}")
    if [name for name in conditions if _has_score(shop, name, judges.get(name), notes)]:
        metrics.append("control")
    return tuple(metrics), notes


def _has_score(shop: Workshop, cond: str, judge: Annotator | None, notes: list[str]) -> bool:
    """Whether adherence to the condition can be measured; a note says why not. A given `judge` must be ready."""
    if cond not in scores():
        notes.append(f"{cond} adherence is not measured: there is no score for it.")
        return False
    try:
        scores()[cond](shop.maps.get(cond), judge).ready()
    except SctoolError as error:
        if judge is not None:
            raise
        notes.append(f"{cond} adherence is not measured: {error}")
        return False
    return True


def measure(shop: Workshop, drawn: Piece, samples: Path, real: Path, metrics: tuple[str, ...]) -> dict[str, Any]:
    """{"figures": {key: {"name", "value", "better", "protocol"}}, "notes"} of the images in `samples`.

    `real` is the file of the real images' statistics; `drawn` the piece that drew the images.
    """

    def work() -> dict[str, Any]:
        results = _evaluated(shop, samples, metrics, real)
        found = {_key(figure.key): figure for figure in results.folders[0].figures}
        figures = {key: _described(figure) for key, figure in found.items() if key is not None}
        return {"figures": figures, "notes": results.notes}

    how = shop.settings.measuring
    identity = {"drawn": drawn.identity, "reference_sha256": sha256(real), "metrics": metrics, "how": vars(how)}
    identity |= {"maps": dict(shop.maps)}
    return Piece(drawn.path.parent / "measured.json", identity).do(work)


def measure_to_base(shop: Workshop, drawn: Piece, samples: Path, base: Piece, base_samples: Path) -> dict[str, Any]:
    """The distance of the images in `samples` to a base's images of the same captions and noise, as `measure`."""

    def work() -> dict[str, Any]:
        results = _evaluated(shop, samples, ("fid",), base_samples)
        figure = _described(results.folders[0].figures[0])
        name = shop.settings.form.base
        figure["name"] += f" to the {name}"
        figure["protocol"]["reference"] = f"the {name}'s images of the same captions and noise"
        return {"figures": {TO_BASE: figure}, "notes": results.notes}

    identity = {"drawn": drawn.identity, "base": base.identity, "how": vars(shop.settings.measuring)}
    return Piece(drawn.path.parent / "measured-to-base.json", identity).do(work)


def _evaluated(shop: Workshop, samples: Path, metrics: tuple[str, ...], reference: Path) -> Results:
    """All rows by the networks that are chosen for the first base: a student's folder is not an embedded base."""
    asked = options(shop, metrics, str(reference))
    return evaluate(samples, asked, maps=shop.maps, base=shop.settings.base)


def _key(key: str) -> str | None:
    """The table's key of a figure; None for one that repeats another in another scale."""
    if key.startswith(("fid", "fd_")):
        return DISTANCE
    if key.startswith("clip"):
        return CLIP if key.endswith("_100") else None
    return key


def _described(figure: Figure) -> dict[str, Any]:
    shown = {"name": figure.name, "value": figure.value, "better": figure.better}
    return {**shown, "protocol": dict(figure.protocol)}


def shared_protocol(protocols: list[Mapping[str, Any]], *, own_models: bool) -> dict[str, Any]:
    """What figures over rows and seeds have in common.

    Raises `SctoolError` where any two were measured differently, between rows of a seed or between seeds. With
    `own_models` the rows' models may differ.
    """
    left_out = (*PER_SEED, *(PER_MODEL if own_models else ()))
    shared = [{key: value for key, value in protocol.items() if key not in left_out} for protocol in protocols]
    refuse_different(shared)
    return shared[0] if shared else {}


def refuse_different(protocols: list[dict[str, Any]]) -> None:
    """Raises `SctoolError` naming the keys in which protocols differ."""
    if protocols and (keys := differing(protocols)):
        differ = ", ".join(f"{key} ({' / '.join(map(str, dict.fromkeys(map(str, v))))})" for key, v in keys.items())
        raise SctoolError(
            f"runs of this table were measured differently: {differ}. Remove the measured*.json files in its folders "
            "and run the same command again."
        )
