"""Preservation: what inpainting and outpainting should have left as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from .base import ControlScore


class OutsideScore(ControlScore):
    """Mean absolute difference, 0..255, of picture and hint outside the hole, and the mean share of the hole.

    The hole is where the hint is black, as `core/data/conditions.py` renders masks.
    """

    cond = "mask"
    better: ClassVar[dict[str, str]] = {"outside": "lower", "hole": ""}

    def extract(self, pictures: list[np.ndarray], keys: Sequence[str]) -> list[np.ndarray]:
        """The pictures themselves."""
        return pictures

    def update_maps(self, found: np.ndarray, wanted: np.ndarray, position: int | None = None) -> None:
        """Pictures that are all hole are skipped."""
        kept = wanted.any(2)
        if not kept.any():
            self.skipped += 1
            return
        difference = np.abs(found[kept].astype(np.float64) - wanted[kept]).mean(1).sum()
        self.add((1, difference, kept.sum(), 1 - kept.mean()), position)

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """ "outside": pooled over pixels; "hole": mean share of the picture."""
        return {"outside": sums[..., 1] / sums[..., 2], "hole": sums[..., 3] / sums[..., 0]}

    def drawn(self, picture: np.ndarray, key: str) -> np.ndarray:
        """The picture: nothing is extracted."""
        return picture


class OutpaintScore(OutsideScore):
    """The same for outpainting, whose hole is the frame."""

    cond = "outpaint"
