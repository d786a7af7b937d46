"""Edge adherence: NMSE and F1 of edges extracted from the drawn image against the hint.

With maps in 0..1, g the hint and p the edges of the image:

    NMSE = sum_i |p_i - g_i|^2 / sum_i |g_i|^2     pooled over the set; 0 perfect, 1 an empty map, no upper limit

A mean of per-image NMSEs explodes on nearly empty hints, so NMSE is pooled, and its median over images is reported too.
NMSE penalises a shift by one pixel more than an empty map, so F1 is reported as well, exact and within a tolerance
(0.4 % of the diagonal, 2 px at 512, at least 1 px).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import cv2
import numpy as np

from ...annotators.base import Annotator
from ..intervals import ImageFigures
from ..metrics import FigureInfo
from .base import ControlScore, grey

TOLERANCE = 0.004
"""Share of the diagonal within which an edge pixel counts as a hit."""


def tolerance(height: int, width: int) -> int:
    """Tolerance in pixels for an image: 2 at 512x512, 5 at 1024x1024, never less than 1."""
    return max(1, math.floor(TOLERANCE * math.hypot(height, width)))


class EdgeScore(ControlScore):
    """NMSE, its median over images, F1, and F1 within a tolerance."""

    cond = "canny"
    metric = "nmse"
    medians: ClassVar[dict[str, str]] = {"nmse_median": "nmse"}

    def __init__(self, map_settings: Mapping[str, Any] | None = None, evaluator: Annotator | None = None) -> None:
        super().__init__(map_settings, evaluator)
        self.tolerances: set[int] = set()

    @property
    def figure_info(self) -> dict[str, FigureInfo]:  # type: ignore[override]
        """Name and direction of every figure; that of the tolerant F1 says the tolerances in pixels."""
        return {
            "nmse": FigureInfo("NMSE", "lower"),
            "nmse_median": FigureInfo("NMSE, median over images", "lower"),
            "f1": FigureInfo("F1", "higher"),
            f"f1@{self._tolerances}": FigureInfo(f"F1@{self._tolerances}", "higher"),
        }

    @property
    def _tolerances(self) -> str:
        return f"{'-'.join(str(px) for px in sorted(self.tolerances)) or '?'}px"

    @property
    def protocol(self) -> dict[str, Any]:
        """Adds the tolerance and its rule."""
        rule = f"{TOLERANCE} of the diagonal, at least 1 px, Euclidean"
        return {**super().protocol, "tolerance": rule, "tolerance_px": sorted(self.tolerances)}

    def update_maps(self, extracted: np.ndarray, target: np.ndarray, position: int | None = None) -> None:
        """Adds an image's map (H, W) and its hint, (H, W) or (H, W, 3), both uint8."""
        self.check_size(extracted, target)
        target = grey(target)
        p, g = extracted.astype(np.float64) / 255, target.astype(np.float64) / 255
        drawn, expected = extracted > 127, target > 127
        if not expected.any():
            self.skipped += 1
            return
        within = tolerance(*extracted.shape[:2])
        self.tolerances.add(within)
        near = (drawn & _near(expected, within)).sum(), (expected & _near(drawn, within)).sum()
        exact = (drawn & expected).sum(), drawn.sum(), expected.sum()
        self.add((((p - g) ** 2).sum(), (g**2).sum(), *exact, *near), position)

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """ "nmse", "f1", "f1@Npx"; N is the tolerance used."""
        error, energy, hits, drawn, expected, drawn_near, expected_near = np.moveaxis(sums, -1, 0)
        precision = np.where(drawn > 0, drawn_near / drawn, 0)
        recall = expected_near / expected
        both = precision + recall
        return {
            "nmse": error / energy,
            "f1": 2 * hits / (drawn + expected),
            f"f1@{self._tolerances}": np.where(both > 0, 2 * precision * recall / both, 0),
        }

    def merge(self, other: ImageFigures) -> None:
        """Adds what another process counted."""
        assert isinstance(other, EdgeScore)
        super().merge(other)
        self.tolerances |= other.tolerances


class SketchScore(EdgeScore):
    """The same for sketches, which are binary maps too."""

    cond = "sketch"


def _near(mask: np.ndarray, within: int) -> np.ndarray:
    """Pixels at most `within` (Euclidean) from a set pixel of the bool (H, W) `mask`."""
    if not mask.any():
        return np.zeros_like(mask)
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance <= within + 1e-4
