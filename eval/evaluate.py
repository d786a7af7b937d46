"""Folders of pictures to figures: streaming, in batches, every figure with its protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.config import SampleConfig
from ..core.data.images import BadImage
from ..core.errors import SctoolError, UsageError
from ..core.files import sha256
from ..core.progress import Progress
from .clip_models import ClipModel
from .clip_score import ClipScore, choose_clip
from .conditions import scores
from .features import Extractor, choose_features
from .frechet import FrechetStats, Moments, frechet_distance, small_sample_note
from .heldout import best_device, sample_heldout
from .results import Column, Figure, Results
from .targets import SampleFolder, Target, digest, inside, read_picture, reference_pictures, require, resolve

METRICS = ("fid", "clip", "nmse", "profile")
BATCH = 16
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
    count: int | None = None
    sampling: SampleConfig | None = None
    seed: int = 0
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
    """The target with its run's samples drawn: where there are none, fewer than asked for, or the tuner is newer."""
    run = target.run
    if run is None or options.metrics == ("profile",):
        return target
    if not run.tuner.is_file():
        raise UsageError(f"{run.path} has no trained tuner yet. Finish its training: the same `sctool train` again.")
    listed = run.samples / "tuned" / "metadata.jsonl"
    fewest = min((len(folder.rows) for folder in target.folders), default=0)
    stale = listed.is_file() and listed.stat().st_mtime < run.tuner.stat().st_mtime
    if len(target.folders) == 2 and not stale and fewest >= (options.count or 1):
        return target
    why = "the tuner is newer than its samples" if stale else f"{run.name} has {fewest or 'no'} held-out samples"
    progress.note(f"{why}: drawing held-out pictures with the base and with the tuner")
    sample_heldout(
        run,
        count=options.count or 200,
        sampling=options.sampling,
        seed=options.seed,
        quiet=options.quiet,
        offline=options.offline,
    )
    return resolve(run.path)


class _Evaluation:
    """One evaluation: what applies, the models it needs, and the columns."""

    def __init__(self, target: Target, options: Options, progress: Progress) -> None:
        self.target, self.options, self.progress = target, options, progress
        self.notes: list[str] = []
        self.device = best_device()
        self.base = next((folder.base for folder in target.folders if folder.base), None)
        self.references: dict[str, tuple[Moments, dict[str, Any]]] = {}

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
        profile = self._profile() if options.wants("profile") else None
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
        except UsageError:
            raise
        except SctoolError as error:
            if metric in self.options.metrics:
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
        """Pictures that cannot be read, with the reason. They are left out of every folder, so that pairs stay pairs."""
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
        moments, reference = self._reference(folder, rows, extractor, column)
        note = small_sample_note(extractor.label, min(stats.n, moments.n or stats.n), extractor.dim)
        if note:
            self.note(note)
        protocol = {"metric": extractor.label, **extractor.protocol, "reference": reference, **shared}
        value = frechet_distance(stats.compute(), moments)
        return Figure(extractor.key, extractor.label, value, "lower", protocol)

    def _reference(
        self, folder: SampleFolder, rows: list[dict[str, Any]], extractor: Extractor, column: Column
    ) -> tuple[Moments, dict[str, Any]]:
        """Moments of the real pictures and what identifies them; computed once for folders that share them."""
        given = self.options.reference
        if given is not None and Path(given).is_file():
            moments = Moments.load(given)
            if len(moments.mu) != extractor.dim:
                raise UsageError(
                    f"--reference {given} holds {len(moments.mu)} dimensions; {extractor.name} features have "
                    f"{extractor.dim}. Statistics and --features must be of the same extractor."
                )
            return moments, {"n": moments.n, "statistics_sha256": sha256(given)}
        if given is not None and not Path(given).is_dir():
            raise UsageError(f"--reference {given}: no such folder or statistics file.")
        names = [row["reference"] for row in rows] if given is None else []
        key = given or digest([_file_hash(folder.path, name) for name in names])
        if key not in self.references:
            stats, used = FrechetStats(extractor.dim), 0
            pictures = reference_pictures(Path(given)) if given else _listed(folder.path, names)
            with self.progress.counting(len(names), "measuring references") as advance:
                for group in batched(pictures, column):
                    for _, tensor in same_size(group):
                        stats.update(extractor(tensor))
                    used += len(group)
                    advance(len(group))
            identity = key if given is None else digest(_folder_hashes(Path(given)))
            self.references[key] = stats.compute(), {"n": used, "pictures_sha256": identity}
        return self.references[key]

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
        hints = digest([_file_hash(folder.path, row["hints"][cond]) for row in rows if cond in (row.get("hints") or {})])
        protocol = {"metric": f"{cond} adherence", **meter.protocol, "hints_sha256": hints, **shared, "n": meter.n}
        return [
            Figure(f"{cond}.{key}", f"{cond} {LABELS.get(key, key.upper())}", value, meter.better[key], protocol)
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


def same_size(pictures: Sequence[np.ndarray]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(indices, uint8 (B, 3, H, W)) of pictures (H, W, 3), one group a size."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(index)
    for indices in groups.values():
        yield indices, torch.from_numpy(np.stack([pictures[i] for i in indices])).permute(0, 3, 1, 2)


def batched(pictures: Iterator[tuple[str, np.ndarray | str]], column: Column) -> Iterator[list[np.ndarray]]:
    """Pictures in batches; what cannot be read goes to the column's faults."""
    group: list[np.ndarray] = []
    for name, picture in pictures:
        if isinstance(picture, str):
            column.faults.append({"file": name, "reason": picture})
            continue
        group.append(picture)
        if len(group) == BATCH:
            yield group
            group = []
    if group:
        yield group


def _listed(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray | str]]:
    for name in names:
        try:
            yield name, read_picture(folder, name)
        except BadImage as error:
            yield name, str(error)


def _file_hash(folder: Path, name: str) -> str:
    try:
        return sha256(inside(folder, name))
    except (OSError, BadImage):
        return "unreadable"


def _folder_hashes(folder: Path) -> list[str]:
    return [sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()]
