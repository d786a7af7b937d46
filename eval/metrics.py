"""The table of metrics: what each is called, what it needs, and the figures it computes. Imports no torch.

The flags of `sctool evaluate`, the checks and the messages all follow this table. A new metric of image sets is one
file in `sets/` and one row here. The figures of each condition are on its score in `control/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class FigureInfo(NamedTuple):
    """How a figure is presented."""

    name: str
    """Name in tables, e.g. "F1"."""
    better: Literal["lower", "higher", ""]
    """Which direction is better; "" for neither."""


@dataclass(frozen=True)
class Metric:
    """One metric: its flag, what it needs of the samples, and the figures it computes."""

    name: str
    """Its flag without the dashes."""
    help: str
    references: Literal["", "moments", "images"] = ""
    """What it needs of the reference images: "moments" (a statistics file suffices), or the "images" themselves."""
    prompts: bool = False
    hints: Literal["", "selected", "all"] = ""
    """Hints it needs: "all" for any condition, "selected" for the conditions whose score names this metric."""
    run: bool = False
    """Needs a run folder rather than images."""
    meter: str = ""
    """For metrics of image sets: module and class in `sets/`, e.g. "kid.KernelDistance"."""
    figures: Mapping[str, FigureInfo] = field(default_factory=dict)
    """Key and presentation of each figure of an image set."""
    network: Literal["features", "inception", "clip"] = "features"
    """Whose features it takes: the network that --features selects, or always Inception, or always CLIP."""
    named_by_extractor: bool = False
    """Its figure takes key and name from the feature extractor: FID, FD-DINOv2, ..."""

    @property
    def flag(self) -> str:
        """The flag on the command line."""
        return f"--{self.name}"

    @property
    def usual(self) -> str:
        """The extractor under which the figure names need no suffix: a KID is of Inception, a CMMD of CLIP."""
        return "clip" if self.network == "clip" else "inception"

    @property
    def needs_metadata(self) -> bool:
        """Whether it needs metadata.jsonl even when reference images are given."""
        return self.prompts or bool(self.hints) or self.run


METRICS: dict[str, Metric] = {
    row.name: row
    for row in (
        Metric(
            "fid",
            "Fréchet distance to the reference images.",
            references="moments",
            meter="frechet.FrechetDistance",
            figures={"fid": FigureInfo("FID", "lower")},
            named_by_extractor=True,
        ),
        Metric(
            "kid",
            "Kernel distance to the reference images; unbiased for small sets.",
            references="images",
            meter="kid.KernelDistance",
            figures={"kid": FigureInfo("KID", "lower")},
        ),
        Metric(
            "is",
            "Inception score; needs no reference images.",
            meter="inception_score.InceptionScore",
            figures={"is": FigureInfo("IS", "higher")},
            network="inception",
        ),
        Metric(
            "pr",
            "Precision and recall against the reference images.",
            references="images",
            meter="precision_recall.PrecisionRecall",
            figures={"precision": FigureInfo("precision", "higher"), "recall": FigureInfo("recall", "higher")},
        ),
        Metric(
            "cmmd",
            "CLIP maximum mean discrepancy (CMMD) to the reference images.",
            references="images",
            meter="cmmd.ClipDiscrepancy",
            figures={"cmmd": FigureInfo("CMMD", "lower")},
            network="clip",
        ),
        Metric("clip", "CLIP score of each image and its prompt.", prompts=True),
        Metric("control", "Adherence to the hints, for every condition the samples have.", hints="all"),
        Metric("nmse", "Adherence to edge hints only (canny, sketch): NMSE and F1.", hints="selected"),
        Metric("iou", "Adherence to segmentation hints only (seg): mIoU and accuracies.", hints="selected"),
        Metric("profile", "Parameters, step times and peak memory, compared with the base.", run=True),
    )
}

SET_METRICS = {name: row for name, row in METRICS.items() if row.meter}
"""Metrics of whole image sets."""
CONTROL = {name: row for name, row in METRICS.items() if row.hints}
"""Metrics that compare images with their hints."""
FEATURE_METRICS = {name: row for name, row in SET_METRICS.items() if row.network == "features"}
"""Metrics of image sets whose network --features selects."""


def flag_list(names: Mapping[str, Metric], last: str = "and") -> str:
    """The flags in words: "--kid, --pr and --cmmd"."""
    *first, end = (row.flag for row in names.values())
    return f"{', '.join(first)} {last} {end}" if first else end
