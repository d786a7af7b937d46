"""Which metrics there are, which network each reads, and what its figures are called.

A figure's name says where it is not the usual one: FID is made of Inception features, "KID (mini features)" is not KID.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...core.errors import SctoolError
from ..features.choosing import Extractor, choose_features, clip_features, named_weights
from ..features.inception import InceptionFeatures
from ..options import Options
from ..results import Column, Figure
from ..targets import SampleFolder
from .cmmd import ClipDiscrepancy
from .frechet import FrechetDistance, small_sample_note
from .inception_score import InceptionScore
from .kid import KernelDistance
from .precision_recall import PrecisionRecall
from .references import Real, References

Attempt = Callable[[Sequence[str], Callable[[], Any]], Any]


@dataclass(frozen=True)
class SetMetric:
    """A metric of a whole set of pictures against the real ones."""

    make: Callable[[Any], Any]
    """A meter from an extractor: `update(features, positions)`, `merge`, `compute(real)`, `protocol`."""
    real: str
    """What of the real pictures it needs: "moments", "features", or "" for nothing."""
    figures: Mapping[str, tuple[str, str]]
    """Key of each figure -> its name, and which way is better."""
    reads: Callable[[Any, torch.Tensor], torch.Tensor] = lambda extractor, features: features
    """What of (extractor, features) the meter takes."""
    usual: str = "inception"
    """The extractor under which the names need no mark."""


SET_METRICS: dict[str, SetMetric] = {
    "fid": SetMetric(lambda e: FrechetDistance(e.dim), "moments", {"fid": ("FID", "lower")}),
    "kid": SetMetric(lambda e: KernelDistance(), "features", {"kid": ("KID", "lower")}),
    "is": SetMetric(lambda e: InceptionScore(e.classes), "", {"is": ("IS", "higher")}, lambda e, x: e.logits(x)),
    "pr": SetMetric(
        lambda e: PrecisionRecall(),
        "features",
        {"precision": ("precision", "higher"), "recall": ("recall", "higher")},
    ),
    "cmmd": SetMetric(lambda e: ClipDiscrepancy(), "features", {"cmmd": ("CMMD", "lower")}, usual="clip"),
}
MAIN = ("fid", "kid", "pr")  # what --features chooses the features of


class Stream:
    """One extractor, the set metrics that read its features, and the real pictures under it."""

    def __init__(self, extractor: Extractor, metrics: Sequence[str], references: References) -> None:
        self.extractor, self.metrics, self.references = extractor, list(metrics), references

    def meters(self) -> dict[str, Any]:
        """Fresh meters for one folder of pictures."""
        return {name: SET_METRICS[name].make(self.extractor) for name in self.metrics}

    def update(self, meters: Mapping[str, Any], pictures: torch.Tensor, positions: Sequence[int]) -> None:
        """Adds uint8 pictures (B, 3, H, W) to every meter; the network runs once."""
        features = self.extractor(pictures)
        for name, meter in meters.items():
            meter.update(SET_METRICS[name].reads(self.extractor, features), positions)

    def figures(
        self,
        meters: Mapping[str, Any],
        folder: SampleFolder,
        rows: list[dict[str, Any]],
        column: Column,
        attempt: Attempt,
        note: Callable[[str], None],
    ) -> Iterator[Figure]:
        """The figures of one folder; `attempt` decides about those that fail, `note` is told what few pictures bias."""
        needed = [name for name in meters if SET_METRICS[name].real]
        there = attempt(needed, lambda: self.references.of(folder, rows, column)) if needed else None
        real, identity = there or (Real(), None)
        for name, meter in meters.items():
            metric = SET_METRICS[name]
            if metric.real and not there:
                continue
            told = {**meter.protocol, **({"reference": identity} if metric.real else {}), **folder.protocol(rows)}
            if name == "fid":
                count = min(meter.n, real.n or meter.n)
                few = small_sample_note(self.extractor.label, count, self.extractor.dim)
                if few:
                    note(few)
            against = getattr(real, metric.real) if metric.real else None
            found = attempt([name], partial(meter.compute, against)) or {}
            for key, (value, interval) in found.items():
                named, label = name_of(key, metric, self.extractor)
                protocol = {"metric": label, **self.extractor.protocol, **told}
                yield Figure(named, label, value, metric.figures[key][1], protocol, interval)


def name_of(key: str, metric: SetMetric, extractor: Extractor) -> tuple[str, str]:
    """Key and name of a figure under an extractor."""
    if key == "fid":
        return extractor.key, extractor.label
    if extractor.name == metric.usual:
        return key, metric.figures[key][0]
    return f"{key}_{extractor.name}", metric.figures[key][0] + extractor.mark


def streams(
    wanted: set[str],
    options: Options,
    base: str | None,
    device: str,
    attempt: Attempt,
    note: Callable[[str], None],
    references: Callable[[Extractor, Path | None, bool], References],
) -> list[Stream]:
    """The extractors that the `wanted` set metrics need, each loaded once.

    attempt(metrics, load) gives `load()` or None where that may fail; references(extractor, file to save, whether
    features are kept) opens the real pictures.
    """
    weights = named_weights(options.weights, options.features)
    rule = {"weights": weights, "base": base, "offline": options.offline, "device": device, "note": note}
    readers: dict[str, tuple[Extractor, list[str]]] = {}

    def reads(metric: str, extractor: Extractor | None) -> None:
        if extractor is not None:
            readers.setdefault(extractor.name, (extractor, []))[1].append(metric)

    first = [name for name in MAIN if name in wanted]
    if "is" in wanted and options.features in ("auto", "inception", "inception-clean"):
        first.append("is")
    if "cmmd" in wanted and options.features in ("clip", "mini"):
        first.append("cmmd")
    main = attempt(first, lambda: choose_features(options.features, **rule)) if first else None
    for name in first:
        if name != "is" and main:
            reads(name, main)
    if "is" in wanted and (main or "is" not in first):
        reads("is", attempt(["is"], lambda: _classifier(main, options, rule)))
    if "cmmd" in wanted and "cmmd" not in first:
        reads("cmmd", attempt(["cmmd"], lambda: clip_features("auto", **rule)))
    made = []
    for extractor, names in readers.values():
        keep = any(SET_METRICS[name].real == "features" for name in names)
        save = options.save_stats if "fid" in names else None
        made.append(Stream(extractor, names, references(extractor, save, keep)))
    return made


def _classifier(main: Extractor | None, options: Options, rule: dict[str, Any]) -> Extractor:
    """What gives the Inception score its classes. Raises `SctoolError` for mini features, which know none."""
    if main is not None and hasattr(main, "logits"):
        return main
    if options.features == "mini" or (main is not None and main.name == "mini"):
        raise SctoolError(
            "the Inception score is made of Inception's own classes, and mini features know none. "
            "Give --weights PATH of pytorch-fid's Inception, and no --features mini."
        )
    found = choose_features("inception", **rule)
    assert isinstance(found, InceptionFeatures)
    return found
