"""Curves over training steps as SVG, one per method; the page sets the colours."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup, escape

from .histogram import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, ticks

MARGIN = LEFT + 14
"""Room for the numbers of the vertical axis."""


def curves(series: Mapping[str, Mapping[int, float]], name: str, colours: int) -> Markup | None:
    """The SVG of values by step, for each label; None where no curve has two points.

    Curve number i has the class "line-" and i modulo `colours`.
    """
    steps = [step for values in series.values() for step in values]
    values = [value for one in series.values() for value in one.values()]
    if len(set(steps)) < 2:
        return None
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    if high - low <= 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5

    def x(step: float) -> float:
        return round(MARGIN + (step - first) / (last - first) * (WIDTH - MARGIN - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP), 1)

    parts = [f'<path class="axis" d="M{MARGIN} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>']
    for index, one in enumerate(series.values()):
        points = " ".join(f"{x(step)},{y(value)}" for step, value in sorted(one.items()))
        parts.append(f'<polyline class="line-{index % colours}" points="{points}"/>')
    for tick in ticks(first, last):
        parts.append(f'<text x="{x(tick)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in ticks(low, high, 4):
        parts.append(f'<text x="{MARGIN - 5}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    middle = (MARGIN + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(name)}</text>')
    label = escape(f"{name}: {', '.join(series)}")
    svg = f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{label}">{"".join(parts)}</svg>'
    return Markup(svg)
