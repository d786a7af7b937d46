"""Edge adherence: NMSE and F1 of edges re-extracted from the drawn picture against the hint.

With maps in 0..1, g the hint and p the edges of the picture:

    NMSE = sum_i |p_i - g_i|^2 / sum_i |g_i|^2     pooled over the set; 0 perfect, 1 an empty map, no upper limit

A mean of per-picture NMSEs explodes on nearly empty hints, so it is pooled, with the median beside it. NMSE punishes a
shift by one pixel more than an empty map; F1 and F1 within a tolerance (0.4 % of the diagonal, 2 px at 512, at least
1 px) stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import cv2
import numpy as np

from ...annotators.base import Annotator
from ..intervals import PictureFigures
from .base import ControlScore, grey

TOLERANCE = 0.004
"""Share of the diagonal within which an edge pixel counts as found."""


def tolerance(height: int, width: int) -> int:
    """Pixels of tolerance for a picture: 2 at 512x512, 5 at 1024x1024, never less than 1."""
    return max(1, math.floor(TOLERANCE * math.hypot(height, width)))


class EdgeScore(ControlScore):
    """NMSE, its median over pictures, F1, and F1 within a tolerance."""

    cond = "canny"
    medians: ClassVar[dict[str, str]] = {"nmse_median": "nmse"}

    def __init__(self, made: Mapping[str, Any] | None = None, evaluator: Annotator | None = None) -> None:
        super().__init__(made, evaluator)
        self.tolerances: set[int] = set()

    @property
    def better(self) -> dict[str, str]:  # type: ignore[override]
        """Which way each figure is better."""
        return {"nmse": "lower", "nmse_median": "lower", "f1": "higher", self._near_name: "higher"}

    @property
    def _near_name(self) -> str:
        return f"f1@{'-'.join(str(px) for px in sorted(self.tolerances)) or '?'}px"

    @property
    def protocol(self) -> dict[str, Any]:
        """Annotator and tolerance rule."""
        rule = f"{TOLERANCE} of the diagonal, at least 1 px, Euclidean"
        return {**super().protocol, "tolerance": rule, "tolerance_px": sorted(self.tolerances)}

    def update_maps(self, found: np.ndarray, wanted: np.ndarray, position: int | None = None) -> None:
        """Adds a map (H, W) of the picture and the hint, (H, W) or (H, W, 3), both uint8."""
        self.fits(found, wanted)
        wanted = grey(wanted)
        p, g = found.astype(np.float64) / 255, wanted.astype(np.float64) / 255
        drawn, there = found > 127, wanted > 127
        if not there.any():
            self.skipped += 1
            return
        within = tolerance(*found.shape[:2])
        self.tolerances.add(within)
        near = (drawn & _near(there, within)).sum(), (there & _near(drawn, within)).sum()
        exact = (drawn & there).sum(), drawn.sum(), there.sum()
        self.add((((p - g) ** 2).sum(), (g**2).sum(), *exact, *near), position)

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """ "nmse", "f1", "f1@Npx"; N is the tolerance that was used."""
        error, energy, hits, drawn, there, drawn_near, there_near = np.moveaxis(sums, -1, 0)
        precision = np.where(drawn > 0, drawn_near / drawn, 0)
        recall = there_near / there
        both = precision + recall
        return {
            "nmse": error / energy,
            "f1": 2 * hits / (drawn + there),
            self._near_name: np.where(both > 0, 2 * precision * recall / both, 0),
        }

    def merge(self, other: PictureFigures) -> None:
        """Adds what another process has counted."""
        assert isinstance(other, EdgeScore)
        super().merge(other)
        self.tolerances |= other.tolerances


class SketchScore(EdgeScore):
    """The same for sketches, which are binary too."""

    cond = "sketch"


def _near(mask: np.ndarray, within: int) -> np.ndarray:
    """Pixels at most `within` (Euclidean) from a set pixel of the bool (H, W) `mask`."""
    if not mask.any():
        return np.zeros_like(mask)
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance <= within + 1e-4
