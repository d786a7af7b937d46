"""Segmentation adherence: mIoU and its kin of the classes found in the drawn picture against the class map.

All figures are of the whole set: intersections and unions are summed over pictures before they are divided (Long et
al. 2015, arXiv 1411.4038, section 5). The mean of per-picture IoUs is another, much higher figure.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ..intervals import Interval
from .base import ControlScore

IGNORE = 255


class SegmentationScore(ControlScore):
    """mIoU over the classes that are in maps or predictions, pixel accuracy, mean class accuracy, and weighted IoU."""

    cond = "seg"
    reads = "map"
    judged = True
    better: ClassVar[dict[str, str]] = {
        "miou": "higher", "aacc": "higher", "macc": "higher", "fwiou": "higher", "classes": "",
    }  # fmt: skip

    @property
    def protocol(self) -> dict[str, Any]:
        """Annotator and which mean."""
        return {**super().protocol, "classes": f"ids 0..{IGNORE - 1}, {IGNORE} ignored", "pooled": "over the set"}

    def update_maps(self, found: np.ndarray, wanted: np.ndarray, position: int | None = None) -> None:
        """Adds class ids (H, W) uint8 of the picture and of the map; pixels whose wanted id is 255 do not count."""
        self.fits(found, wanted)
        counts = wanted != IGNORE
        if not counts.any():
            self.skipped += 1
            return
        p, g = found[counts], wanted[counts]
        hits, drawn, there = (np.bincount(ids, minlength=256)[:IGNORE] for ids in (g[p == g], p, g))
        # Few of the classes are in one picture: kept as id, hits, drawn, wanted of each that is.
        present = np.flatnonzero(drawn + there)
        self.add(np.stack([present, hits[present], drawn[present], there[present]]).ravel(), position)

    def intervals(self) -> dict[str, Interval]:
        """As in the base class; a count of classes has none."""
        return {name: interval for name, interval in super().intervals().items() if name != "classes"}

    def matrix(self) -> np.ndarray:
        """(N, 3 C): hits, drawn and wanted pixels of every class up to the highest id."""
        kept = [row.reshape(4, -1) for row in self._rows]
        classes = 1 + int(max((ids[0].max(initial=0) for ids in kept), default=0))
        dense = np.zeros((len(kept), 3, classes))
        for row, (ids, *counts) in zip(dense, kept, strict=True):
            row[:, ids.astype(int)] = counts
        return dense.reshape(len(kept), -1)

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """ "miou", "aacc", "macc", "fwiou" in 0..1; "classes": how many the mIoU is the mean of."""
        hits, drawn, there = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0)
        union = drawn + there - hits
        iou = np.where(union > 0, hits / union, 0)
        total = there.sum(-1)
        present, wanted = (union > 0).sum(-1), (there > 0).sum(-1)
        return {
            "miou": iou.sum(-1) / present,
            "aacc": hits.sum(-1) / total,
            "macc": np.where(there > 0, hits / there, 0).sum(-1) / wanted,
            "fwiou": (there * iou).sum(-1) / total,
            "classes": present.astype(np.float64),
        }
