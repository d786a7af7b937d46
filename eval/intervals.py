"""95 % intervals over pictures: a bootstrap for sums over pictures, a block jackknife for distances of whole sets.

A bootstrap draws pictures twice, which a Fréchet distance or a nearest neighbour takes for a narrower set; a jackknife
leaves out and never repeats (Efron & Tibshirani 1993, chapters 11 and 13). Both are seeded or free of chance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from scipy.stats import t as student

RESAMPLES, SEED, AT_ONCE = 1000, 0, 50
BLOCKS = 10
BOOTSTRAP = f"percentile bootstrap over pictures, {RESAMPLES} resamples"
JACKKNIFE = f"jackknife over {BLOCKS} blocks of pictures"
TAIL = 2.5  # percent on either side

Interval = tuple[float, float]


class Estimate(NamedTuple):
    """A figure and its 95 % interval; None where there are too few pictures for one."""

    value: float
    interval: Interval | None


def jackknife(
    value: float, sizes: Sequence[int], without: Callable[[int], float], low: float = -np.inf, high: float = np.inf
) -> Estimate:
    """`value` with value ± t SE, SE from `without(b)`, the figure when block b is left out; kept within low..high.

    sizes: pictures in each block. No interval where a block is empty: there were fewer pictures than blocks.
    """
    if min(sizes) == 0:
        return Estimate(value, None)
    g = len(sizes)
    left = np.array([without(block) for block in range(g)])
    error = np.sqrt((g - 1) / g * ((left - left.mean()) ** 2).sum())
    half = float(student.ppf(1 - TAIL / 100, g - 1) * error)
    return Estimate(value, (max(low, value - half), min(high, value + half)))


def blocks_of(count: int, first: int, positions: Sequence[int] | None) -> np.ndarray:
    """The block of each of `count` pictures: its position in the set modulo BLOCKS.

    Positions go on from `first` where none are given.
    """
    where = np.arange(first, first + count) if positions is None else np.asarray(positions)
    if len(where) != count:
        raise ValueError(f"{count} pictures and {len(where)} positions")
    return where % BLOCKS


class PictureFigures(ABC):
    """Figures of a set that are functions of sums over its pictures: pooled ratios, means, medians.

    A picture is one small row of sums, so figures, per-picture values and the bootstrap all come from the same
    function `figures`. Streaming and mergeable; float64.
    """

    medians: ClassVar[Mapping[str, str]] = {}
    """Figures that are the median over pictures of another one, by that one's name."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._positions: list[int] = []

    @property
    def n(self) -> int:
        """Pictures counted."""
        return len(self._rows)

    @abstractmethod
    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Figures (...) by name of sums (..., K); NaN where there is none, e.g. by division by zero."""

    def add(self, row: Sequence[float] | np.ndarray, position: int | None = None) -> None:
        """Adds a picture's row of sums (K,) that stands at `position` of the set; the next one by default."""
        self._rows.append(np.asarray(row, dtype=np.float64))
        self._positions.append(self._positions[-1] + 1 if position is None and self._positions else position or 0)

    def merge(self, other: PictureFigures) -> None:
        """Adds what another process has counted."""
        self._rows += other._rows
        self._positions += other._positions

    def compute(self) -> dict[str, float]:
        """The figures of the set by name, without those that no picture has."""
        found = self._of(np.ones((1, self.n)))
        return {name: float(value[0]) for name, value in found.items() if not np.isnan(value[0])}

    def intervals(self) -> dict[str, Interval]:
        """95 % interval of every figure of `compute`; {} for a single picture.

        Widened to the figure itself where resampling is biased, as means over the classes that are present are.
        """
        if self.n < 2:
            return {}
        random = np.random.default_rng(SEED)
        parts = []
        for _ in range(0, RESAMPLES, AT_ONCE):
            drawn = random.integers(0, self.n, (AT_ONCE, self.n)) + self.n * np.arange(AT_ONCE)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=AT_ONCE * self.n).reshape(AT_ONCE, self.n)
            parts.append(self._of(counts.astype(np.float64)))
        made = {}
        for name, value in self.compute().items():
            low, high = np.nanpercentile(np.concatenate([part[name] for part in parts]), [TAIL, 100 - TAIL])
            made[name] = min(float(low), value), max(float(high), value)
        return made

    def each(self) -> dict[str, dict[int, float]]:
        """Each picture's own figures: name -> position -> value."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = self.figures(self.matrix()) if self.n else {}
        return {
            name: {at: float(v) for at, v in zip(self._positions, values, strict=True) if not np.isnan(v)}
            for name, values in found.items()
        }

    def matrix(self) -> np.ndarray:
        """The rows as (N, K) float64."""
        return np.stack(self._rows)

    def resampled(self, counts: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Figures (R,) of R sets in which picture i stands counts[r, i] times; rows (N, K) as `matrix` gives them."""
        return self.figures(counts @ rows)

    def _of(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        rows = self.matrix()
        with np.errstate(divide="ignore", invalid="ignore"):
            found = self.resampled(counts, rows)
            for name, source in self.medians.items():
                found[name] = _medians(self.figures(rows)[source], counts)
        return found


def _medians(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Median (R,) of each resample of values (N,) that holds value i counts[r, i] times."""
    order = np.argsort(values)
    values, upto = values[order], counts[:, order].cumsum(1)
    total = upto[:, -1:]
    lower, upper = ((upto <= middle).sum(1) for middle in ((total - 1) // 2, total // 2))
    return (values[lower] + values[upper]) / 2
