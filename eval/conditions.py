"""What every control metric is, and the table of them: how far a picture keeps to the hint that it was drawn from.

A metric re-extracts the condition from the drawn picture by the annotator and parameters that made the hint, and
compares the two. Sums are streaming and mergeable; pictures whose hint is empty are skipped and counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import cv2
import numpy as np

from ..annotators import ANNOTATORS
from ..annotators.base import Annotator
from ..annotators.color import FILTERS
from ..core.errors import SctoolError


class ControlScore(ABC):
    """One condition's adherence over a set of pictures."""

    cond: ClassVar[str]
    better: ClassVar[dict[str, str]]
    """Which way each figure is better: "lower" or "higher"."""

    def __init__(self, made: Mapping[str, Any] | None = None) -> None:
        """`made` says how the hint was made, as tuner files keep it; the annotator's defaults when it does not."""
        cls = ANNOTATORS[self.cond]
        known = {key: value for key, value in (made or {}).items() if key in cls.Settings.model_fields}
        self.annotator: Annotator = cls(cls.Settings.model_validate(known))
        self.n = self.skipped = 0

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that decides the figures besides pictures and hints."""
        return {"annotator": self.annotator.id, "opencv": cv2.__version__}

    @abstractmethod
    def update(self, picture: np.ndarray, hint: np.ndarray, key: str = "") -> None:
        """Adds a drawn picture and its hint, both uint8 (H, W, 3). Raises `SctoolError` when their sizes differ."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The figures by name. Raises `SctoolError` when every hint was empty."""

    def merge(self, other: ControlScore) -> None:
        """Adds what another process has counted; subclasses add their sums."""
        self.n, self.skipped = self.n + other.n, self.skipped + other.skipped

    def _fits(self, picture: np.ndarray, hint: np.ndarray) -> None:
        if picture.shape[:2] != hint.shape[:2]:
            raise SctoolError(
                f"its {self.cond} hint is {hint.shape[1]}x{hint.shape[0]} px, "
                f"the picture {picture.shape[1]}x{picture.shape[0]} px"
            )

    def _counted(self) -> None:
        if not self.n:
            raise SctoolError(f"no picture has a {self.cond} hint that is not empty ({self.skipped} empty ones).")


class ColorScore(ControlScore):
    """Mean absolute difference, 0..255, of the picture's palette and the hint's, over cells and channels."""

    cond = "color"
    better: ClassVar[dict[str, str]] = {"distance": "lower"}

    def __init__(self, made: Mapping[str, Any] | None = None) -> None:
        super().__init__(made)
        self._sum = 0.0

    def update(self, picture: np.ndarray, hint: np.ndarray, key: str = "") -> None:
        """Compares palettes with as many cells as the hint shows: a hint resized with its picture still fits."""
        self._fits(picture, hint)
        rows, columns = cells(hint)
        filter = FILTERS[getattr(self.annotator.settings, "filter", "cubic")]
        palette = cv2.resize(picture, (columns, rows), interpolation=filter)
        wanted = cv2.resize(hint, (columns, rows), interpolation=cv2.INTER_NEAREST)
        self._sum += float(np.abs(palette.astype(np.float64) - wanted).mean())
        self.n += 1

    def merge(self, other: ControlScore) -> None:
        """Adds the other's sums."""
        assert isinstance(other, ColorScore)
        super().merge(other)
        self._sum += other._sum

    def compute(self) -> dict[str, float]:
        """{"distance": mean over pictures}."""
        self._counted()
        return {"distance": self._sum / self.n}


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


class OutsideScore(ControlScore):
    """Mean absolute difference, 0..255, of picture and hint outside the hole: what inpainting should have kept.

    The hole is where the hint is black, as `core/data/hints.py` renders masks. Also the mean share of the hole.
    """

    cond = "mask"
    better: ClassVar[dict[str, str]] = {"outside": "lower", "hole": ""}

    def __init__(self, made: Mapping[str, Any] | None = None) -> None:
        super().__init__(made)
        self._difference, self._pixels, self._hole = 0.0, 0, 0.0

    def update(self, picture: np.ndarray, hint: np.ndarray, key: str = "") -> None:
        """Pictures that are all hole are skipped."""
        self._fits(picture, hint)
        kept = hint.any(2)
        if not kept.any():
            self.skipped += 1
            return
        self._difference += float(np.abs(picture[kept].astype(np.float64) - hint[kept]).mean(1).sum())
        self._pixels += int(kept.sum())
        self._hole += float(1 - kept.mean())
        self.n += 1

    def merge(self, other: ControlScore) -> None:
        """Adds the other's sums."""
        assert isinstance(other, OutsideScore)
        super().merge(other)
        self._difference += other._difference
        self._pixels += other._pixels
        self._hole += other._hole

    def compute(self) -> dict[str, float]:
        """{"outside": pooled over pixels, "hole": mean share of the picture}."""
        self._counted()
        return {"outside": self._difference / self._pixels, "hole": self._hole / self.n}


def scores() -> dict[str, type[ControlScore]]:
    """The table: condition -> metric."""
    from .edges import EdgeScore

    return {cls.cond: cls for cls in (EdgeScore, ColorScore, OutsideScore)}


def measures(conds: Sequence[str], made: Mapping[str, Any]) -> dict[str, Callable[..., dict[str, float]]]:
    """For each condition that can be measured, a function (pictures, hints[, keys]) -> figures by name.

    pictures, hints: uint8 (H, W, 3) each; `made` as in `ControlScore`. Without any hint that is not empty: {}.
    """

    def measure(cls: type[ControlScore]) -> Callable[..., dict[str, float]]:
        def figures(
            pictures: Sequence[np.ndarray], hints: Sequence[np.ndarray], keys: Sequence[str] | None = None
        ) -> dict[str, float]:
            score = cls(made.get(cls.cond))
            for picture, hint, key in zip(pictures, hints, keys or [""] * len(hints), strict=True):
                score.update(picture, hint, key)
            return score.compute() if score.n else {}

        return figures

    return {name: measure(cls) for name, cls in scores().items() if name in conds}
