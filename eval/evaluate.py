"""From folders of images to figures: in one streaming pass, every figure with its protocol and interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.backbones.students import first_teacher
from ..core.data.images import BadImage
from ..core.devices import best_device
from ..core.errors import SctoolError, UsageError
from ..core.progress import Progress
from .applicability import applicable
from .batches import Measurement, batches
from .clip_score import ClipMeasurement
from .control.adherence import Adherence
from .drawing import smallest, with_samples
from .features.choosing import Extractor
from .features.clip_weights import choose_clip
from .metrics import SET_METRICS
from .options import Options, check_options
from .results import FolderResults, ImageResult, Results
from .sets.extraction import metrics_by_extractor
from .sets.references import References
from .targets import SampleFolder, Target, find_target, read_image


def evaluate(
    target: str | Path | None = None,
    options: Options | None = None,
    *,
    runs: str | Path = "runs",
    maps: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> Results:
    """Measures a samples folder, a run, or the latest run. Draws a run's held-out samples first if it has none.

    `maps` says how the hints' maps were made, by condition, for samples outside their run; a run's tuner file says it.
    `base` stands for the samples' own base in the choice of networks: embedded ones measure embedded bases alone, and
    their students.
    Raises `UsageError` or `SctoolError` for what is missing; images that cannot be read are listed in the results.
    """
    options = options or Options()
    check_options(options)
    progress = Progress(options.quiet)
    found = find_target(target, runs, bare=not options.needs_metadata, task=options.task)
    samples = with_samples(found, options, progress)
    return _Evaluation(samples, options, progress, maps or {}, base).run()


class _Evaluation:
    """One evaluation: which metrics apply, the models that they need, and the figures of each folder."""

    def __init__(
        self, target: Target, options: Options, progress: Progress, maps: Mapping[str, Any], base: str | None
    ) -> None:
        self.target, self.options, self.progress, self.maps = target, options, progress, maps
        self.notes: list[str] = []
        self.device = best_device()
        drawn_by = base or next((folder.base for folder in target.folders if folder.base), None)
        self.base = drawn_by and first_teacher(drawn_by)

    def run(self) -> Results:
        """Measures every folder, then the costs."""
        folders = [] if self.options.only_profile else self._measure_folders()
        profile = self._try_or_skip(["profile"], self._profile) if self.options.wants("profile") else None
        if not profile and not any(results.figures for results in folders):
            raise SctoolError(f"nothing could be measured on {self.target.name}: " + " ".join(self.notes))
        return Results(str(self.target.path), folders, profile, self.notes)

    def note(self, text: str) -> None:
        """Shows the text to the user now and keeps it for the report."""
        if text not in self.notes:
            self.notes.append(text)
            self.progress.note(text)

    def _try_or_skip(self, metrics: Sequence[str], work: Callable[[], Any]) -> Any:
        """`work()`; None, with a note, where it fails and none of the metrics that need it was requested by name."""
        try:
            return work()
        except SctoolError as error:
            usage = isinstance(error, UsageError) and list(metrics) != ["profile"]
            if usage or any(metric in self.options.metrics for metric in metrics):
                raise
            self.note(f"{', '.join(f'--{metric}' for metric in metrics)} skipped: {error}")
            return None

    # ------------------------------------------------------------------------------------------------- preparing

    def _measurements(self) -> list[Measurement]:
        """What is measured on every folder, in the order of the report, with its models loaded."""
        names, options = applicable(self.target, self.options), self.options
        measurements: list[Measurement] = []
        measurements += metrics_by_extractor(
            names & SET_METRICS.keys(), options, self.base, self.device, self._try_or_skip, self.note, self._references
        )
        if "clip" in names and (clip := self._try_or_skip(["clip"], self._clip)):
            measurements.append(clip)
        measurements.append(Adherence(self.target, options, names, self.note, self.maps))
        return measurements

    def _references(self, extractor: Extractor, save: Path | None, store: bool) -> References:
        return References(extractor, self.options.reference, save, self.progress, store=store)

    def _clip(self) -> ClipMeasurement:
        clip = choose_clip(
            self.options.features,
            model=self.options.clip_model,
            weights=self.options.clip_weights,
            base=self.base,
            offline=self.options.offline,
            device=self.device,
            note=self.note,
        )
        return ClipMeasurement(clip, self.note)

    def _profile(self) -> dict[str, Any] | None:
        if self.target.run is None:
            if "profile" in self.options.metrics:
                raise SctoolError(f"--profile: {self.target.path} is not a run folder.")
            return None
        from .profile import profile

        self.progress.note("timing base and tuned model")
        return profile(self.target.run, offline=self.options.offline, device=self.device)

    # ------------------------------------------------------------------------------------------------- measuring

    def _measure_folders(self) -> list[FolderResults]:
        count = self.options.count
        if count is not None and smallest(self.target) < count:
            self.note(f"--count {count}: the run's data has only {smallest(self.target)} held-out images.")
        measurements = self._measurements()
        faults = [_unreadable(folder) for folder in self.target.folders]
        # An image that is unreadable in one folder is left out of all, so that base and tuned images stay pairs.
        unreadable = set().union(*faults)
        return [
            self._measure(folder, reasons, unreadable, measurements)
            for folder, reasons in zip(self.target.folders, faults, strict=True)
        ]

    def _measure(
        self,
        folder: SampleFolder,
        reasons: Mapping[str, str],
        unreadable: set[str],
        measurements: Sequence[Measurement],
    ) -> FolderResults:
        """The figures of one folder, in one pass over its images."""
        rows = [row for row in folder.rows if row["file_name"] not in unreadable]
        if not rows:
            raise SctoolError(f"{folder.path}: none of its {len(folder.rows)} images can be read.")
        results = FolderResults(folder.label, folder.path, len(rows), images=list(map(_image_result, rows)))
        results.faults += [{"file": name, "reason": reason} for name, reason in reasons.items()]
        meters = [measurement.meters() for measurement in measurements]
        with self.progress.counting(len(rows), f"measuring {folder.label}") as advance:
            for batch in batches(folder, rows):
                for measurement, own in zip(measurements, meters, strict=True):
                    measurement.update(own, batch, results)
                advance(len(batch.rows))
        for measurement, own in zip(measurements, meters, strict=True):
            results.figures += measurement.figures(own, folder, rows, results)
        return results


def _unreadable(folder: SampleFolder) -> dict[str, str]:
    """Images that cannot be read, and why."""
    reasons = {}
    for row in folder.rows:
        try:
            read_image(folder.path, row["file_name"])
        except BadImage as error:
            reasons[row["file_name"]] = str(error)
    return reasons


def _image_result(row: Mapping[str, Any]) -> ImageResult:
    """An image's entry in the results, without values yet."""
    hints, prompt, key = row.get("hints") or {}, row.get("prompt") or "", str(row.get("key") or "")
    return ImageResult(row["file_name"], prompt, key, dict(hints), row.get("reference"))
