"""Preservation: what inpainting and outpainting should have left unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ..metrics import FigureInfo
from .base import ControlScore


class OutsideScore(ControlScore):
    """Mean absolute difference, 0..255, of image and hint outside the hole, and the hole's mean share of the image.

    The hole is where the hint is black, as `core/data/conditions.py` renders masks.
    """

    cond = "mask"
    figure_info: ClassVar[dict[str, FigureInfo]] = {
        "outside": FigureInfo("change outside the hole (0-255)", "lower"),
        "hole": FigureInfo("hole's share of the image", ""),
    }

    def extract(self, images: list[np.ndarray], keys: Sequence[str]) -> list[np.ndarray]:
        """The images themselves."""
        return images

    def update_maps(self, extracted: np.ndarray, target: np.ndarray, position: int | None = None) -> None:
        """Adds an image and its hint, uint8 (H, W, 3). A hint that is all hole is skipped as empty."""
        outside = target.any(2)
        if not outside.any():
            self.skipped += 1
            return
        difference = np.abs(extracted[outside].astype(np.float64) - target[outside]).mean(1).sum()
        self.add((1, difference, outside.sum(), 1 - outside.mean()), position)

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """ "outside": pooled over pixels; "hole": mean share of the image."""
        return {"outside": sums[..., 1] / sums[..., 2], "hole": sums[..., 3] / sums[..., 0]}

    def extracted_image(self, image: np.ndarray, key: str) -> np.ndarray:
        """The image: nothing is extracted."""
        return image


class OutpaintScore(OutsideScore):
    """The same for outpainting, where the hole is the frame."""

    cond = "outpaint"
