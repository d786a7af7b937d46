"""Control metrics over folders of samples: what extracts each condition, what pictures are compared with, figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...annotators import make_annotators
from ...annotators.base import Annotator
from ...core.data.images import BadImage, decode_map
from ...core.errors import SctoolError, UsageError, unknown
from ..options import Options
from ..results import Column, Figure
from ..sets.references import file_hash
from ..targets import SampleFolder, Target, digest, inside, read_picture
from .base import ControlScore
from .table import EDGES, SEGMENTATION, scores

NAMES = {
    "nmse": "NMSE",
    "nmse_median": "NMSE, median picture",
    "f1": "F1",
    "distance": "palette difference (0-255)",
    "outside": "change outside the hole (0-255)",
    "hole": "share of the hole",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "rmse": "RMSE (0-255)",
    "rmse_aligned": "RMSE, scale and shift aligned (0-255)",
    "miou": "mIoU",
    "aacc": "pixel accuracy",
    "macc": "mean class accuracy",
    "fwiou": "frequency-weighted IoU",
    "classes": "classes present",
    "oks_ap": "OKS-AP",
    "pck@0.2": "PCK@0.2",
    "recall": "persons found",
}


class Adherence:
    """The conditions of a target that are to be measured, each with what extracts it from a picture."""

    def __init__(self, target: Target, options: Options, applies: set[str], note: Callable[[str], None]) -> None:
        """`applies`: the metrics that are to be computed, of `options.CONTROL` among them; else nothing is measured.

        Weights that are missing are an error for --nmse and --iou, and for --control where nothing else is left;
        otherwise `note` is told. An evaluator that was given must work: it is an error where it cannot be had, or where
        its condition is not measured. Raises `UsageError` for an evaluator of an unknown condition.
        """
        self.target, self.note, self.made = target, note, _made(target)
        self.rows = [row for folder in target.folders for row in folder.rows]
        given = {one.name: one for one in make_annotators(options.evaluators)} if options.evaluators else {}
        for name in given:
            if name not in scores():
                raise unknown("--evaluator condition", name, scores())
        named = {cond for flag, conds in (("nmse", EDGES), ("iou", SEGMENTATION)) if flag in applies for cond in conds}
        strict = named if set(options.metrics) & {"nmse", "iou"} else set()
        wanted = scores().keys() if "control" in applies else named
        self.judges: dict[str, Annotator] = {}
        missing: list[SctoolError] = []
        measured = sorted(wanted & {cond for row in self.rows for cond in row.get("hints") or {}})
        for name in given:
            if name not in measured:
                raise UsageError(
                    f"--evaluator {name} does nothing here: of {target.path}, {', '.join(measured) or 'no condition'} "
                    "is measured. Leave it out, or add --control."
                )
        for cond in measured:
            try:
                self.judges[cond] = self._judge(scores()[cond](self.made.get(cond), given.get(cond)))
            except SctoolError as error:
                if cond in strict or cond in given or isinstance(error, UsageError):
                    raise
                missing.append(error)
                note(f"{cond} adherence left out: {error}")
        if missing and not self.judges and "control" in options.metrics:
            raise missing[0]

    def _judge(self, score: ControlScore) -> Annotator:
        """What extracts the score's condition. Raises `SctoolError` where its weights or what it reads are missing."""
        score.ready()
        if not any(_file(score, row) for row in self.rows):
            what = "class maps" if score.reads == "map" else "reference pictures"
            raise SctoolError(
                f"{self.target.path} keeps no {what} beside its {score.cond} hints. Draw a run's samples again: "
                "delete its samples folder, then run `sctool evaluate` on it."
            )
        return score.annotator

    def meters(self) -> dict[str, ControlScore]:
        """Fresh meters for one folder of pictures, by condition."""
        return {cond: scores()[cond](self.made.get(cond), judge) for cond, judge in self.judges.items()}

    def update(
        self,
        meters: Mapping[str, ControlScore],
        folder: SampleFolder,
        rows: Sequence[dict[str, Any]],
        pictures: Sequence[np.ndarray],
        first: int,
        column: Column,
    ) -> None:
        """Adds the pictures of `rows`, which stand from `first` on in the set, to every meter in one call each.

        A hint that cannot be read or has another size than its picture is listed in the column's faults.
        """
        for meter in meters.values():
            kept: list[tuple[np.ndarray, np.ndarray, str, int]] = []
            for position, (row, picture) in enumerate(zip(rows, pictures, strict=True), first):
                if meter.cond not in (row.get("hints") or {}):
                    continue
                name = _file(meter, row) or f"{meter.reads} of {row['file_name']}"
                try:
                    wanted = _read(meter, folder.path, name)
                    meter.fits(picture, wanted)
                    kept.append((picture, wanted, str(row.get("key", "")), position))
                except (BadImage, SctoolError) as error:
                    column.faults.append({"file": name, "reason": str(error)})
            if kept:
                meter.update(*(list(part) for part in zip(*kept, strict=True)))

    def figures(
        self, meters: Mapping[str, ControlScore], folder: SampleFolder, rows: list[dict[str, Any]], column: Column
    ) -> Iterator[Figure]:
        """The figures of a folder; the column's pictures get their own values and its `extract` is filled."""
        for cond, meter in meters.items():
            for told in meter.notes():
                self.note(told)
            compared = [name for row in rows if (name := _file(meter, row))]
            fault = next((fault for fault in column.faults if fault["file"] in compared), None)
            if fault and not meter.n + meter.skipped:
                self.note(f"{cond}: nothing could be compared; the first: {fault['file']} {fault['reason']}.")
                continue
            try:
                values = meter.compute()
            except SctoolError as error:
                self.note(str(error))
                continue
            column.extract[cond] = meter.drawn
            protocol = {
                "metric": f"{cond} adherence",
                **meter.protocol,
                f"{meter.reads}s_sha256": digest([file_hash(folder.path, name) for name in compared]),
                **folder.protocol(rows),
                "n": meter.n,
            }
            intervals, each = meter.intervals(), meter.each()
            for key in (key for key in meter.better if key in values):
                name = f"{cond} {NAMES.get(key, key.replace('f1', 'F1'))}"
                yield Figure(f"{cond}.{key}", name, values[key], meter.better[key], protocol, intervals.get(key))
                column.spread(f"{cond}.{key}", each.get(key, {}))


def _made(target: Target) -> Mapping[str, Any]:
    """How the run's maps were made, from its tuner file."""
    if target.run is None or not target.run.tuner.is_file():
        return {}
    from ...core.checkpoint import read_meta

    return read_meta(target.run.tuner).get("maps", {})


def _file(score: ControlScore, row: Mapping[str, Any]) -> str | None:
    """The file that the score compares a picture with; None where the picture has none."""
    if score.cond not in (row.get("hints") or {}):
        return None
    if score.reads == "reference":
        return row.get("reference")
    return (row.get(f"{score.reads}s") or {}).get(score.cond)


def _read(score: ControlScore, folder: Path, name: str) -> np.ndarray:
    """uint8 (H, W, 3), or the ids (H, W) of a map. Raises `BadImage`."""
    if score.reads != "map":
        return read_picture(folder, name)
    try:
        return decode_map(inside(folder, name).read_bytes(), name)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from error
