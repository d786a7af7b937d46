"""Folders of pictures to figures: streaming, in batches, every figure with its protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.config import SampleConfig
from ..core.data.images import BadImage
from ..core.errors import SctoolError, UsageError
from ..core.progress import Progress
from .clip_models import ClipModel
from .clip_score import ClipScore, choose_clip
from .conditions import scores
from .features import Extractor, choose_features
from .frechet import FrechetStats, frechet_distance, small_sample_note
from .heldout import best_device, sample_heldout
from .references import BATCH, References, file_hash, same_size
from .results import Column, Figure, Results
from .targets import SampleFolder, Target, digest, read_picture, require, resolve

DEFAULT_COUNT = 200
LABELS = {
    "nmse": "NMSE",
    "nmse_median": "NMSE, median picture",
    "f1": "F1",
    "distance": "palette difference (0-255)",
    "outside": "change outside the hole (0-255)",
    "hole": "share of the hole",
}


@dataclass(frozen=True)
class Options:
    """How to evaluate. `metrics` empty means all that apply, and what cannot be had becomes a note."""

    metrics: tuple[str, ...] = ()
    features: str = "auto"
    weights: str | None = None
    clip_model: str | None = None
    clip_weights: str | None = None
    reference: str | None = None
    offline: bool = False
    save_stats: Path | None = None
    count: int | None = None
    sampling: SampleConfig | None = None
    seed: int | None = None
    quiet: bool = False

    def wants(self, metric: str) -> bool:
        """Whether the metric was asked for, by name or by naming none."""
        return not self.metrics or metric in self.metrics


def evaluate(target: str | Path | None = None, options: Options | None = None, *, runs: str | Path = "runs") -> Results:
    """Measures a samples folder, a run, or the latest run. Draws a run's held-out samples first where it has none.

    Raises `UsageError` and `SctoolError` for what is missing; pictures that cannot be read are listed in the result.
    """
    options = options or Options()
    progress = Progress(options.quiet)
    bare = options.reference is not None and options.metrics in ((), ("fid",))
    found = resolve(target, runs, bare=bare)
    found = _with_samples(found, options, progress)
    return _Evaluation(found, options, progress).run()


def _with_samples(target: Target, options: Options, progress: Progress) -> Target:
    """The target with its run's held-out samples, drawn now where those that it has will not do."""
    run = target.run
    drawing = options.count, options.sampling, options.seed
    if run is None:
        if any(value is not None for value in drawing):
            raise UsageError(
                f"--count, --steps, --guidance and --seed are for drawing a run's samples; {target.path} is no run."
            )
        return target
    if not run.tuner.is_file():
        raise UsageError(f"{run.path} has no trained tuner yet. Finish its training: the same `sctool train` again.")
    if options.metrics == ("profile",):
        return target
    why = _why_draw(target, options)
    if why is None:
        return target
    progress.note(f"{why}: drawing held-out pictures with the base and with the tuner")
    sample_heldout(
        run,
        count=options.count or DEFAULT_COUNT,
        sampling=options.sampling,
        seed=options.seed or 0,
        quiet=options.quiet,
        offline=options.offline,
    )
    return resolve(run.path)


def _why_draw(target: Target, options: Options) -> str | None:
    """Why the run's samples must be drawn (again); None where they will do."""
    run, folders, wanted = target.run, target.folders, options.sampling
    assert run is not None
    if len(folders) < 2:
        return f"{run.name} has no held-out samples"
    if (run.samples / "tuned" / "metadata.jsonl").stat().st_mtime < run.tuner.stat().st_mtime:
        return "the tuner is newer than its samples"
    if options.count is not None and min(len(folder.rows) for folder in folders) < options.count:
        return f"{run.name} has fewer than {options.count} held-out samples"
    if options.seed is not None and any(folder.rows[0].get("seed") != options.seed for folder in folders):
        return f"the samples have other seeds than {options.seed}"
    for name in ("steps", "guidance") if wanted else ():
        if any(folder.sampling.get(name) != getattr(wanted, name) for folder in folders):
            return f"the samples have another {name} than {getattr(wanted, name)}"
    return None


class _Evaluation:
    """One evaluation: what applies, the models it needs, and the columns."""

    def __init__(self, target: Target, options: Options, progress: Progress) -> None:
        self.target, self.options, self.progress = target, options, progress
        self.notes: list[str] = []
        self.device = best_device()
        self.base = next((folder.base for folder in target.folders if folder.base), None)
        self.references: References | None = None

    def note(self, text: str) -> None:
        """Tells the user now and keeps it for the report."""
        if text not in self.notes:
            self.notes.append(text)
            self.progress.note(text)

    def run(self) -> Results:
        """All figures."""
        options, columns = self.options, []
        if any(options.wants(metric) for metric in ("fid", "clip", "nmse")):
            applies = self._applies()
            extractor = self._model("fid", self._extractor) if "fid" in applies else None
            if extractor:
                self.references = References(extractor, options.reference, options.save_stats, self.progress)
            clip = self._model("clip", self._clip) if "clip" in applies else None
            faults = [self._faults(folder) for folder in self.target.folders]
            bad = {name for found in faults for name in found}
            for folder, found in zip(self.target.folders, faults, strict=True):
                rows = [row for row in folder.rows if row["file_name"] not in bad]
                if not rows:
                    raise SctoolError(f"{folder.path}: none of its {len(folder.rows)} pictures can be read.")
                column = Column(folder.label, folder.path, len(rows))
                column.faults += [{"file": name, "reason": reason} for name, reason in found.items()]
                self._measure(folder, rows, column, extractor, clip, "nmse" in applies)
                columns.append(column)
        profile = self._model("profile", self._profile) if options.wants("profile") else None
        if not profile and not any(column.figures for column in columns):
            raise SctoolError(f"nothing could be measured on {self.target.name}: " + " ".join(self.notes))
        return Results(str(self.target.path), columns, profile, self.notes)

    # ------------------------------------------------------------------------------------------ what applies

    def _applies(self) -> set[str]:
        """The picture metrics that can be computed; one asked for by name that cannot be is an error."""
        rows = [row for folder in self.target.folders for row in folder.rows]
        known = scores()
        possible = {
            "fid": (
                self.options.reference is not None or all(row.get("reference") for row in rows),
                "has no reference pictures. Give the real ones with --reference FOLDER or a statistics file.",
            ),
            "clip": (all(row.get("prompt") for row in rows), "has pictures without a prompt in metadata.jsonl."),
            "nmse": (
                any(cond in known for row in rows for cond in row.get("hints") or {}),
                f"has no hints to compare with; they are drawn by a run trained with --cond {','.join(known)}.",
            ),
        }
        for metric, (can, reason) in possible.items():
            if metric in self.options.metrics:
                require(can, f"--{metric}", str(self.target.path), reason)
        return {metric for metric, (can, _) in possible.items() if can and self.options.wants(metric)}

    def _model(self, metric: str, load: Callable[[], Any]) -> Any:
        """A metric's model; where the metric was not asked for by name, None and a note when it cannot be had."""
        try:
            return load()
        except SctoolError as error:
            if metric in self.options.metrics or (isinstance(error, UsageError) and metric != "profile"):
                raise
            self.note(f"--{metric} left out: {error}")
            return None

    def _extractor(self) -> Extractor:
        o = self.options
        return choose_features(
            o.features, weights=o.weights, base=self.base, offline=o.offline, device=self.device, note=self.note
        )

    def _clip(self) -> ClipModel:
        o = self.options
        return choose_clip(
            o.features,
            model=o.clip_model,
            weights=o.clip_weights,
            base=self.base,
            offline=o.offline,
            device=self.device,
            note=self.note,
        )

    def _faults(self, folder: SampleFolder) -> dict[str, str]:
        """Pictures that cannot be read, and why. They are left out of every folder, so that pairs stay pairs."""
        found = {}
        for row in folder.rows:
            try:
                read_picture(folder.path, row["file_name"])
            except BadImage as error:
                found[row["file_name"]] = str(error)
        return found

    # -------------------------------------------------------------------------------------------- measuring

    def _measure(
        self,
        folder: SampleFolder,
        rows: list[dict[str, Any]],
        column: Column,
        extractor: Extractor | None,
        clip: ClipModel | None,
        control: bool,
    ) -> None:
        """Fills the column in one pass over the pictures."""
        made = self._made()
        conds = sorted({cond for row in rows for cond in row.get("hints") or {}} & scores().keys()) if control else []
        meters = {cond: scores()[cond](made.get(cond)) for cond in conds}
        stats = FrechetStats(extractor.dim) if extractor else None
        score = ClipScore()
        with self.progress.counting(len(rows), f"measuring {folder.label}") as advance:
            for start in range(0, len(rows), BATCH):
                batch = rows[start : start + BATCH]
                pictures = [read_picture(folder.path, row["file_name"]) for row in batch]
                for indices, tensor in same_size(pictures):
                    if extractor and stats:
                        stats.update(extractor(tensor))
                    if clip:
                        score.update(clip.images(tensor), clip.texts([batch[i]["prompt"] for i in indices]))
                for cond, meter in meters.items():
                    for row, picture in zip(batch, pictures, strict=True):
                        self._control(folder, row, cond, picture, meter, column)
                advance(len(batch))
        shared = folder.protocol(rows)
        if extractor and stats:
            column.figures.append(self._fid(folder, rows, extractor, stats, shared, column))
        if clip:
            column.figures += self._clip_figures(clip, score, shared)
        for cond, meter in meters.items():
            column.figures += self._control_figures(cond, meter, rows, folder, shared)

    def _control(
        self, folder: SampleFolder, row: Mapping[str, Any], cond: str, picture: np.ndarray, meter: Any, column: Column
    ) -> None:
        name = (row.get("hints") or {}).get(cond)
        if name is None:
            return
        try:
            meter.update(picture, read_picture(folder.path, name), str(row.get("key", "")))
        except (BadImage, SctoolError) as error:
            column.faults.append({"file": name, "reason": str(error)})

    def _made(self) -> Mapping[str, Any]:
        """How the run's maps were made, from its tuner file."""
        if self.target.run is None or not self.target.run.tuner.is_file():
            return {}
        from ..core.checkpoint import read_meta

        return read_meta(self.target.run.tuner).get("maps", {})

    # ---------------------------------------------------------------------------------------------- figures

    def _fid(
        self,
        folder: SampleFolder,
        rows: list[dict[str, Any]],
        extractor: Extractor,
        stats: FrechetStats,
        shared: dict[str, Any],
        column: Column,
    ) -> Figure:
        assert self.references is not None
        moments, reference = self.references.of(folder, rows, column)
        note = small_sample_note(extractor.label, min(stats.n, moments.n or stats.n), extractor.dim)
        if note:
            self.note(note)
        protocol = {"metric": extractor.label, **extractor.protocol, "reference": reference, **shared}
        value = frechet_distance(stats.compute(), moments)
        return Figure(extractor.key, extractor.label, value, "lower", protocol)

    def _clip_figures(self, clip: ClipModel, score: ClipScore, shared: dict[str, Any]) -> list[Figure]:
        mark, stem = (f" ({clip.label})", f"clip_{clip.label}") if clip.label else ("", "clip")
        if clip.truncated:
            self.note(f"{clip.truncated} prompts were longer than the CLIP model reads and were cut.")
        protocol = {"metric": f"CLIP score{mark}", **clip.protocol, "prefix": "", **shared}
        values = score.compute()
        return [
            Figure(f"{stem}_cos", f"CLIP cosine{mark}", values["cos"], "higher", protocol),
            Figure(f"{stem}_100", f"CLIP score{mark}, 100 cos", values["100"], "higher", protocol),
            Figure(f"{stem}_w2.5", f"CLIP score{mark}, w=2.5", values["w2.5"], "higher", protocol),
        ]

    def _control_figures(
        self, cond: str, meter: Any, rows: list[dict[str, Any]], folder: SampleFolder, shared: dict[str, Any]
    ) -> list[Figure]:
        if meter.skipped:
            self.note(f"{cond}: {meter.skipped} pictures with an empty hint were skipped.")
        try:
            values = meter.compute()
        except SctoolError as error:
            self.note(str(error))
            return []
        hints = digest([file_hash(folder.path, row["hints"][cond]) for row in rows if cond in (row.get("hints") or {})])
        protocol = {"metric": f"{cond} adherence", **meter.protocol, "hints_sha256": hints, **shared, "n": meter.n}
        return [
            Figure(
                f"{cond}.{key}",
                f"{cond} {LABELS.get(key, key.replace('f1', 'F1'))}",
                value,
                meter.better[key],
                protocol,
            )
            for key, value in values.items()
        ]

    def _profile(self) -> dict[str, Any] | None:
        run = self.target.run
        if run is None:
            require("profile" not in self.options.metrics, "--profile", str(self.target.path), "is no run folder.")
            return None
        from .profile import profile

        self.progress.note("timing base and tuned model")
        return profile(run, offline=self.options.offline, device=self.device)
