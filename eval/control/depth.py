"""Depth adherence: RMSE of the depth estimated from the drawn image against the hint, on a scale of 0..255.

Relative depth has no unit, so both maps are first stretched to 0..255 by their own extremes. One far pixel changes the
whole of such a map, so there is also the RMSE after the best scale and shift (least squares, as Ranftl et al. 2020,
arXiv 1907.01341, section 5, align predictions).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ..metrics import FigureInfo
from .base import ControlScore, grey


class DepthScore(ControlScore):
    """Means over images of each image's RMSE."""

    cond = "depth"
    independent = True
    figure_info: ClassVar[dict[str, FigureInfo]] = {
        "rmse": FigureInfo("RMSE (0-255)", "lower"),
        "rmse_aligned": FigureInfo("RMSE, scale and shift aligned (0-255)", "lower"),
    }

    def update_maps(self, extracted: np.ndarray, target: np.ndarray, position: int | None = None) -> None:
        """Adds an image's map (H, W) and its hint, uint8. A hint with a single depth is skipped as empty."""
        self.check_size(extracted, target)
        p, g = stretched(grey(extracted)), stretched(grey(target))
        if not g.any():
            self.skipped += 1
            return
        self.add((1, rmse(p, g), rmse(aligned(p, g), g)), position)

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """ "rmse", "rmse_aligned"; 0..255."""
        return {"rmse": sums[..., 1] / sums[..., 0], "rmse_aligned": sums[..., 2] / sums[..., 0]}


def stretched(map: np.ndarray) -> np.ndarray:
    """float64 (H, W) from 0 to 255; all 0 for a constant map."""
    map = map.astype(np.float64) - map.min()
    return map * (255 / map.max()) if map.max() else map


def aligned(p: np.ndarray, g: np.ndarray) -> np.ndarray:
    """a p + b with the a and b that fit g best in least squares."""
    variance = p.var()
    scale = ((p - p.mean()) * (g - g.mean())).mean() / variance if variance else 0.0
    return scale * (p - p.mean()) + g.mean()


def rmse(p: np.ndarray, g: np.ndarray) -> float:
    """Root of the mean squared difference."""
    return float(np.sqrt(((p - g) ** 2).mean()))
