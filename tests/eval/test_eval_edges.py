"""Edge adherence on the cases whose values are known, and the other control metrics."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from sctool.core.errors import SctoolError
from sctool.eval.control.colors import ColorScore
from sctool.eval.control.colors import cells as count_cells
from sctool.eval.control.edges import EdgeScore, tolerance
from sctool.eval.control.preservation import OutsideScore
from sctool.eval.control.table import measures, scores


def lines(size: int = 64) -> np.ndarray:
    """Sparse vertical lines, so that a shift by one hits nothing."""
    edges = np.zeros((size, size), np.uint8)
    edges[:, 6 : size - 6 : 8] = 255
    return edges


def figures(edges: np.ndarray, hint: np.ndarray) -> dict[str, float]:
    score = EdgeScore()
    score.update_maps(edges, hint)
    return score.compute()


def test_known_values() -> None:
    g = lines()
    assert figures(g, g) == {"nmse": 0, "nmse_median": 0, "f1": 1, "f1@1px": 1}
    shifted = figures(np.roll(g, 1, axis=1), g)
    assert shifted["nmse"] == pytest.approx(2)  # (FP + FN) / (TP + FN) with no hit at all
    assert shifted["f1"] == 0
    assert shifted["f1@1px"] == 1
    assert figures(np.roll(g, 2, axis=1), g)["f1@1px"] == 0
    empty = figures(np.zeros_like(g), g)
    assert (empty["nmse"], empty["f1"], empty["f1@1px"]) == (1, 0, 0)
    full = figures(np.full_like(g, 255), g)
    assert full["nmse"] == pytest.approx((g.size - (g > 0).sum()) / (g > 0).sum())


def test_f1_equals_its_definition_and_nmse_is_pooled() -> None:
    rng = np.random.default_rng(0)
    maps = [(rng.random((32, 40)) > share).astype(np.uint8) * 255 for share in (0.9, 0.5, 0.7, 0.99)]
    score = EdgeScore()
    for p, g in ((maps[0], maps[1]), (maps[2], maps[3])):
        score.update_maps(p, np.repeat(g[..., None], 3, 2))
    p, g = (np.concatenate([maps[i].ravel(), maps[i + 2].ravel()]) > 0 for i in (0, 1))
    hits, false, missed = (p & g).sum(), (p & ~g).sum(), (~p & g).sum()
    found = score.compute()
    assert found["f1"] == pytest.approx(2 * hits / (2 * hits + false + missed))
    assert found["nmse"] == pytest.approx((false + missed) / (hits + missed))
    each = [figures(maps[0], maps[1])["nmse"], figures(maps[2], maps[3])["nmse"]]
    assert found["nmse_median"] == pytest.approx(np.mean(each))


def test_tolerance_follows_the_diagonal() -> None:
    assert [tolerance(side, side) for side in (32, 64, 128, 256, 512, 768, 1024)] == [1, 1, 1, 1, 2, 4, 5]
    assert "f1@2px" in figures(lines(512), lines(512))
    score = EdgeScore()
    for size in (64, 512):
        score.update_maps(lines(size), lines(size))
    assert score.figure_info.keys() == score.compute().keys()
    assert score.figure_info["f1@1-2px"] == ("F1@1-2px", "higher")


def test_empty_hints_are_skipped_and_counted_and_sums_merge() -> None:
    rng = np.random.default_rng(1)
    pairs = [[(rng.random((16, 16)) > 0.6).astype(np.uint8) * 255 for _ in range(2)] for _ in range(5)]
    pairs[2][1][:] = 0
    whole, left, right = EdgeScore(), EdgeScore(), EdgeScore()
    for index, (p, g) in enumerate(pairs):
        whole.update_maps(p, g)
        (left if index < 3 else right).update_maps(p, g)
    left.merge(right)
    assert left.compute() == whole.compute()
    assert left.intervals() == whole.intervals()
    assert (left.n, left.skipped) == (4, 1)
    alone = EdgeScore()
    alone.update_maps(*pairs[2])
    with pytest.raises(SctoolError, match="not empty"):
        alone.compute()


def test_edges_are_extracted_as_the_hint_was() -> None:
    rng = np.random.default_rng(2)
    picture = cv2.GaussianBlur(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8), (0, 0), 1.5)
    hint = cv2.Canny(picture, 50, 90)
    found = {}
    for made in ({}, {"low": 50, "high": 90, "version": "canny-1", "opencv": "5"}):
        found[len(made)] = measures(["canny"], {"canny": made})["canny"]([picture], [np.repeat(hint[..., None], 3, 2)])
    assert found[4]["nmse"] == 0
    assert found[0]["nmse"] > 0
    assert EdgeScore({"low": 50}).protocol["annotator"]["low"] == 50
    with pytest.raises(SctoolError, match="32x32 px, the image 48x48 px"):
        EdgeScore().update([picture], [hint[:32, :32]])


def test_colour_distance_uses_the_cells_of_the_hint() -> None:
    rng = np.random.default_rng(3)
    cells = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    cells[0] = cells[1]  # two rows of one colour each
    hint = cv2.resize(cells, (64, 48), interpolation=cv2.INTER_NEAREST)
    assert count_cells(hint) == (3, 4)
    score = ColorScore()
    score.update([hint], [hint])
    assert score.compute()["distance"] == pytest.approx(0)
    grey = np.full((32, 32, 3), 100, np.uint8)
    for picture, wanted in ((grey, 0), (grey + 7, 7)):
        score = ColorScore()
        score.update([picture], [grey])
        assert score.compute()["distance"] == pytest.approx(wanted)


def test_what_lies_outside_the_hole_should_stay() -> None:
    rng = np.random.default_rng(4)
    picture = rng.integers(1, 200, (20, 20, 3), dtype=np.uint8)
    hint = picture.copy()
    hint[5:15, 5:15] = 0
    score, other = OutsideScore(), OutsideScore()
    score.update([picture], [hint])
    other.update([picture + 4], [hint])
    other.update([picture], [np.zeros_like(hint)])
    score.merge(other)
    assert score.compute() == {"outside": pytest.approx(2), "hole": pytest.approx(0.25)}
    assert score.skipped == 1


def test_every_weight_free_condition_measures_a_perfect_picture() -> None:
    picture = np.full((64, 64, 3), 30, np.uint8)
    cv2.rectangle(picture, (10, 10), (40, 50), (200, 220, 180), -1)
    palette = cv2.resize(cv2.resize(picture, (1, 1), interpolation=cv2.INTER_CUBIC), (64, 64), interpolation=0)
    hints = {"canny": np.repeat(cv2.Canny(picture, 100, 200)[..., None], 3, 2), "mask": picture, "outpaint": picture}
    hints |= {"color": palette}
    table = scores()
    assert table.keys() >= {"canny", "sketch", "color", "mask", "outpaint", "hed", "depth", "seg", "pose"}
    for name, measure in measures(list(hints), {}).items():
        best = measure([picture], [hints.pop(name)])
        info = table[name]().figure_info
        lower = [value for key, value in best.items() if key in info and info[key].better == "lower"]
        assert lower
        assert lower == [0] * len(lower)
    assert not hints


def test_conditions_without_weights_are_left_out_of_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said: list[str] = []
    assert list(measures(["canny", "hed", "depth", "seg"], {}, said.append)) == ["canny"]
    assert ["sctool weights fetch" in text for text in said] == [True, True, False]
    assert "sctool evaluate" in said[2]
