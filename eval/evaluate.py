"""Folders of pictures to figures: streaming, in batches, every figure with its protocol and interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.data.images import BadImage
from ..core.devices import best_device
from ..core.errors import SctoolError, UsageError
from ..core.progress import Progress
from .clip_score import ClipScore
from .control.adherence import Adherence
from .control.table import EDGES, SEGMENTATION, scores
from .features.choosing import Extractor
from .features.clip_models import ClipModel
from .features.clip_weights import choose_clip
from .flags import check_flags
from .heldout import held_out, sample_heldout
from .intervals import BOOTSTRAP
from .options import SETS, Options
from .results import Column, Figure, Picture, Results
from .sets.metrics import Stream, streams
from .sets.references import BATCH, References, same_size
from .targets import SampleFolder, Target, read_picture, require, resolve

DEFAULT_COUNT = 200


def evaluate(target: str | Path | None = None, options: Options | None = None, *, runs: str | Path = "runs") -> Results:
    """Measures a samples folder, a run, or the latest run. Draws a run's held-out samples first where it has none.

    Raises `UsageError` and `SctoolError` for what is missing; pictures that cannot be read are listed in the result.
    """
    options = options or Options()
    check_flags(options)
    progress = Progress(options.quiet)
    found = resolve(target, runs, bare=not options.needs_metadata)
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
    if options.count is not None and _fewest(target) < min(options.count, held_out(run) or options.count):
        return f"{run.name} has fewer than {options.count} held-out samples"
    if options.seed is not None and any(folder.rows[0].get("seed") != options.seed for folder in folders):
        return f"the samples have other seeds than {options.seed}"
    for name in ("steps", "guidance") if wanted else ():
        if any(folder.sampling.get(name) != getattr(wanted, name) for folder in folders):
            return f"the samples have another {name} than {getattr(wanted, name)}"
    return None


def _fewest(target: Target) -> int:
    """Pictures of the smallest folder."""
    return min(len(folder.rows) for folder in target.folders)


class _Evaluation:
    """One evaluation: what applies, the models it needs, and the columns."""

    def __init__(self, target: Target, options: Options, progress: Progress) -> None:
        self.target, self.options, self.progress = target, options, progress
        self.notes: list[str] = []
        self.device = best_device()
        self.base = next((folder.base for folder in target.folders if folder.base), None)

    def note(self, text: str) -> None:
        """Tells the user now and keeps it for the report."""
        if text not in self.notes:
            self.notes.append(text)
            self.progress.note(text)

    def run(self) -> Results:
        """All figures."""
        options, columns = self.options, []
        if options.metrics != ("profile",):
            if options.count is not None and _fewest(self.target) < options.count:
                self.note(f"--count {options.count}: the run's data hold out only {_fewest(self.target)} pictures.")
            applies = self._applies()
            read = streams(applies & set(SETS), options, self.base, self.device, self._attempt, self.note, self._real)
            clip = self._attempt(["clip"], self._clip) if "clip" in applies else None
            control = Adherence(self.target, options, applies, self.note)
            faults = [self._faults(folder) for folder in self.target.folders]
            bad = {name for found in faults for name in found}
            for folder, found in zip(self.target.folders, faults, strict=True):
                rows = [row for row in folder.rows if row["file_name"] not in bad]
                if not rows:
                    raise SctoolError(f"{folder.path}: none of its {len(folder.rows)} pictures can be read.")
                column = Column(folder.label, folder.path, len(rows))
                column.faults += [{"file": name, "reason": reason} for name, reason in found.items()]
                column.pictures = [_picture(row) for row in rows]
                self._measure(folder, rows, column, read, clip, control)
                columns.append(column)
        profile = self._attempt(["profile"], self._profile) if options.wants("profile") else None
        if not profile and not any(column.figures for column in columns):
            raise SctoolError(f"nothing could be measured on {self.target.name}: " + " ".join(self.notes))
        return Results(str(self.target.path), columns, profile, self.notes)

    # ------------------------------------------------------------------------------------------ what applies

    def _applies(self) -> set[str]:
        """The picture metrics that can be computed; one asked for by name that cannot be is an error."""
        rows = [row for folder in self.target.folders for row in folder.rows]
        conds = {cond for row in rows for cond in row.get("hints") or {}}
        bare = [row for row in rows if not row.get("reference")]
        mute = [row for row in rows if not row.get("prompt")]
        own = not bare
        missing = _lacks(bare, rows, "reference", "has no reference pictures")
        reals = f"{missing}. Give the real ones with --reference FOLDER"
        given = self.options.reference
        pictures = own if given is None else not Path(given).expanduser().is_file()
        needs_pictures = (
            f"compares pictures with pictures, and --reference {given} holds only their mean and covariance. "
            "Give their folder."
            if given is not None
            else f"{reals}."
        )
        none = f"has no hints to compare with; they are drawn by a run trained with --cond {','.join(scores())}."
        others = f"its hints are {', '.join(sorted(conds)) or 'none'}; --control measures all that it has."
        possible = {
            "fid": (given is not None or own, f"{reals} or a statistics file."),
            "is": (True, ""),
            **dict.fromkeys(("kid", "pr", "cmmd"), (pictures, needs_pictures)),
            "clip": (
                not mute,
                f"{_lacks(mute, rows, 'prompt', 'has no prompts')}. They stand in metadata.jsonl, one a picture.",
            ),
            "control": (bool(conds & scores().keys()), none),
            "nmse": (bool(conds & set(EDGES)), f"has no edge hints: {others}" if conds else none),
            "iou": (bool(conds & set(SEGMENTATION)), f"has no seg hints: {others}" if conds else none),
        }
        for metric, (can, reason) in possible.items():
            if metric in self.options.metrics:
                require(can, f"--{metric}", str(self.target.path), reason)
        return {metric for metric, (can, _) in possible.items() if can and self.options.wants(metric)}

    def _attempt(self, metrics: Sequence[str], load: Callable[[], Any]) -> Any:
        """What some metrics need; None and a note when it cannot be had and none of them was asked for by name."""
        try:
            return load()
        except SctoolError as error:
            usage = isinstance(error, UsageError) and list(metrics) != ["profile"]
            if usage or any(metric in self.options.metrics for metric in metrics):
                raise
            self.note(f"{', '.join(f'--{metric}' for metric in metrics)} left out: {error}")
            return None

    def _real(self, extractor: Extractor, save: Path | None, keep: bool) -> References:
        return References(extractor, self.options.reference, save, self.progress, keep=keep)

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
        read: list[Stream],
        clip: ClipModel | None,
        control: Adherence,
    ) -> None:
        """Fills the column in one pass over the pictures."""
        meters = [stream.meters() for stream in read]
        follows = control.meters()
        score = ClipScore()
        with self.progress.counting(len(rows), f"measuring {folder.label}") as advance:
            for start in range(0, len(rows), BATCH):
                batch = rows[start : start + BATCH]
                pictures = [read_picture(folder.path, row["file_name"]) for row in batch]
                for indices, tensor in same_size(pictures):
                    positions = [start + i for i in indices]
                    for stream, own in zip(read, meters, strict=True):
                        stream.update(own, tensor, positions)
                    if clip:
                        texts = clip.texts([batch[i]["prompt"] for i in indices])
                        score.update(clip.images(tensor), texts, positions)
                control.update(follows, folder, batch, pictures, start, column)
                advance(len(batch))
        for stream, own in zip(read, meters, strict=True):
            column.figures += stream.figures(own, folder, rows, column, self._attempt, self.note)
        if clip:
            column.figures += self._clip_figures(clip, score, folder.protocol(rows), column)
        column.figures += control.figures(follows, folder, rows, column)

    # ---------------------------------------------------------------------------------------------- figures

    def _clip_figures(
        self, clip: ClipModel, score: ClipScore, shared: dict[str, Any], column: Column
    ) -> Iterator[Figure]:
        mark, stem = (f" ({clip.label})", f"clip_{clip.label}") if clip.label else ("", "clip")
        if clip.truncated:
            self.note(f"{clip.truncated} prompts were longer than the CLIP model reads and were cut.")
        protocol = {"metric": f"CLIP score{mark}", **clip.protocol, "prefix": "", "interval": BOOTSTRAP, **shared}
        names = {"cos": f"CLIP cosine{mark}", "100": f"CLIP score{mark}, 100 cos", "w2.5": f"CLIP score{mark}, w=2.5"}
        intervals, each = score.intervals(), score.each()
        for key, value in score.compute().items():
            yield Figure(f"{stem}_{key}", names[key], value, "higher", protocol, intervals.get(key))
        column.spread(f"{stem}_cos", each["cos"])  # the other scales order pictures alike

    def _profile(self) -> dict[str, Any] | None:
        run = self.target.run
        if run is None:
            require("profile" not in self.options.metrics, "--profile", str(self.target.path), "is no run folder.")
            return None
        from .profile import profile

        self.progress.note("timing base and tuned model")
        return profile(run, offline=self.options.offline, device=self.device)


def _lacks(without: Sequence[Any], rows: Sequence[Any], what: str, whole: str) -> str:
    """`whole` where all rows are `without`; else how many of them have no `what`."""
    if len(without) == len(rows):
        return whole
    return f"is incomplete: {len(without)} of {len(rows)} rows {'has' if len(without) == 1 else 'have'} no {what}"


def _picture(row: Mapping[str, Any]) -> Picture:
    """The report's entry of a picture, without figures yet."""
    hints, prompt, key = row.get("hints") or {}, row.get("prompt") or "", str(row.get("key") or "")
    return Picture(row["file_name"], prompt, key, dict(hints), row.get("reference"))
