"""Figures over seeds: Student's intervals, rows compared seed by seed, and nobody wins inside an interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sctool.eval.bench.aggregate import best, difference, leader, not_told_apart, over_seeds, seed_figure


def rows(**values: list[float]) -> dict[str, dict[int, float]]:
    return {name: dict(enumerate(own)) for name, own in values.items()}


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


def test_differences_are_paired_by_seed() -> None:
    """Differences 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.3027, so 2 ± 4.3027 / sqrt 3."""
    ours, theirs = {0: 11.0, 1: 22.0, 2: 33.0, 7: 1.0}, {2: 30.0, 1: 20.0, 0: 10.0, 5: 99.0}
    found = difference(ours, theirs)
    assert found is not None
    assert found.value == pytest.approx(2)
    assert found.interval == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-5)
    assert difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0}) == (1.5, None)
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_seeds_that_move_all_rows_together_do_not_hide_a_difference() -> None:
    """The single intervals overlap almost completely; the paired difference is 1 ± 0.2."""
    found = rows(a=[10, 20, 30], b=[11.0, 20.9, 31.1])
    spans = [over_seeds(list(values.values())).interval for values in found.values()]
    assert spans[0]
    assert spans[1]
    assert spans[1][0] < spans[0][1]
    assert best(found, "lower") == "a"
    assert best(found, "higher") == "b"
    assert not_told_apart(found) == []


def test_nobody_wins_inside_an_interval() -> None:
    assert best(rows(a=[1, 2, 3], b=[2, 3, 4.1], c=[9, 9, 9]), "lower") == "a"
    assert best(rows(a=[1, 2, 3], b=[2, 1, 4]), "lower") is None
    assert best(rows(a=[1, 2, 3], b=[2, 3, 4.1], c=[9, 1, 9]), "lower") is None, "the runner-up is not the only one"
    assert best(rows(a=[1, 2], b=[3, 4]), "lower") is None, "two seeds have no interval"
    assert best(rows(a=[1, 2, 3]), "lower") is None, "one row alone has beaten nobody"
    assert best(rows(a=[1, 1, 1], b=[1, 1, 1]), "lower") is None
    assert best(rows(a=[1, 2, 3], b=[2, 3, 4]), "") is None
    assert leader({}, "lower") is None
    assert leader(rows(a=[1, 2], b=[3, 4]), "higher") == "b"


def test_pairs_that_may_be_equal_are_listed() -> None:
    found = rows(a=[1, 2, 3], b=[1.1, 2.2, 2.8], c=[5, 6, 7])
    assert not_told_apart(found) == [("a", "b")]
    assert not_told_apart(rows(a=[1, 1], b=[1, 1])) == []
