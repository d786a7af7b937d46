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
from typing import Any

import cv2
import numpy as np

from .conditions import ControlScore

TOLERANCE = 0.004
"""Share of the diagonal within which an edge pixel counts as found."""


def tolerance(height: int, width: int) -> int:
    """Pixels of tolerance for a picture: 2 at 512x512, 5 at 1024x1024, never less than 1."""
    return max(1, math.floor(TOLERANCE * math.hypot(height, width)))


class EdgeScore(ControlScore):
    """Streaming sums over pictures of NMSE, F1, F1 within tolerance, and the median of per-picture NMSEs."""

    cond = "canny"

    def __init__(self, made: Mapping[str, Any] | None = None) -> None:
        super().__init__(made)
        self._error = self._energy = 0.0
        self._exact = np.zeros(3, np.int64)  # hits, edge pixels of p, edge pixels of g
        self._near = np.zeros(2, np.int64)  # edge pixels of p near g, of g near p
        self._each: list[float] = []
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

    def update(self, picture: np.ndarray, hint: np.ndarray, key: str = "") -> None:
        """Extracts the picture's edges with the hint's thresholds (those of `key` where they were drawn at random)."""
        self._fits(picture, hint)
        self.update_maps(self.annotator.annotate(np.ascontiguousarray(picture), key)[0], hint)

    def update_maps(self, edges: np.ndarray, hint: np.ndarray) -> None:
        """Adds a map (H, W) of the picture and the hint, (H, W) or (H, W, 3), both uint8."""
        self._fits(edges, hint)
        wanted = hint if hint.ndim == 2 else hint.max(2)
        p, g = edges.astype(np.float64) / 255, wanted.astype(np.float64) / 255
        energy = float((g**2).sum())
        found, there = edges > 127, wanted > 127
        if not energy or not there.any():
            self.skipped += 1
            return
        error = float(((p - g) ** 2).sum())
        self.n += 1
        self._error += error
        self._energy += energy
        self._each.append(error / energy)
        self._exact += np.array([(found & there).sum(), found.sum(), there.sum()])
        within = tolerance(*edges.shape[:2])
        self.tolerances.add(within)
        self._near += np.array([(found & _near(there, within)).sum(), (there & _near(found, within)).sum()])

    def merge(self, other: ControlScore) -> None:
        """Adds the other's sums."""
        assert isinstance(other, EdgeScore)
        super().merge(other)
        self._error += other._error
        self._energy += other._energy
        self._each += other._each
        self._exact += other._exact
        self._near += other._near
        self.tolerances |= other.tolerances

    def compute(self) -> dict[str, float]:
        """{"nmse", "nmse_median", "f1", "f1@Npx"}; N is the tolerance that was used."""
        self._counted()
        hits, found, there = (int(x) for x in self._exact)
        precision = self._near[0] / found if found else 0.0
        recall = self._near[1] / there
        both = precision + recall
        return {
            "nmse": self._error / self._energy,
            "nmse_median": float(np.median(self._each)),
            "f1": 2 * hits / (found + there),
            self._near_name: float(2 * precision * recall / both) if both else 0.0,
        }


def _near(mask: np.ndarray, within: int) -> np.ndarray:
    """Pixels at most `within` (Euclidean) from a set pixel of the bool (H, W) `mask`."""
    if not mask.any():
        return np.zeros_like(mask)
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance <= within + 1e-4
