"""Figures over seeds: the interval is Student's, and nobody wins inside it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sctool.eval.bench.aggregate import best, not_told_apart, over_seeds, seed_figure
from sctool.eval.results import Figure


def figures(**spans: tuple[float, float] | None) -> dict[str, Figure]:
    return {
        name: Figure("fid", "FID", float(np.mean(span or (0, 0))), "lower", {}, span) for name, span in spans.items()
    }


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [10.0, 10.5, 9.5, 11.0, 10.2]])
def test_the_interval_is_students(values: list[float]) -> None:
    value, interval = over_seeds(values)
    expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert value == pytest.approx(np.mean(values))
    assert interval == pytest.approx(expected)


def test_fewer_than_three_seeds_have_no_interval() -> None:
    assert over_seeds([1.0, 2.0]) == (1.5, None)
    assert over_seeds([1.0]) == (1.0, None)
    assert over_seeds([1.0, 1.0, 1.0]).interval == (1.0, 1.0)


def test_a_figure_of_seeds_says_how_its_interval_was_made() -> None:
    figure = seed_figure("fid", "FID", "lower", {2: 3.0, 0: 1.0, 1: 2.0}, {"n": 8})
    assert figure.value == 2
    assert figure.protocol["n"] == 8
    assert figure.protocol["seeds"] == [0, 1, 2]
    assert "Student" in figure.protocol["interval"]


def test_nobody_wins_inside_an_interval() -> None:
    assert best(figures(a=(1, 2), b=(3, 4), c=(5, 6))) == "a"
    assert best(figures(a=(1, 3), b=(2, 4))) is None
    assert best(figures(a=(1, 2), b=(3, 4), c=(1.5, 9))) is None, "the runner-up is not the only one that may overlap"
    assert best(figures(a=None, b=None)) is None
    assert best(figures(a=(1, 2))) is None, "one method alone has beaten nobody"


def test_pairs_that_overlap_are_listed() -> None:
    spans = figures(a=(1, 3), b=(2, 4), c=(3.5, 6), d=(7, 8))
    assert not_told_apart(spans) == [("a", "b"), ("b", "c")]
    assert not_told_apart(figures(a=None, b=None)) == []
