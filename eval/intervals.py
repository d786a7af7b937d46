"""95 % intervals over images: a bootstrap for sums over images, a block jackknife for distances of whole sets.

A bootstrap repeats images, which looks like a narrower set to a Fréchet distance or a nearest neighbour; a jackknife
only leaves images out (Efron & Tibshirani 1993, chapters 11 and 13). Both are deterministic: the bootstrap is seeded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from scipy.stats import t as student

RESAMPLES, SEED, AT_ONCE = 1000, 0, 50
BLOCKS = 10
FEWEST = BLOCKS
"""Images below which there is no interval: resampling a handful of images says little about others."""
# Both texts are part of protocols: changing a word makes earlier evaluations incomparable.
BOOTSTRAP = f"percentile bootstrap over pictures, {RESAMPLES} resamples"
JACKKNIFE = f"jackknife over {BLOCKS} blocks of pictures"
TAIL = 2.5  # percent on each side

Interval = tuple[float, float]


class Estimate(NamedTuple):
    """A figure and its 95 % interval; None with too few images."""

    value: float
    interval: Interval | None


def jackknife(
    value: float, sizes: Sequence[int], without: Callable[[int], float], low: float = -np.inf, high: float = np.inf
) -> Estimate:
    """`value` with the interval value ± t SE, clipped to low..high; SE from `without(b)`, the figure without block b.

    sizes: images in each block. No interval where a block is empty, that is with fewer images than blocks.
    """
    if min(sizes) == 0:
        return Estimate(value, None)
    g = len(sizes)
    values = np.array([without(block) for block in range(g)])
    error = np.sqrt((g - 1) / g * ((values - values.mean()) ** 2).sum())
    half = float(student.ppf(1 - TAIL / 100, g - 1) * error)
    return Estimate(value, (max(low, value - half), min(high, value + half)))


def blocks_of(count: int, first: int, positions: Sequence[int] | None) -> np.ndarray:
    """The block of each of `count` images: its position in the set modulo BLOCKS.

    Without positions they count up from `first`.
    """
    indices = np.arange(first, first + count) if positions is None else np.asarray(positions)
    if len(indices) != count:
        raise ValueError(f"{count} images and {len(indices)} positions")
    return indices % BLOCKS


class ImageFigures(ABC):
    """Figures of a set that are functions of sums over its images: pooled ratios, means, medians.

    Each image contributes one small row of sums, so figures, per-image values and the bootstrap all come from the
    same function `figures`. Streaming and mergeable; float64.
    """

    medians: ClassVar[Mapping[str, str]] = {}
    """Figures that are the median over images of another figure: their key -> the other's."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._positions: list[int] = []

    @property
    def n(self) -> int:
        """Images counted."""
        return len(self._rows)

    @abstractmethod
    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Figures (...) by key from sums (..., K); NaN where undefined, e.g. a division by zero."""

    def add(self, row: Sequence[float] | np.ndarray, position: int | None = None) -> None:
        """Adds the row of sums (K,) of the image at `position` of the set; the next position by default."""
        self._rows.append(np.asarray(row, dtype=np.float64))
        self._positions.append(self._positions[-1] + 1 if position is None and self._positions else position or 0)

    def merge(self, other: ImageFigures) -> None:
        """Adds what another process counted."""
        self._rows += other._rows
        self._positions += other._positions

    def compute(self) -> dict[str, float]:
        """The figures of the set by key, without undefined ones."""
        figures = self._weighted(np.ones((1, self.n)))
        return {key: float(value[0]) for key, value in figures.items() if not np.isnan(value[0])}

    def intervals(self) -> dict[str, Interval]:
        """95 % interval of every figure of `compute`; {} with fewer than `FEWEST` images.

        Extended to the figure itself where resampling is biased, as it is for means over the classes present.
        """
        if self.n < FEWEST:
            return {}
        random = np.random.default_rng(SEED)
        parts = []
        for _ in range(0, RESAMPLES, AT_ONCE):
            drawn = random.integers(0, self.n, (AT_ONCE, self.n)) + self.n * np.arange(AT_ONCE)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=AT_ONCE * self.n).reshape(AT_ONCE, self.n)
            parts.append(self._weighted(counts.astype(np.float64)))
        intervals = {}
        for key, value in self.compute().items():
            low, high = np.nanpercentile(np.concatenate([part[key] for part in parts]), [TAIL, 100 - TAIL])
            intervals[key] = min(float(low), value), max(float(high), value)
        return intervals

    def per_image(self) -> dict[str, dict[int, float]]:
        """Each image's own figures: key -> position -> value."""
        with np.errstate(divide="ignore", invalid="ignore"):
            figures = self.figures(self.matrix()) if self.n else {}
        return {
            key: {at: float(v) for at, v in zip(self._positions, values, strict=True) if not np.isnan(v)}
            for key, values in figures.items()
        }

    def matrix(self) -> np.ndarray:
        """The rows as (N, K) float64."""
        return np.stack(self._rows)

    def resampled(self, counts: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Figures (R,) of R sets that contain image i counts[r, i] times; rows (N, K) as `matrix` returns them."""
        return self.figures(counts @ rows)

    def _weighted(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        rows = self.matrix()
        with np.errstate(divide="ignore", invalid="ignore"):
            figures = self.resampled(counts, rows)
            for key, source in self.medians.items():
                figures[key] = _medians(self.figures(rows)[source], counts)
        return figures


def _medians(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Median (R,) of each resample of values (N,) that contains value i counts[r, i] times."""
    order = np.argsort(values)
    values, cumulative = values[order], counts[:, order].cumsum(1)
    total = cumulative[:, -1:]
    lower, upper = ((cumulative <= middle).sum(1) for middle in ((total - 1) // 2, total // 2))
    return (values[lower] + values[upper]) / 2
