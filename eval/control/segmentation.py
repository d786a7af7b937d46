"""Segmentation adherence: mIoU and related figures of the classes predicted for the drawn image against the class map.

All figures are pooled: intersections and unions are summed over images before they are divided (Long et al. 2015,
arXiv 1411.4038, section 5). The mean of per-image IoUs is a different, much higher figure.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ..intervals import Interval
from ..metrics import FigureInfo
from .base import ControlScore

IGNORE = 255


class SegmentationScore(ControlScore):
    """mIoU over the classes in maps or predictions, pixel accuracy, mean class accuracy, and weighted IoU."""

    cond = "seg"
    metric = "iou"
    compares_with = "map"
    independent = True
    figure_info: ClassVar[dict[str, FigureInfo]] = {
        "miou": FigureInfo("mIoU", "higher"),
        "aacc": FigureInfo("pixel accuracy", "higher"),
        "macc": FigureInfo("mean class accuracy", "higher"),
        "fwiou": FigureInfo("frequency-weighted IoU", "higher"),
        "classes": FigureInfo("classes present", ""),
    }

    @property
    def protocol(self) -> dict[str, Any]:
        """Adds which classes count, and how they are pooled."""
        return {**super().protocol, "classes": f"ids 0..{IGNORE - 1}, {IGNORE} ignored", "pooled": "over the set"}

    def update_maps(self, extracted: np.ndarray, target: np.ndarray, position: int | None = None) -> None:
        """Adds class ids (H, W) uint8 of the image and of the map; pixels with id 255 in the map are ignored."""
        self.check_size(extracted, target)
        labelled = target != IGNORE
        if not labelled.any():
            self.skipped += 1
            return
        p, g = extracted[labelled], target[labelled]
        hits, drawn, expected = (np.bincount(ids, minlength=256)[:IGNORE] for ids in (g[p == g], p, g))
        # An image contains few of the classes: stored as id, hits, drawn and expected pixels of each that is present.
        present = np.flatnonzero(drawn + expected)
        self.add(np.stack([present, hits[present], drawn[present], expected[present]]).ravel(), position)

    def intervals(self) -> dict[str, Interval]:
        """As in the base class; the number of classes has none."""
        return {key: interval for key, interval in super().intervals().items() if key != "classes"}

    def matrix(self) -> np.ndarray:
        """(N, 3 C): hits, drawn and expected pixels of every class up to the highest id."""
        sparse = [row.reshape(4, -1) for row in self._rows]
        classes = 1 + int(max((row[0].max(initial=0) for row in sparse), default=0))
        dense = np.zeros((len(sparse), 3, classes))
        for row, (ids, *counts) in zip(dense, sparse, strict=True):
            row[:, ids.astype(int)] = counts
        return dense.reshape(len(sparse), -1)

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """ "miou", "aacc", "macc", "fwiou" in 0..1; "classes": the number of classes that the mIoU averages."""
        hits, drawn, expected = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0)
        union = drawn + expected - hits
        iou = np.where(union > 0, hits / union, 0)
        total = expected.sum(-1)
        present, labelled = (union > 0).sum(-1), (expected > 0).sum(-1)
        return {
            "miou": iou.sum(-1) / present,
            "aacc": hits.sum(-1) / total,
            "macc": np.where(expected > 0, hits / expected, 0).sum(-1) / labelled,
            "fwiou": (expected * iou).sum(-1) / total,
            "classes": present.astype(np.float64),
        }
