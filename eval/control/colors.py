"""Colour adherence: the palette of the drawn image against the hint's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import cv2
import numpy as np

from ...annotators.color import FILTERS
from ..metrics import FigureInfo
from .base import ControlScore


class ColorScore(ControlScore):
    """Mean absolute difference, 0..255, of the image's palette and the hint's, over cells and channels."""

    cond = "color"
    figure_info: ClassVar[dict[str, FigureInfo]] = {"distance": FigureInfo("palette difference (0-255)", "lower")}

    def extract(self, images: list[np.ndarray], keys: Sequence[str]) -> list[np.ndarray]:
        """The images themselves: only the hint shows how many cells the palette has."""
        return images

    def update_maps(self, extracted: np.ndarray, target: np.ndarray, position: int | None = None) -> None:
        """Compares palettes with as many cells as the hint shows, so a hint resized with its image still fits."""
        rows, columns = cells(target)
        filter = FILTERS[getattr(self.annotator.settings, "filter", "cubic")]
        palette = cv2.resize(extracted, (columns, rows), interpolation=filter)
        expected = cv2.resize(target, (columns, rows), interpolation=cv2.INTER_NEAREST)
        self.add((1, float(np.abs(palette.astype(np.float64) - expected).mean())), position)

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """ "distance": mean over images."""
        return {"distance": sums[..., 1] / sums[..., 0]}


def cells(hint: np.ndarray) -> tuple[int, int]:
    """Rows and columns of the equal, roughly square cells of an enlarged palette (H, W, 3).

    The fewest that explain every change of colour; neighbours may have the same colour, so the finer axis decides.
    """
    sides = hint.shape[:2]
    finest = min(side / _fewest(hint, axis) for axis, side in enumerate(sides))
    return max(1, round(sides[0] / finest)), max(1, round(sides[1] / finest))


def _fewest(hint: np.ndarray, axis: int) -> int:
    """The fewest equal cells along `axis` with a border at every change."""
    lines = np.moveaxis(hint, axis, 0).reshape(hint.shape[axis], -1)
    changes = np.flatnonzero((lines[1:] != lines[:-1]).any(1))
    positions = np.arange(len(lines))
    for count in range(1 + bool(len(changes)), len(lines)):
        cell = positions * count // len(lines)  # as nearest-neighbour enlargement does
        if (cell[changes] != cell[changes + 1]).all():
            return count
    return len(lines)
