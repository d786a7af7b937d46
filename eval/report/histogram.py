"""A histogram of per-image values as SVG: one series per folder, overlaid, means marked; the page sets the colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 34, 10, 8, 40
FENCE = 3.0  # interquartile ranges beyond the quartiles: Tukey's outer fence
MOST_BINS = 30


def histogram(series: Mapping[str, Sequence[float]], name: str) -> tuple[Markup, int]:
    """The SVG of `series` (finite values by label), and how many values lie beyond its axis.

    All series share their bins: Rice's rule over the pooled values, within Tukey's outer fences, so that an outlier
    does not push the others into a single bar. Values beyond the axis are counted in the outermost bars.
    """
    pooled = np.concatenate([np.asarray(values, np.float64) for values in series.values()])
    low, high = _limits(pooled)
    bins = min(MOST_BINS, math.ceil(2 * len(pooled) ** (1 / 3)))
    edges = np.linspace(low, high, bins + 1)
    counts = [np.histogram(np.clip(values, low, high), edges)[0] for values in series.values()]
    most = max(int(count.max()) for count in counts)

    def x(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(count: float) -> float:
        return round(HEIGHT - BOTTOM - count / most * (HEIGHT - BOTTOM - TOP), 1)

    parts = []
    for index, count in enumerate(counts):
        steps = "".join(f"V{y(n)}H{x(end)}" for n, end in zip(count, edges[1:], strict=True))
        parts.append(f'<path class="series-{index}" d="M{x(low)} {y(0)}{steps}V{y(0)}Z"/>')
    for index, values in enumerate(series.values()):
        mean = x(float(np.clip(np.mean(values), low, high)))
        parts.append(f'<path class="mean-{index}" d="M{mean} {y(0)}V{TOP}"/>')
    for tick in ticks(low, high):
        parts.append(f'<path class="axis" d="M{x(tick)} {y(0)}v4"/>')
        parts.append(f'<text x="{x(tick)}" y="{y(0) + 16}" text-anchor="middle">{tick:g}</text>')
    for count in (0, most):
        parts.append(f'<text x="{LEFT - 5}" y="{y(count) + 4}" text-anchor="end">{count}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{y(0)}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(name)}</text>')
    parts.append(f'<text transform="translate(12 {y(most / 2)}) rotate(-90)" text-anchor="middle">images</text>')
    means = "; ".join(f"{label}: mean {np.mean(values):.4g}" for label, values in series.items())
    label = escape(f"Histogram of {name} over images. {means}")
    svg = f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{label}">{"".join(parts)}</svg>'
    return Markup(svg), int(((pooled < low) | (pooled > high)).sum())


def _limits(pooled: np.ndarray) -> tuple[float, float]:
    """The limits of the axis: the extremes, or the fences if values lie beyond them; never empty."""
    low, first, third, high = np.quantile(pooled, (0, 0.25, 0.75, 1))
    if third > first:
        low, high = max(low, first - FENCE * (third - first)), min(high, third + FENCE * (third - first))
    if high - low <= 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    return float(low), float(high)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About `about` round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
