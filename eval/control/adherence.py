"""Control metrics over folders of samples: what extracts each condition, what it is compared with, and the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...annotators import make_annotators
from ...annotators.base import Annotator
from ...core.data.images import BadImage, decode_map
from ...core.errors import SctoolError, UsageError, unknown
from ..batches import Batch
from ..metrics import CONTROL
from ..options import Options
from ..results import Figure, FolderResults
from ..targets import SampleFolder, Target, digest, file_hash, inside, read_image
from .base import ControlScore
from .table import conditions_of, scores

EVALUATOR = "--evaluator"


class Adherence:
    """The conditions of a target that are measured, each with what extracts it from an image."""

    def __init__(
        self,
        target: Target,
        options: Options,
        metrics: set[str],
        note: Callable[[str], None],
        maps: Mapping[str, Any] | None = None,
    ) -> None:
        """Measures the conditions of those of `metrics` that are control metrics.

        `maps` says how maps were made where the target has no run that says it.
        Missing weights are an error for conditions that a metric like --nmse requested by name, for given evaluators,
        and for --control where no other condition is left; otherwise the condition is skipped with a note.
        Raises `UsageError` for an evaluator whose condition is unknown or not measured.
        """
        self.target, self.note, self.map_settings = target, note, _map_settings(target) or maps or {}
        given = {a.name: a for a in make_annotators(options.evaluators, flag=EVALUATOR)} if options.evaluators else {}
        present = {cond for row in target.rows for cond in row.get("hints") or {}}
        measured = sorted(present & set().union(*(conditions_of(CONTROL[name]) for name in metrics & CONTROL.keys())))
        self._check_evaluators(given, measured)
        selected = [CONTROL[name] for name in options.metrics if name in CONTROL and CONTROL[name].hints == "selected"]
        required = given.keys() | set().union(*map(conditions_of, selected))
        self.evaluators: dict[str, Annotator] = {}
        missing: list[SctoolError] = []
        for cond in measured:
            try:
                score = scores()[cond](self.map_settings.get(cond), given.get(cond))
                self.evaluators[cond] = self._ready_evaluator(score)
            except SctoolError as error:
                if cond in required or isinstance(error, UsageError):
                    raise
                missing.append(error)
                note(f"{cond} adherence skipped: {error}")
        if missing and not self.evaluators and "control" in options.metrics:
            raise missing[0]

    def _check_evaluators(self, given: Mapping[str, Annotator], measured: list[str]) -> None:
        for name in given:
            if name not in scores():
                raise unknown(f"{EVALUATOR} condition", name, scores())
        for name in given:
            if name not in measured:
                raise UsageError(
                    f"{EVALUATOR} {name} does nothing here: the conditions measured on {self.target.path} are "
                    f"{', '.join(measured) or 'none'}. Leave it out, or add --control."
                )

    def _ready_evaluator(self, score: ControlScore) -> Annotator:
        """What extracts the score's condition. Raises `SctoolError` if weights or compared files are missing."""
        score.ready()
        if not any(_compared_file(score, row) for row in self.target.rows):
            what = "class maps" if score.compares_with == "map" else "reference images"
            raise SctoolError(
                f"{self.target.path} has no {what} beside its {score.cond} hints. Draw the run's samples again: "
                "delete its samples folder, then run `sctool evaluate` on it."
            )
        return score.annotator

    def meters(self) -> dict[str, ControlScore]:
        """Fresh scores for one folder, by condition."""
        return {cond: scores()[cond](self.map_settings.get(cond), judge) for cond, judge in self.evaluators.items()}

    def update(self, meters: Mapping[str, ControlScore], batch: Batch, results: FolderResults) -> None:
        """Adds a batch to every score, in one call each.

        A hint that cannot be read, or differs in size from its image, is listed in the results' faults.
        """
        for score in meters.values():
            pairs: list[tuple[np.ndarray, np.ndarray, str, int]] = []
            for position, (row, image) in enumerate(zip(batch.rows, batch.images, strict=True), batch.first):
                if score.cond not in (row.get("hints") or {}):
                    continue
                name = _compared_file(score, row) or f"{score.compares_with} of {row['file_name']}"
                try:
                    target = _read(score, batch.folder.path, name)
                    score.check_size(image, target)
                    pairs.append((image, target, str(row.get("key", "")), position))
                except (BadImage, SctoolError) as error:
                    results.faults.append({"file": name, "reason": str(error)})
            if pairs:
                score.update(*(list(part) for part in zip(*pairs, strict=True)))

    def figures(
        self,
        meters: Mapping[str, ControlScore],
        folder: SampleFolder,
        rows: list[dict[str, Any]],
        results: FolderResults,
    ) -> Iterator[Figure]:
        """The figures of a folder; also fills in the results' per-image values and `extract`."""
        for cond, score in meters.items():
            for text in score.notes():
                self.note(text)
            compared = [name for row in rows if (name := _compared_file(score, row))]
            fault = next((fault for fault in results.faults if fault["file"] in compared), None)
            if fault and not score.n + score.skipped:
                self.note(f"{cond}: nothing could be compared. First reason: {fault['file']} {fault['reason']}.")
                continue
            try:
                values = score.compute()
            except SctoolError as error:
                self.note(str(error))
                continue
            results.extract[cond] = score.extracted_image
            protocol = {
                "metric": f"{cond} adherence",
                **score.protocol,
                f"{score.compares_with}s_sha256": digest([file_hash(folder.path, name) for name in compared]),
                **folder.protocol(rows),
                "n": score.n,
            }
            intervals, per_image = score.intervals(), score.per_image()
            for key, (name, better) in score.figure_info.items():
                if key in values:
                    full_key = f"{cond}.{key}"
                    yield Figure(full_key, f"{cond} {name}", values[key], better, protocol, intervals.get(key))
                    results.set_values(full_key, per_image.get(key, {}))


def _map_settings(target: Target) -> Mapping[str, Any]:
    """How the maps of the run's training set were extracted, by condition, from its tuner file."""
    if target.run is None or not target.run.tuner.is_file():
        return {}
    from ...core.checkpoint import read_meta

    return read_meta(target.run.tuner).get("maps", {})


def _compared_file(score: ControlScore, row: Mapping[str, Any]) -> str | None:
    """The file that the score compares an image with; None where the row has none."""
    if score.cond not in (row.get("hints") or {}):
        return None
    if score.compares_with == "reference":
        return row.get("reference")
    return (row.get(f"{score.compares_with}s") or {}).get(score.cond)


def _read(score: ControlScore, folder: Path, name: str) -> np.ndarray:
    """uint8 (H, W, 3), or the class ids (H, W) of a map. Raises `BadImage`."""
    if score.compares_with != "map":
        return read_image(folder, name)
    try:
        return decode_map(inside(folder, name).read_bytes(), name)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from error
