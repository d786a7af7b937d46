"""Soft edges, depth, segmentation and pose: known values, restatements, and the libraries that define the figures."""

from __future__ import annotations

import warnings
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from sctool.core.errors import SctoolError
from sctool.eval.control.depth import DepthScore
from sctool.eval.control.pose import SIGMAS, PoseScore, oks
from sctool.eval.control.segmentation import SegmentationScore
from sctool.eval.control.soft_edges import SMALLEST, SoftEdgeScore, ms_ssim
from sctool.eval.intervals import FEWEST, RESAMPLES, ImageFigures


def soft(size: tuple[int, int], seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


# ------------------------------------------------------------------------------------------------- soft edges


def test_ms_ssim_equals_torchmetrics() -> None:
    oracle = pytest.importorskip("torchmetrics.functional.image")
    for size in ((200, 180), (SMALLEST, 300)):
        p, g = (soft(size, seed).astype(np.float64) / 255 for seed in (0, 1))
        p = 0.6 * g + 0.4 * p
        theirs = oracle.multiscale_structural_similarity_index_measure(
            torch.from_numpy(p)[None, None], torch.from_numpy(g)[None, None], data_range=1.0, normalize="relu"
        )
        assert ms_ssim(p, g) == pytest.approx(float(theirs), rel=1e-5)


def test_soft_edges_of_equal_and_of_small_maps() -> None:
    large, small = soft((180, 190), 0), soft((64, 64), 1)
    score = SoftEdgeScore()
    score.update_maps(large, np.repeat(large[..., None], 3, 2))
    score.update_maps(soft((64, 64), 2), small)
    found = score.compute()
    assert found["ms_ssim"] == pytest.approx(1)  # of the large one alone
    assert found["ssim"] < 1
    assert "1 images are smaller" in score.notes()[0]
    only_small = SoftEdgeScore()
    only_small.update_maps(small, small)
    assert only_small.compute() == {"ssim": pytest.approx(1)}
    with pytest.raises(SctoolError, match="at least 11 px"):
        SoftEdgeScore().update_maps(small[:8], small[:8])


def test_ssim_equals_its_definition() -> None:
    p, g = (soft((24, 20), seed).astype(np.float64) / 255 for seed in (0, 1))
    at = np.arange(-5, 6)
    line = np.exp(-(at**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for y in range(5, 19):
        for x in range(5, 15):
            a, b = (z[y - 5 : y + 6, x - 5 : x + 6] for z in (p, g))
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2
            cov = (window * a * b).sum() - ma * mb
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    score = SoftEdgeScore()
    score.update_maps(np.round(p * 255).astype(np.uint8), np.round(g * 255).astype(np.uint8))
    assert score.compute()["ssim"] == pytest.approx(np.mean(values), rel=1e-6)


# ------------------------------------------------------------------------------------------------------ depth


def test_depth_errors() -> None:
    g = np.linspace(0, 255, 256).round().astype(np.uint8).reshape(16, 16)
    for p, rmse, aligned in (
        (g, 0, 0),
        (g // 2 + 20, pytest.approx(0.57, abs=0.01), pytest.approx(0.5)),  # another unit, same depth
        (255 - g, pytest.approx(np.sqrt(((255.0 - 2 * g) ** 2).mean())), pytest.approx(0, abs=1e-9)),
        (np.full_like(g, 7), pytest.approx(np.sqrt((g.astype(float) ** 2).mean())), pytest.approx(g.std())),
    ):
        score = DepthScore()
        score.update_maps(p, np.repeat(g[..., None], 3, 2))
        assert score.compute() == {"rmse": rmse, "rmse_aligned": aligned}
    score = DepthScore()
    score.update_maps(g, np.zeros_like(g))
    assert score.skipped == 1
    with pytest.raises(SctoolError, match="depth hint that is not empty"):
        score.compute()


def test_aligned_is_the_least_squares_fit() -> None:
    p, g = soft((20, 20), 3), soft((20, 20), 4)
    score = DepthScore()
    score.update_maps(p, g)
    from sctool.eval.control.depth import stretched

    a, b = stretched(p).ravel(), stretched(g).ravel()
    fit = np.polyval(np.polyfit(a, b, 1), a)
    assert score.compute()["rmse_aligned"] == pytest.approx(np.sqrt(((fit - b) ** 2).mean()))
    assert score.compute()["rmse"] == pytest.approx(np.sqrt(((a - b) ** 2).mean()))


# ----------------------------------------------------------------------------------------------- segmentation


def classes(seed: int, count: int = 9, size: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a picture and of its map: unequal in places, with pixels to ignore and classes of one side alone."""
    random = np.random.default_rng(seed)
    g = cv2.resize(random.integers(0, count, (6, 6), dtype=np.uint8), (size, size), interpolation=cv2.INTER_NEAREST)
    p = np.where(random.random(g.shape) < 0.3, random.integers(0, count + 2, g.shape), g).astype(np.uint8)
    g[:3] = 255
    return p, g


def test_segmentation_equals_torchmetrics_and_a_confusion_matrix() -> None:
    pairs = [classes(seed) for seed in range(6)]
    score = SegmentationScore()
    for p, g in pairs:
        score.update_maps(p, g)
    found = score.compute()
    p, g = (np.concatenate([pair[i].ravel() for pair in pairs]).astype(int) for i in (0, 1))
    matrix = np.zeros((255, 255))
    for wanted, drawn in zip(g[g != 255], p[g != 255], strict=True):
        matrix[wanted, drawn] += 1
    hits, union = np.diag(matrix), matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    there = matrix.sum(1)
    iou = hits[union > 0] / union[union > 0]
    assert found == {
        "miou": pytest.approx(iou.mean()),
        "aacc": pytest.approx(hits.sum() / matrix.sum()),
        "macc": pytest.approx((hits[there > 0] / there[there > 0]).mean()),
        "fwiou": pytest.approx((there[union > 0] * iou).sum() / there.sum()),
        "classes": (union > 0).sum(),
    }
    assert found["classes"] == 11
    assert found["macc"] > found["miou"]
    oracle = pytest.importorskip("torchmetrics")
    jaccard = oracle.JaccardIndex("multiclass", num_classes=150, ignore_index=255, average="macro")
    for drawn, wanted in pairs:
        jaccard.update(torch.from_numpy(drawn.astype(int)), torch.from_numpy(wanted.astype(int)))
    assert found["miou"] == pytest.approx(float(jaccard.compute()), rel=1e-5)


def test_segmentation_ignores_what_is_unlabelled() -> None:
    g = np.full((4, 4), 255, np.uint8)
    score = SegmentationScore()
    score.update_maps(np.zeros_like(g), g)
    assert score.skipped == 1
    g[0] = 3
    score.update_maps(np.full_like(g, 3), g)
    assert score.compute()["miou"] == 1
    other = SegmentationScore()
    other.update_maps(np.full_like(g, 255), g)  # predicted nothing at all
    assert other.compute()["miou"] == 0


# ------------------------------------------------------------------------------------------------------- pose


def person(seed: int, *, score: float = 0.9, shift: float = 0.0, hidden: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    x0, y0 = random.uniform(0, 200, 2)
    points = random.uniform(0, 1, (17, 2)) * (60, 120) + (x0, y0) + shift
    seen = np.where(np.arange(17) < hidden, 0.1, 0.9)
    box = [x0 + shift, y0 + shift, x0 + 60 + shift, y0 + 120 + shift]
    return {"keypoints": np.column_stack([points, seen]).tolist(), "bbox": box, "score": score}


def test_oks_and_figures_of_known_persons() -> None:
    a = person(0)
    assert oks(a, a) == 1
    moved = person(0, shift=3)
    wanted = np.mean(np.exp(-18 / (2 * 60 * 120 * (2 * SIGMAS) ** 2)))
    assert oks(moved, a) == pytest.approx(wanted)
    score = PoseScore()
    score.update_maps([person(0), person(1)], [person(0), person(1)])
    assert score.compute() == {"oks_ap": pytest.approx(1), "pck@0.2": 1, "recall": 1}
    nobody = PoseScore()
    nobody.update_maps([], [person(0), person(1)])
    assert nobody.compute() == {"oks_ap": 0, "pck@0.2": 0, "recall": 0}
    half = PoseScore()
    half.update_maps([person(0)], [person(0)])
    half.update_maps([person(5)], [])  # a person too many
    half.update_maps([person(2, shift=30)], [person(2)])  # too far: 42 px of a box 120 px high
    found = half.compute()
    assert found["recall"] == pytest.approx(0.5)
    assert found["pck@0.2"] == pytest.approx(0.5)
    assert half.per_image()["recall"] == {0: 1, 2: 0}
    empty = PoseScore()
    empty.update_maps([person(0)], [])
    with pytest.raises(SctoolError, match="contain no person"):
        empty.compute()


def scenes() -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Found and wanted persons of pictures: near, far, doubled, missing, hidden in part."""
    random = np.random.default_rng(7)
    made = []
    for picture in range(12):
        wanted = [person(10 * picture + i, hidden=int(random.integers(0, 16))) for i in range(picture % 4)]
        found = []
        for i in range(len(wanted)):
            if random.random() < 0.85:
                found.append(person(10 * picture + i, score=round(random.random(), 3), shift=random.normal() * 20))
            if random.random() < 0.3:
                found.append(person(10 * picture + i, score=round(random.random(), 3), shift=5))
        if random.random() < 0.3:
            found.append(person(10 * picture + 9, score=round(random.random(), 3)))
        made.append((found, wanted))
    return made


def test_average_precision_equals_cocos() -> None:
    score = PoseScore()
    for found, wanted in scenes():
        score.update_maps(found, wanted)
    ours = score.compute()["oks_ap"]
    assert ours == pytest.approx(0.27321850931053, rel=1e-9)  # what pycocotools 2.0.11 gives
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    truth, drawn = coco.COCO(), []
    annotations: list[dict[str, Any]] = []
    for image, (found, wanted) in enumerate(scenes(), 1):
        for one in wanted:
            x0, y0, x1, y1 = one["bbox"]
            points = [[x, y, 2 if s > 0.3 else 0] for x, y, s in one["keypoints"]]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": 1, "iscrowd": 0,
                 "keypoints": np.ravel(points).tolist(), "num_keypoints": sum(v > 0 for *_, v in points),
                 "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            )  # fmt: skip
        for one in found:
            keypoints = np.ravel([[x, y, 1] for x, y, _ in one["keypoints"]]).tolist()
            drawn.append({"image_id": image, "category_id": 1, "keypoints": keypoints, "score": one["score"]})
    images = [{"id": image} for image in range(1, 13)]
    truth.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": [{"id": 1}]}
    truth.createIndex()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluation.COCOeval(truth, truth.loadRes(drawn), "keypoints")
        found.evaluate()
        found.accumulate()
        found.summarize()
    assert ours == pytest.approx(found.stats[0], abs=1e-6)


# -------------------------------------------------------------------------------------------------- intervals


def filled(kind: type, first: int, last: int) -> ImageFigures:
    score = kind()
    for index in range(first, last):
        if kind is PoseScore:
            score.update_maps(*scenes()[index], index)
        elif kind is SegmentationScore:
            score.update_maps(*classes(index), index)
        else:
            score.update_maps(soft((40, 40), index), soft((40, 40), index + 50), index)
    return score


@pytest.mark.parametrize("kind", [SoftEdgeScore, DepthScore, SegmentationScore, PoseScore])
def test_parts_merged_equal_the_whole_and_intervals_are_the_same_again(kind: type) -> None:
    whole, left = filled(kind, 0, 12), filled(kind, 0, 5)
    left.merge(filled(kind, 5, 12))
    assert whole.compute().keys() <= kind().figure_info.keys()
    assert left.compute() == pytest.approx(whole.compute())
    assert left.intervals() == whole.intervals() == filled(kind, 0, 12).intervals()
    assert left.per_image() == whole.per_image()
    assert whole.intervals().keys() == whole.compute().keys() - {"classes"}
    for name, (low, high) in whole.intervals().items():
        assert low < whole.compute()[name] < high


def test_a_bootstrap_interval_of_a_mean_is_the_usual_one() -> None:
    class Mean(ImageFigures):
        medians = {"middle": "mean"}  # noqa: RUF012

        def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
            return {"mean": sums[..., 1] / sums[..., 0]}

    values = np.random.default_rng(0).normal(5, 2, 400)
    score = Mean()
    for value in values:
        score.add((1, value))
    low, high = score.intervals()["mean"]
    half = 1.96 * values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert score.compute() == {"mean": pytest.approx(values.mean()), "middle": pytest.approx(np.median(values))}
    random = np.random.default_rng(0)
    # the same draws, by hand
    medians = [np.median(values[random.integers(0, 400, (50, 400))], axis=1) for _ in range(RESAMPLES // 50)]
    assert score.intervals()["middle"] == pytest.approx(np.percentile(np.concatenate(medians), [2.5, 97.5]))


@pytest.mark.parametrize(("count", "there"), [(1, False), (9, False), (10, True)])
def test_there_is_no_interval_from_fewer_than_ten_images(count: int, there: bool) -> None:
    score = DepthScore()
    for index in range(count):
        score.update_maps(soft((20, 20), index), soft((20, 20), 50 + index))
    assert FEWEST == 10
    assert (score.intervals().keys() == score.compute().keys()) is there
    assert bool(score.intervals()) is there
