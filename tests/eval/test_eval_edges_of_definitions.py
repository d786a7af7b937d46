"""Figures at the edges of their definitions: single pictures, blocks of one, ties, thresholds, filters, chunks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from sctool.core.config import TrainConfig
from sctool.core.data.records import BytesBlob, Record, Source
from sctool.core.errors import SctoolError
from sctool.core.progress import Progress
from sctool.core.training.splits import split_records
from sctool.eval.batches import Batch
from sctool.eval.clip_score import ClipScore
from sctool.eval.control.colors import ColorScore
from sctool.eval.control.depth import DepthScore
from sctool.eval.control.edges import EdgeScore
from sctool.eval.control.pose import PoseScore
from sctool.eval.control.preservation import OutsideScore
from sctool.eval.control.segmentation import SegmentationScore
from sctool.eval.control.soft_edges import SoftEdgeScore
from sctool.eval.features.inception import InceptionFeatures
from sctool.eval.heldout import evaluation_records
from sctool.eval.intervals import jackknife
from sctool.eval.options import Options
from sctool.eval.sets.cmmd import ClipDiscrepancy
from sctool.eval.sets.extraction import ExtractorMetrics, metrics_by_extractor
from sctool.eval.sets.frechet import FrechetDistance, FrechetStats, small_sample_note
from sctool.eval.sets.inception_score import InceptionScore
from sctool.eval.sets.kid import KernelDistance
from sctool.eval.sets.precision_recall import PrecisionRecall
from sctool.eval.sets.references import References


def features(n: int, seed: int = 0, dim: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.2 * seed, 1, (n, dim)).astype(np.float32)


# -------------------------------------------------------------------------------------------------- intervals


def test_an_interval_is_of_a_thousand_seeded_resamples_and_says_so() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.2, 30)
    score = ClipScore()
    for value in values:
        score.update(torch.tensor([[value]]), torch.ones(1, 1))
    random = np.random.default_rng(0)
    means = np.concatenate([values[random.integers(0, 30, (50, 30))].mean(1) for _ in range(20)])
    assert score.intervals()["cos"] == pytest.approx(np.percentile(means, [2.5, 97.5]), rel=1e-6)
    assert "1000 resamples" in str(EdgeScore().protocol)


# ------------------------------------------------------------------------------------------------- whole sets


def test_ten_pictures_are_enough_for_an_interval_and_nine_are_not() -> None:
    real = features(12, 1)
    for count, there in ((9, False), (10, True)):
        for meter in (PrecisionRecall(), KernelDistance(), ClipDiscrepancy()):
            meter.update(features(count))
            assert all((estimate.interval is not None) == there for estimate in meter.compute(real).values())


def test_documented_sizes_of_subsets_and_of_large_sets() -> None:
    assert KernelDistance.protocol["subsets"] == "100 of 1000 or all, seed 2020"
    assert small_sample_note("FID", 10_000, 2048) is None
    assert "9999 images: biased" in str(small_sample_note("FID", 9999, 2048))
    assert [bool("fewer" in str(small_sample_note("FID", n, 2048))) for n in (2047, 2048)] == [True, False]


def test_a_jackknife_interval_is_kept_within_its_limits() -> None:
    left = [0.0, 1.0] * 5
    error = np.sqrt(0.9 * 10 * 0.25)
    value, interval = jackknife(0.5, [1] * 10, left.__getitem__)
    assert interval == pytest.approx((0.5 - 2.26215716 * error, 0.5 + 2.26215716 * error))
    assert value == 0.5
    assert jackknife(0.5, [1] * 10, left.__getitem__, 0, 1).interval == (0, 1)


@pytest.mark.parametrize("metric", [PrecisionRecall, KernelDistance, ClipDiscrepancy])
def test_features_keep_float64_distances_however_large_they_are(metric: type) -> None:
    """Features far from the origin: sums in single precision would lose the differences."""
    x, y = features(24), features(20, 1)
    near, tensor = metric(), metric()
    near.update(x)
    tensor.update(torch.from_numpy(x).requires_grad_())
    assert near.compute(y) == tensor.compute(y)
    if metric is PrecisionRecall:
        far = metric()
        far.update((x * 1024).astype(np.float32))
        assert far.compute((y * 1024).astype(np.float32)) == near.compute(y)


def test_a_feature_on_the_border_of_a_ball_is_inside() -> None:
    """Radii in single precision would leave out half of them."""
    for point in features(20, dim=3):
        meter = PrecisionRecall()
        meter.update(np.repeat(-point[None], 4, 0))
        real = np.stack([0 * point, point / 8, point / 4, point])  # the third neighbour of 0 is as far away as -point
        assert meter.compute(real)["precision"].value == 1


def test_chunks_of_rows_do_not_change_a_kernel_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(33), features(29, 1)
    figures = []
    for chunk in (1024, 7):
        monkeypatch.setattr("sctool.eval.sets.mmd.CHUNK", chunk)
        for meter in (KernelDistance(), ClipDiscrepancy()):
            meter.update(x)
            figures.append({key: (e.value, *(e.interval or ())) for key, e in meter.compute(y).items()})
    for whole, parts in zip(figures[:2], figures[2:], strict=True):
        for key in whole:
            assert parts[key] == pytest.approx(whole[key], rel=1e-9)


def test_the_distance_to_a_shifted_set_is_the_squared_shift() -> None:
    x = features(60)
    stats = FrechetStats(5)
    stats.update(x + np.float32(2))
    meter = FrechetDistance(5)
    meter.update(x)
    assert meter.compute(stats.compute())["fid"].value == pytest.approx(5 * 4, rel=1e-5)


def test_an_inception_score_of_sure_and_balanced_classes_is_their_number() -> None:
    logits = np.repeat(np.eye(4) * 200, 10, axis=0)
    score = InceptionScore(4)
    score.update(logits)
    value, interval = score.compute()["is"]
    assert value == pytest.approx(4)
    assert interval == pytest.approx((4, 4))
    few = InceptionScore(4)
    few.update(logits[::10])
    assert few.compute()["is"] == (pytest.approx(1), None), "four splits of one picture each"


def test_a_clip_score_has_two_scales_and_counts_opposites_as_nothing_in_one() -> None:
    score = ClipScore()
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    score.update(images, torch.tensor([[1.0, 0.0]] * 3), [4, 2, 9])
    assert score.compute() == pytest.approx({"cos": 0.2, "100": 20, "w2.5": 2.5 * 1.6 / 3})
    assert score.per_image()["cos"] == pytest.approx({4: 1, 2: 0.6, 9: -1})


class Means:
    """Stands for an extractor: the mean colour."""

    dim, name = 3, "means"

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float().mean((2, 3))


def test_references_of_any_size_are_measured_in_order_and_bad_ones_are_listed(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (20, 3))
    for i, colour in enumerate(colours):
        side = (8, 12)[i % 2]
        Image.fromarray(np.full((side, side, 3), colour, np.uint8)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "07.png").write_bytes(b"no picture")
    column: Any = SimpleNamespace(faults=[])
    kept = np.delete(colours, 7, 0)
    for keep in (True, False):
        stats = tmp_path / "stats.npz"
        references = References(Means(), str(tmp_path), stats, Progress(True), store=keep)  # pyright: ignore
        real, identity = references.of(None, [], column)  # pyright: ignore[reportArgumentType]
        assert real.n == identity["n"] == 19
        assert real.moments is not None
        np.testing.assert_allclose(real.moments.mu, kept.mean(0))
        np.testing.assert_allclose(real.moments.sigma, np.cov(kept.T))
        assert (real.features is not None) == keep
        if real.features is not None:
            np.testing.assert_allclose(real.features, kept)
        np.testing.assert_allclose(np.load(stats)["mu"], kept.mean(0))
        again, _ = References(Means(), str(stats), None, Progress(True)).of(None, [], column)  # pyright: ignore
        assert again.n == 19
        stats.unlink()
    assert [fault["file"] for fault in column.faults] == ["07.png", "07.png"]
    assert "is not an image" in column.faults[0]["reason"]


def test_features_are_ordered_by_position_and_none_are_no_row() -> None:
    meter = KernelDistance()
    assert meter.rows().shape == (0, 0)
    x = features(4)
    meter.update(x[2:], [12, 3])
    meter.update(x[:2], [25, 0])
    assert np.array_equal(meter.rows(), x[[1, 3, 2, 0]])
    assert meter.blocks().tolist() == [0, 3, 2, 5]


# ------------------------------------------------------------------------------------------- control adherence


def test_edges_count_from_above_the_middle_grey_and_within_the_tolerance() -> None:
    hint = np.zeros((64, 64), np.uint8)
    hint[10, 10:20] = 128
    for value, f1 in ((127, 0), (128, 1)):
        score = EdgeScore()
        score.update_maps(np.where(hint > 0, np.uint8(value), np.uint8(0)), hint)
        assert score.compute()["f1"] == f1
    for shift, near in ((1, 1), (2, 0)):
        score = EdgeScore()
        score.update_maps(np.roll(hint, shift, 0), hint)
        assert score.compute()["f1@1px"] == near
    diagonal = EdgeScore()
    diagonal.update_maps(np.roll(hint, (1, 1), (0, 1)), hint)
    assert 0.8 < diagonal.compute()["f1@1px"] < 1, "the last pixel's neighbour is sqrt(2) away"


def test_few_edges_found_are_a_low_figure_and_not_none() -> None:
    hint = np.zeros((64, 64), np.uint8)
    hint[10, 10:50] = 255
    found = np.zeros_like(hint)
    found[10, 10], found[40, 10:19] = 255, 255  # 1 of 10 is right; it and one beside it are covered, of 40
    score = EdgeScore()
    score.update_maps(found, hint)
    assert score.compute()["f1@1px"] == pytest.approx(2 * 0.1 * 0.05 / 0.15)
    assert score.compute()["f1"] == pytest.approx(2 / 50)


def test_the_smallest_maps_with_five_scales_are_176_pixels() -> None:
    for side, there in ((176, True), (175, False)):
        map = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)
        score = SoftEdgeScore()
        score.update_maps(map, map)
        assert ("ms_ssim" in score.compute()) == there


def test_skipped_images_are_all_counted() -> None:
    score = OutsideScore()
    for _ in range(3):
        score.update_maps(np.ones((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8))
    assert (score.skipped, score.n) == (3, 0)


def test_palettes_are_compared_with_the_filter_that_made_the_hint() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name, filter in (("cubic", cv2.INTER_CUBIC), ("area", cv2.INTER_AREA)):
        hint = cv2.resize(cv2.resize(picture, (4, 4), interpolation=filter), (64, 64), interpolation=cv2.INTER_NEAREST)
        distances = {}
        for made in ("cubic", "area"):
            score = ColorScore({"filter": made, "ratio": 16})
            score.update([picture], [hint])
            distances[made] = score.compute()["distance"]
        assert distances.pop(name) == pytest.approx(0)
        assert all(distance > 1 for distance in distances.values())


def test_depth_is_stretched_to_its_own_extremes_and_a_flat_picture_is_judged_by_the_mean() -> None:
    hint = np.tile(np.arange(0, 200, 2, dtype=np.uint8), (4, 1))
    g = hint * (255 / 198)
    for found, wanted in ((hint // 2 + 40, 0), (198 - hint, np.sqrt(((255 - 2 * g) ** 2).mean()))):
        score = DepthScore()
        score.update_maps(found, hint)
        assert score.compute()["rmse"] == pytest.approx(wanted, abs=0.01)
        assert score.compute()["rmse_aligned"] == pytest.approx(0, abs=0.01), "any scale and shift, of either sign"
    flat = DepthScore()
    flat.update_maps(np.full_like(hint, 9), hint)
    assert flat.compute() == pytest.approx({"rmse": np.sqrt((g**2).mean()), "rmse_aligned": g.std()})


def test_classes_that_neither_has_do_not_count_and_255_is_ignored() -> None:
    wanted = np.array([[0, 0, 0, 7], [254, 254, 255, 255]], np.uint8)
    found = np.array([[0, 0, 7, 7], [254, 3, 0, 255]], np.uint8)
    score = SegmentationScore()
    score.update_maps(found, wanted)
    ious = {0: 2 / 3, 7: 1 / 2, 254: 1 / 2, 3: 0}
    assert score.compute() == pytest.approx(
        {
            "miou": np.mean(list(ious.values())), "aacc": 4 / 6, "macc": (2 / 3 + 1 + 1 / 2) / 3,
            "fwiou": (3 * ious[0] + 1 * ious[7] + 2 * ious[254]) / 6, "classes": 4,
        }
    )  # fmt: skip


def test_every_figure_belongs_to_the_position_of_its_picture() -> None:
    random = np.random.default_rng(0)
    pictures = random.integers(1, 255, (3, 32, 32, 3), dtype=np.uint8)
    grey = pictures[..., 0]
    for kind, maps in (
        (EdgeScore, grey), (DepthScore, grey), (SegmentationScore, grey), (SoftEdgeScore, grey),
        (ColorScore, pictures), (OutsideScore, pictures),
    ):  # fmt: skip
        score = kind()
        for position, map in zip((7, 2, 4), maps, strict=True):
            score.update_maps(map, maps[0], position)
        for name, values in score.per_image().items():
            wanted = [] if name == "ms_ssim" else [7, 2, 4]  # these are too small for its five scales
            assert list(values) == wanted, f"{name} of {kind.__name__}"


def person(x: float, score: float = 0.9, seen: float = 0.9, width: float = 60) -> dict:
    points = [[x + i * width / 16, i * 120 / 16, seen] for i in range(17)]
    return {"keypoints": points, "bbox": [x, 0, x + width, 120], "score": score}


def test_a_keypoint_is_right_within_a_fifth_of_the_longer_side() -> None:
    for shift, right in ((24, 1), (24.5, 0)):
        score = PoseScore()
        score.update_maps([person(shift)], [person(0)])
        assert score.compute()["pck@0.2"] == right


def test_keypoints_that_the_reference_hardly_shows_do_not_count() -> None:
    score = PoseScore()
    score.update_maps([person(0)], [person(0), person(300, seen=0.3)])
    assert score.compute() == pytest.approx({"oks_ap": 1, "pck@0.2": 1, "recall": 1})
    score.update_maps([], [person(0, seen=0.31)])
    assert score.compute()["recall"] == 0.5


def test_twenty_persons_of_a_picture_are_counted_the_surest_first() -> None:
    crowd = [person(1000 + 200 * i, score=0.5) for i in range(20)]
    for score, recall in ((0.6, 1), (0.4, 0)):
        meter = PoseScore()
        meter.update_maps([*crowd, person(0, score=score)], [person(0)])
        assert meter.compute()["recall"] == recall


# ------------------------------------------------------------------------------------ which network a metric reads


class Named:
    """Stands for an extractor."""

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize(
    ("wanted", "features", "readers"),
    [
        ("fid kid cmmd", "mini", {"mini": "fid kid cmmd"}),
        ("fid cmmd", "clip", {"clip": "fid cmmd"}),
        ("fid cmmd", "dinov2", {"dinov2": "fid", "own clip": "cmmd"}),
        ("fid cmmd", "inception", {"inception": "fid", "own clip": "cmmd"}),
        ("cmmd", "mini", {"mini": "cmmd"}),
        ("pr", "dinov2", {"dinov2": "pr"}),
    ],
)
def test_one_network_serves_all_metrics_that_read_it(
    wanted: str, features: str, readers: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: dict[str, tuple[Path | None, bool]] = {}

    def references(extractor: Any, save: Path | None, keep: bool) -> Any:
        opened[extractor.name] = (save, keep)

    monkeypatch.setattr("sctool.eval.sets.extraction.choose_features", lambda kind, **_: Named(kind))
    monkeypatch.setattr("sctool.eval.sets.extraction.clip_features", lambda kind, **_: Named("own clip"))
    options = Options(features=features, save_stats=tmp_path / "s.npz")
    groups = metrics_by_extractor(
        set(wanted.split()), options, None, "cpu", lambda names, load: load(), lambda text: None, references
    )
    assert {group.extractor.name: " ".join(group.metrics) for group in groups} == readers
    assert opened == {
        name: (tmp_path / "s.npz" if "fid" in metrics else None, set(metrics.split()) != {"fid"})
        for name, metrics in readers.items()
    }, "moments are saved under FID's network, features are kept for metrics that compare pictures"


@pytest.mark.parametrize(("features", "chosen"), [("mini", "mini"), ("auto", "mini"), ("dinov2", "dinov2")])
def test_mini_features_know_no_classes_and_others_ask_inception(
    features: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    refused: list[str] = []

    def choose(kind: str, **_: Any) -> Named:
        loaded.append(kind)
        return Named(chosen if kind == features else kind)

    def attempt(names: list[str], load: Any) -> Any:
        try:
            return load()
        except (SctoolError, AssertionError):
            refused.extend(names)

    monkeypatch.setattr("sctool.eval.sets.extraction.choose_features", choose)
    metrics_by_extractor(
        {"fid", "is"}, Options(features=features), None, "cpu", attempt, lambda text: None, lambda *_: None
    )  # pyright: ignore
    assert loaded == ([features, "inception"] if chosen == "dinov2" else [features])
    assert refused == ["is"]


def test_every_metric_is_given_what_it_reads_of_one_pass_of_the_network() -> None:
    passes: list[int] = []

    class Classes(InceptionFeatures):
        dim, classes = 3, 3

        def __init__(self) -> None: ...

        def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
            passes.append(len(pictures))
            return pictures.float().mean((2, 3))

        def logits(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    group = ExtractorMetrics(Classes(), ["fid", "is", "pr"], *[None] * 3)  # pyright: ignore[reportArgumentType]
    meters: dict[str, Any] = group.meters()
    pictures = torch.randint(0, 9, (12, 3, 4, 4), dtype=torch.uint8)
    images = [image.permute(1, 2, 0).numpy() for image in pictures]
    group.update(meters, Batch(None, [], images, 0), None)  # pyright: ignore[reportArgumentType]
    alone = InceptionScore(3)
    alone.update(2 * pictures.float().mean((2, 3)))
    assert passes == [12]
    assert meters["is"].compute() == alone.compute()
    assert np.array_equal(meters["pr"].rows(), pictures.float().mean((2, 3)).numpy())
    assert meters["fid"].n == 12


# ------------------------------------------------------------------------------------------------- held-out images


@pytest.mark.parametrize(
    ("splits", "evaluated"),
    [
        (("train", "validation", "test", "test"), "2 3"),
        (("val", "train", "validation"), "2"),
        (("val", "train"), "0"),
    ],
)
def test_test_rows_are_evaluated_before_validation_rows(splits: tuple[str, ...], evaluated: str) -> None:
    """The run itself was chosen by its validation rows."""
    records = [Record(str(i), BytesBlob(b""), split=split) for i, split in enumerate(splits)]
    source = Source("set", "textfolder", records)
    assert " ".join(record.key for record in evaluation_records(source, None, TrainConfig())) == evaluated
    own = Source("other", "textfolder", records[:1])
    assert evaluation_records(source, own, TrainConfig(val_count=0)) == records[:1]


def test_unmarked_data_are_evaluated_on_what_training_held_out() -> None:
    source = Source("set", "textfolder", [Record(str(i), BytesBlob(b"")) for i in range(50)])
    config = TrainConfig(val_count=4, seed=3)
    held_out = split_records(source, None, config)[1]
    assert len(held_out) == 4
    assert evaluation_records(source, None, config) == held_out
