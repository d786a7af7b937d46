"""Figures over seeds: means with Student's t intervals, and which methods they tell apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import t as student

from ..intervals import TAIL, Estimate
from ..report.compare import winner
from ..results import Figure
from .settings import FEWEST_SEEDS

INTERVAL = "95 % interval of the mean over seeds, Student's t"


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value per seed, and mean ± t SE; no interval with fewer than `FEWEST_SEEDS`."""
    array = np.asarray(values, np.float64)
    mean, n = float(array.mean()), len(array)
    if n < FEWEST_SEEDS:
        return Estimate(mean, None)
    half = float(student.ppf(1 - TAIL / 100, n - 1) * array.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, (mean - half, mean + half))


def seed_figure(key: str, name: str, better: str, values: Mapping[int, float], protocol: Mapping[str, Any]) -> Figure:
    """One figure of a method: the mean of its value with each seed, and its interval."""
    mean, interval = over_seeds(list(values.values()))
    return Figure(key, name, mean, better, {**protocol, "interval": INTERVAL, "seeds": sorted(values)}, interval)


def best(figures: Mapping[str, Figure]) -> str | None:
    """The method whose interval is better than every other's and overlaps none; None where there is no such one."""
    index, _ = winner(list(figures.values()))
    return None if index is None else list(figures)[index]


def not_told_apart(figures: Mapping[str, Figure]) -> list[tuple[str, str]]:
    """Pairs of methods whose intervals overlap; [] where there are no intervals."""
    spans = {name: figure.interval for name, figure in figures.items() if figure.interval}
    return [(a, b) for a, b in combinations(spans, 2) if spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]]
