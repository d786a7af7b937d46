"""Figures over seeds: means and paired differences with Student's t intervals, and which rows they tell apart.

A seed decides data order, noise and drawn captions for all rows alike, so it moves all of them together. Rows are
therefore compared by their differences seed by seed, whose interval is often much narrower than those of the means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import t as student

from ..intervals import TAIL, Estimate
from ..results import Figure
from .settings import FEWEST_SEEDS

INTERVAL = "95 % interval of the mean over seeds, Student's t"
PAIRED = "95 % interval of the mean difference seed by seed, Student's t, each comparison by itself"

Values = Mapping[int, float]
"""One value per seed."""


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value per seed, and mean ± t SE; no interval with fewer than `FEWEST_SEEDS`."""
    array = np.asarray(values, np.float64)
    mean, n = float(array.mean()), len(array)
    if n < FEWEST_SEEDS:
        return Estimate(mean, None)
    half = float(student.ppf(1 - TAIL / 100, n - 1) * array.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, (mean - half, mean + half))


def seed_figure(key: str, name: str, better: str, values: Values, protocol: Mapping[str, Any]) -> Figure:
    """One figure of a row: the mean of its value with each seed, and its interval."""
    mean, interval = over_seeds(list(values.values()))
    return Figure(key, name, mean, better, {**protocol, "interval": INTERVAL, "seeds": sorted(values)}, interval)


def difference(values: Values, reference: Values) -> Estimate | None:
    """The mean of values - reference over the seeds that both have, and its interval; None where they share no seed."""
    seeds = sorted(values.keys() & reference.keys())
    return over_seeds([values[seed] - reference[seed] for seed in seeds]) if seeds else None


def leader(rows: Mapping[str, Values], better: str) -> str | None:
    """The row with the best mean; None without rows, or where neither direction is better."""
    if not rows or not better:
        return None
    sign = 1 if better == "lower" else -1
    return min(rows, key=lambda name: sign * over_seeds(list(rows[name].values())).value)


def best(rows: Mapping[str, Values], better: str) -> str | None:
    """The leader where every other row's paired difference to it is worse beyond its interval; else None."""
    first = leader(rows, better)
    if first is None or len(rows) < 2:
        return None
    others = [difference(values, rows[first]) for name, values in rows.items() if name != first]
    return first if all(one is not None and _worse(one, better) for one in others) else None


def _worse(found: Estimate, better: str) -> bool:
    """Whether a difference is on the worse side with its whole interval."""
    if found.interval is None:
        return False
    return found.interval[0] > 0 if better == "lower" else found.interval[1] < 0


def not_told_apart(rows: Mapping[str, Values]) -> list[tuple[str, str]]:
    """Pairs of rows whose paired difference may be zero by its interval; [] where there are no intervals."""
    pairs = []
    for a, b in combinations(rows, 2):
        found = difference(rows[a], rows[b])
        if found and found.interval and found.interval[0] <= 0 <= found.interval[1]:
            pairs.append((a, b))
    return pairs
