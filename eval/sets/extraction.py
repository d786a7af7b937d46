"""Which network each set metric reads, and the pass over the images that all metrics of one network share.

A figure's name says where its features are not the usual ones: a FID is computed from Inception features, and
"KID (mini features)" is not a KID.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ...core.errors import SctoolError
from ..batches import Batch
from ..features.choosing import Extractor, choose_features, clip_features
from ..features.inception import InceptionFeatures
from ..features.names import named_weights
from ..metrics import SET_METRICS, Metric
from ..options import Options
from ..results import Figure, FolderResults
from ..targets import SampleFolder
from .meter import SetMeter
from .references import ReferenceFeatures, References

TryOrSkip = Callable[[Sequence[str], Callable[[], Any]], Any]
"""(metrics, work) -> work(); None, with a note, where it fails and none of the metrics was requested by name."""


def meter_class(metric: Metric) -> type[SetMeter]:
    """The class that computes a metric of image sets."""
    module, _, name = metric.meter.partition(".")
    return getattr(import_module(f".{module}", __package__), name)


class ExtractorMetrics:
    """The set metrics that read one extractor's features, and the references under it."""

    def __init__(
        self,
        extractor: Extractor,
        metrics: Sequence[str],
        references: References,
        try_or_skip: TryOrSkip,
        note: Callable[[str], None],
    ) -> None:
        self.extractor, self.metrics, self.references = extractor, list(metrics), references
        self.try_or_skip, self.note = try_or_skip, note

    def meters(self) -> dict[str, SetMeter]:
        """Fresh meters for one folder of images, by metric."""
        return {name: meter_class(SET_METRICS[name]).for_extractor(self.extractor) for name in self.metrics}

    def update(self, meters: Mapping[str, SetMeter], batch: Batch, results: FolderResults) -> None:
        """Adds a batch to every meter; the network runs once."""
        for indices, images in batch.by_size:
            features = self.extractor(images)
            for meter in meters.values():
                meter.update(meter.inputs(self.extractor, features), batch.positions(indices))

    def figures(
        self, meters: Mapping[str, SetMeter], folder: SampleFolder, rows: list[dict[str, Any]], results: FolderResults
    ) -> Iterator[Figure]:
        """The figures of one folder; notes say what was skipped, and what few images bias."""
        compared = [name for name in meters if SET_METRICS[name].references]
        load = partial(self.references.of, folder, rows, results)
        loaded = self.try_or_skip(compared, load) if compared else None
        reference, identity = loaded or (ReferenceFeatures(), None)
        for name, meter in meters.items():
            metric = SET_METRICS[name]
            if metric.references and not loaded:
                continue
            protocol = {**meter.protocol, **({"reference": identity} if metric.references else {})}
            protocol |= folder.protocol(rows)
            if caveat := meter.caveat(self.extractor, reference.n):
                self.note(caveat)
            real = {"": None, "moments": reference.moments, "images": reference.features}[metric.references]
            for key, (value, interval) in (self.try_or_skip([name], partial(meter.compute, real)) or {}).items():
                full_key, label = full_name(key, metric, self.extractor)
                described = {"metric": label, **self.extractor.protocol, **protocol}
                yield Figure(full_key, label, value, metric.figures[key].better, described, interval)


def full_name(key: str, metric: Metric, extractor: Extractor) -> tuple[str, str]:
    """Key and name of a figure under an extractor."""
    if metric.named_by_extractor:
        return extractor.key, extractor.label
    name = metric.figures[key].name
    return (key, name) if extractor.name == metric.usual else (f"{key}_{extractor.name}", name + extractor.mark)


def metrics_by_extractor(
    wanted: set[str],
    options: Options,
    base: str | None,
    device: str,
    try_or_skip: TryOrSkip,
    note: Callable[[str], None],
    references: Callable[[Extractor, Path | None, bool], References],
) -> list[ExtractorMetrics]:
    """The `wanted` set metrics, grouped by the extractor that they read; each extractor is loaded once.

    references(extractor, file to save moments to, whether features are stored) opens the reference images.
    """
    weights = named_weights(options.weights, options.features)
    rule = {"weights": weights, "base": base, "offline": options.offline, "device": device, "note": note}
    grouped = []
    for extractor, names in _extractors(wanted, options, rule, try_or_skip):
        store = any(SET_METRICS[name].references == "images" for name in names)
        save = options.save_stats if any(SET_METRICS[name].references == "moments" for name in names) else None
        grouped.append(ExtractorMetrics(extractor, names, references(extractor, save, store), try_or_skip, note))
    return grouped


def _extractors(
    wanted: set[str], options: Options, rule: dict[str, Any], try_or_skip: TryOrSkip
) -> list[tuple[Extractor, list[str]]]:
    """Each extractor that is needed, loaded by `rule`, and the metrics that read it."""
    follow, classify, embed = (
        [name for name, metric in SET_METRICS.items() if name in wanted and metric.network == network]
        for network in ("features", "inception", "clip")
    )
    # Metrics that always read Inception or CLIP share the extractor of --features where it is that network.
    share_inception = options.features in ("auto", "inception", "inception-clean")
    share_clip = options.features in ("clip", "mini")
    sharing = [*follow, *(classify if share_inception else []), *(embed if share_clip else [])]
    main = try_or_skip(sharing, lambda: choose_features(options.features, **rule)) if sharing else None
    groups: dict[str, tuple[Extractor, list[str]]] = {}

    def assign(metrics: Sequence[str], extractor: Extractor | None) -> None:
        if metrics and extractor is not None:
            groups.setdefault(extractor.name, (extractor, []))[1].extend(metrics)

    assign([*follow, *(embed if share_clip else [])], main)
    if classify and (main or not share_inception):
        assign(classify, try_or_skip(classify, lambda: _classifier(main, options, rule)))
    if embed and not share_clip:
        assign(embed, try_or_skip(embed, lambda: clip_features("auto", **rule)))
    return list(groups.values())


def _classifier(main: Extractor | None, options: Options, rule: dict[str, Any]) -> InceptionFeatures:
    """The network whose classes the Inception score uses. Raises `SctoolError` for mini features, which have none."""
    if isinstance(main, InceptionFeatures):
        return main
    if options.features == "mini" or (main is not None and main.name == "mini"):
        raise SctoolError(
            "the Inception score needs Inception's classes, and mini features have no classes. Pass pytorch-fid's "
            "Inception with --weights PATH, without --features mini."
        )
    classifier = choose_features("inception", **rule)
    assert isinstance(classifier, InceptionFeatures)
    return classifier
