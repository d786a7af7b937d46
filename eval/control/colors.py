"""Colour adherence: the palette of the drawn picture against the hint's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import cv2
import numpy as np

from ...annotators.color import FILTERS
from .base import ControlScore


class ColorScore(ControlScore):
    """Mean absolute difference, 0..255, of the picture's palette and the hint's, over cells and channels."""

    cond = "color"
    better: ClassVar[dict[str, str]] = {"distance": "lower"}

    def extract(self, pictures: list[np.ndarray], keys: Sequence[str]) -> list[np.ndarray]:
        """The pictures themselves: how many cells a palette has is known from the hint alone."""
        return pictures

    def update_maps(self, found: np.ndarray, wanted: np.ndarray, position: int | None = None) -> None:
        """Compares palettes with as many cells as the hint shows: a hint resized with its picture still fits."""
        rows, columns = cells(wanted)
        filter = FILTERS[getattr(self.annotator.settings, "filter", "cubic")]
        palette = cv2.resize(found, (columns, rows), interpolation=filter)
        there = cv2.resize(wanted, (columns, rows), interpolation=cv2.INTER_NEAREST)
        self.add((1, float(np.abs(palette.astype(np.float64) - there).mean())), position)

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """ "distance": mean over pictures."""
        return {"distance": sums[..., 1] / sums[..., 0]}


def cells(hint: np.ndarray) -> tuple[int, int]:
    """How many rows and columns of equal, about square cells an enlarged palette (H, W, 3) consists of.

    The fewest that explain every change of colour; neighbours may have one colour, so the finer axis decides.
    """
    sides = hint.shape[:2]
    finest = min(side / _fewest(hint, axis) for axis, side in enumerate(sides))
    return max(1, round(sides[0] / finest)), max(1, round(sides[1] / finest))


def _fewest(hint: np.ndarray, axis: int) -> int:
    """The fewest equal cells along `axis` with a border at each change."""
    lines = np.moveaxis(hint, axis, 0).reshape(hint.shape[axis], -1)
    changes = np.flatnonzero((lines[1:] != lines[:-1]).any(1))
    place = np.arange(len(lines))
    for count in range(1 + bool(len(changes)), len(lines)):
        cell = place * count // len(lines)  # as nearest-neighbour enlargement does
        if (cell[changes] != cell[changes + 1]).all():
            return count
    return len(lines)
