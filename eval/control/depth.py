"""Depth adherence: RMSE of the depth estimated from the drawn picture against the hint, on 0..255.

Relative depth has no unit, so both maps are first stretched to 0..255 by their own extremes; one far pixel moves all
of such a map, so the RMSE after the best scale and shift (least squares, as Ranftl et al. 2020, arXiv 1907.01341,
section 5, align predictions) stands beside it.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .base import ControlScore, grey


class DepthScore(ControlScore):
    """Means over pictures of each picture's RMSE."""

    cond = "depth"
    judged = True
    better: ClassVar[dict[str, str]] = {"rmse": "lower", "rmse_aligned": "lower"}

    def update_maps(self, found: np.ndarray, wanted: np.ndarray, position: int | None = None) -> None:
        """Adds a map (H, W) of the picture and the hint, uint8. A hint without any depth is skipped as empty."""
        self.fits(found, wanted)
        p, g = stretched(grey(found)), stretched(grey(wanted))
        if not g.any():
            self.skipped += 1
            return
        self.add((1, rmse(p, g), rmse(aligned(p, g), g)), position)

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """ "rmse", "rmse_aligned"; 0..255."""
        return {"rmse": sums[..., 1] / sums[..., 0], "rmse_aligned": sums[..., 2] / sums[..., 0]}


def stretched(map: np.ndarray) -> np.ndarray:
    """float64 (H, W) from 0 to 255; all 0 where the map is one value."""
    map = map.astype(np.float64) - map.min()
    return map * (255 / map.max()) if map.max() else map


def aligned(p: np.ndarray, g: np.ndarray) -> np.ndarray:
    """a p + b with the a and b that come nearest to g in squares."""
    spread = p.var()
    scale = ((p - p.mean()) * (g - g.mean())).mean() / spread if spread else 0.0
    return scale * (p - p.mean()) + g.mean()


def rmse(p: np.ndarray, g: np.ndarray) -> float:
    """Root of the mean squared difference."""
    return float(np.sqrt(((p - g) ** 2).mean()))
