"""KID, IS, precision and recall, CMMD and their intervals, against torch-fidelity and against plain restatements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sctool.core.errors import SctoolError, UsageError
from sctool.eval.intervals import BLOCKS, jackknife
from sctool.eval.metrics import SET_METRICS
from sctool.eval.sets import extraction, kid
from sctool.eval.sets.cmmd import ClipDiscrepancy
from sctool.eval.sets.feature_store import FeatureStore
from sctool.eval.sets.frechet import FrechetDistance, FrechetStats, frechet_distance
from sctool.eval.sets.inception_score import InceptionScore
from sctool.eval.sets.kid import KernelDistance
from sctool.eval.sets.precision_recall import K, PrecisionRecall

DIM = 6
MAKERS: dict[str, Callable[[], Any]] = {
    "fid": lambda: FrechetDistance(DIM),
    "kid": KernelDistance,
    "is": lambda: InceptionScore(DIM),
    "pr": PrecisionRecall,
    "cmmd": ClipDiscrepancy,
}


def features(n: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.normal(size=(n, dim)) + 0.3 * seed).astype(np.float32)


def real_of(name: str, y: np.ndarray) -> Any:
    if name == "fid":
        stats = FrechetStats(DIM)
        stats.update(y)
        return stats.compute()
    return None if name == "is" else y


@pytest.mark.parametrize("name", MAKERS)
def test_parts_merged_equal_the_whole_and_its_interval(name: str) -> None:
    x, real = features(43), real_of(name, features(37, 1))
    whole, left, right = (MAKERS[name]() for _ in range(3))
    whole.update(x)
    # Another process holds every other picture; positions say where each stands in the set.
    left.update(x[::2], list(range(0, 43, 2)))
    right.update(torch.from_numpy(x[1::2]), list(range(1, 43, 2)))
    left.merge(right)
    assert left.n == whole.n == 43
    assert list(whole.compute(real)) == list(SET_METRICS[name].figures)
    for key, (value, interval) in whole.compute(real).items():
        merged = left.compute(real)[key]
        assert merged.value == pytest.approx(value, rel=1e-9)
        assert merged.interval == pytest.approx(interval, rel=1e-9)
        assert interval is not None
        assert interval[0] < value < interval[1]
    assert "interval" in whole.protocol


@pytest.mark.parametrize("name", ["kid", "pr", "cmmd", "fid"])
def test_an_interval_is_the_jackknife_of_sets_without_a_block(name: str) -> None:
    x, real = features(33), real_of(name, features(30, 1))
    whole = MAKERS[name]()
    whole.update(x)
    for key, (value, interval) in whole.compute(real).items():
        left = []
        for block in range(BLOCKS):
            one = MAKERS[name]()
            one.update(x[np.arange(33) % BLOCKS != block])
            left.append(one.compute(real)[key].value)
        if name == "kid":  # the subsets of unequal sets are drawn anew; the interval is of the figure over all pairs
            left = [full_kid(x[np.arange(33) % BLOCKS != block], real) for block in range(BLOCKS)]
        error = np.sqrt((BLOCKS - 1) / BLOCKS * ((np.array(left) - np.mean(left)) ** 2).sum())
        low, high = (0, 1) if name == "pr" else (-np.inf if name == "kid" else 0, np.inf)
        wanted = max(low, value - 2.2621571628 * error), min(high, value + 2.2621571628 * error)
        assert interval == pytest.approx(wanted, rel=1e-5)


def full_kid(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD², term by term."""
    x, y = x.astype(float), y.astype(float)
    k = [[(float(a @ b) / DIM + 1) ** 3 for b in np.concatenate([x, y])] for a in np.concatenate([x, y])]
    table, n = np.array(k), len(x)
    xx, yy, xy = table[:n, :n], table[n:, n:], table[:n, n:]
    m = len(y)
    own = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return own - 2 * xy.mean()


def test_kid_equals_its_definition_and_torch_fidelitys(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(40), features(40, 1)
    equal = KernelDistance()
    equal.update(x)
    assert equal.compute(y)["kid"].value == pytest.approx(full_kid(x, y), rel=1e-9)
    monkeypatch.setattr(kid, "SUBSET", 25)
    found = equal.compute(y)["kid"].value
    random = np.random.RandomState(2020)
    subsets = [(random.choice(40, 25, replace=False), random.choice(40, 25, replace=False)) for _ in range(100)]
    assert found == pytest.approx(np.mean([full_kid(x[i], y[j]) for i, j in subsets]), rel=1e-9)
    oracle = pytest.importorskip("torch_fidelity.metric_kid")
    theirs = oracle.kid_features_to_metric(
        torch.from_numpy(x).double(), torch.from_numpy(y).double(), kid_subset_size=25, verbose=False
    )
    assert found == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_inception_score_equals_its_definition_and_torch_fidelitys() -> None:
    logits = 3 * features(50, dim=11)
    score = InceptionScore(11)
    for part in np.array_split(logits, 4):
        score.update(part)
    found = score.compute()["is"].value
    scores = []
    for split in range(10):
        rows = logits[split::10].astype(np.float64)
        p = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert found == pytest.approx(np.mean(scores), rel=1e-9)
    oracle = pytest.importorskip("torch_fidelity.metric_isc")
    # their splits are stretches of the set, ours every tenth picture
    ordered = torch.from_numpy(np.concatenate([logits[split::10] for split in range(10)]))
    theirs = oracle.isc_features_to_metric(ordered, splits=10, shuffle=False)
    assert found == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    same = InceptionScore(11)
    same.update(np.repeat(logits[:1], 30, 0))
    assert same.compute()["is"] == (pytest.approx(1), pytest.approx((1, 1)))


def test_precision_and_recall_equal_brute_force_and_torch_fidelitys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sctool.eval.sets.precision_recall.CHUNK", 7)
    x, y = features(30), features(26, 1)
    meter = PrecisionRecall()
    meter.update(x)

    def inside(points: np.ndarray, centres: np.ndarray) -> float:
        radius = [sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i)[K - 1]
                  for i, c in enumerate(centres)]  # fmt: skip
        return float(np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius, strict=True))
                              for p in points]))  # fmt: skip

    found = {key: estimate.value for key, estimate in meter.compute(y).items()}
    assert found == {"precision": pytest.approx(inside(x, y)), "recall": pytest.approx(inside(y, x))}
    assert 0 < found["recall"] < 1
    oracle = pytest.importorskip("torch_fidelity.metric_prc")
    theirs = oracle.prc_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), verbose=False)
    assert found == pytest.approx({key: theirs[key] for key in found})


def test_cmmd_equals_its_definition() -> None:
    x, y = features(14), features(11, 1)
    meter = ClipDiscrepancy()
    meter.update(x)
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x.astype(float), y.astype(float)))

    def mean(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.mean([[np.exp(-((i - j) ** 2).sum() / 200) for j in q] for i in p]))

    assert meter.compute(y)["cmmd"].value == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-6)
    longer = ClipDiscrepancy()
    longer.update(5 * x)
    assert longer.compute(3 * y)["cmmd"].value == pytest.approx(meter.compute(y)["cmmd"].value, rel=1e-4)


def test_more_features_than_dimensions_give_the_same_distance() -> None:
    x, y = features(700), features(650, 1)
    streamed, real = FrechetDistance(DIM), FrechetStats(DIM)
    for part in np.array_split(x, 90):
        streamed.update(part)
    for part in np.array_split(y, 90):
        real.update(part)
    plain = [FrechetStats(DIM) for _ in range(2)]
    for stats, z in zip(plain, (x, y), strict=True):
        stats.update(z)
    wanted = frechet_distance(plain[0].compute(), plain[1].compute())
    assert streamed.compute(real.compute())["fid"].value == pytest.approx(wanted, rel=1e-10)


def test_few_pictures_have_no_interval_and_too_few_no_figure() -> None:
    few = PrecisionRecall()
    few.update(features(9))
    assert [estimate.interval for estimate in few.compute(features(9, 1)).values()] == [None, None]
    assert jackknife(1.0, [1, 0], lambda block: 0.0).interval is None
    for name, message in (("kid", "2 images"), ("pr", "more than 3"), ("cmmd", "each side"), ("is", "are none")):
        with pytest.raises(SctoolError, match=message):
            MAKERS[name]().compute(features(9))
    with pytest.raises(ValueError, match="2 features and 1 positions"):
        FeatureStore().update(features(2), [0])


class Plain:
    """An extractor of mean colours."""

    dim, label, key, protocol = 3, "FID", "fid", {}

    def __init__(self, name: str, mark: str = "") -> None:
        self.name, self.mark = name, mark

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


def test_names_say_which_features() -> None:
    def named(metric: str, key: str, extractor: Plain) -> tuple[str, str]:
        return extraction.full_name(key, SET_METRICS[metric], extractor)

    inception, mini, clip = Plain("inception"), Plain("mini", " (mini features)"), Plain("clip", " (CLIP features)")
    assert named("kid", "kid", inception) == ("kid", "KID")
    assert named("kid", "kid", mini) == ("kid_mini", "KID (mini features)")
    assert named("cmmd", "cmmd", clip) == ("cmmd", "CMMD")
    assert named("cmmd", "cmmd", mini) == ("cmmd_mini", "CMMD (mini features)")
    assert named("pr", "recall", clip) == ("recall_clip", "recall (CLIP features)")


def test_dinov2_and_clip_folders_give_their_tokens(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    from sctool.eval.features.choosing import DinoFeatures, choose_features
    from sctool.eval.features.clip_models import MEAN, STD, prepared
    from sctool.eval.features.names import named_weights

    torch.manual_seed(0)
    net = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28))
    net.save_pretrained(tmp_path / "dino")
    pictures = torch.randint(0, 256, (2, 3, 40, 24), dtype=torch.uint8)
    weights = named_weights((str(tmp_path / "dino"),), "dinov2")
    dino = choose_features("dinov2", weights=weights)
    assert isinstance(dino, DinoFeatures)
    with torch.no_grad():
        wanted = net.eval()(prepared(pictures, 224, dino.mean, dino.std, crop=False)).last_hidden_state[:, 0]
    torch.testing.assert_close(dino(pictures), wanted)
    assert (dino.label, dino.dim) == ("FD-DINOv2", 16)

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tower | {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    save_tokenizer(tmp_path / "clip")
    clip = choose_features("clip", weights={"clip": str(tmp_path / "clip")})
    with torch.no_grad():
        wanted = model.get_image_features(prepared(pictures, 32, MEAN, STD, crop=False)).pooler_output
    torch.testing.assert_close(clip(pictures), wanted)
    assert (clip.label, clip.name) == ("FD-CLIP", "clip")
    assert not torch.allclose(clip(pictures).norm(dim=1), torch.ones(2))


def save_tokenizer(folder: Path) -> None:
    from transformers import CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>", "a</w>"]
    CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=8).save_pretrained(folder)


def test_weights_are_named_or_belong_to_the_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sctool.eval.features.choosing import choose_features
    from sctool.eval.features.names import named_weights

    monkeypatch.chdir(tmp_path)
    for name in ("a=b.pth", "x", "y"):
        (tmp_path / name).touch()
    assert named_weights(("a=b.pth", "clip=x"), "auto") == {"inception": "a=b.pth", "clip": "x"}
    assert named_weights(("x",), "clip") == {"clip": "x"}
    for specs, features, message in (
        (("x", "y"), "auto", "twice"),
        (("x",), "mini", "takes no weights"),
        ((), "mni", "Did you mean 'mini'"),
    ):
        with pytest.raises(UsageError, match=message):
            named_weights(specs, features)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for kind, where in (("dinov2", "--weights dinov2=PATH"), ("clip", "--weights clip=PATH")):
        with pytest.raises(SctoolError) as error:
            choose_features(kind, offline=True)
        assert all(word in str(error.value) for word in (where, "huggingface.co", "--features mini"))
        with pytest.raises(UsageError, match="no "):
            choose_features(kind, weights={kind: str(tmp_path / "none.pth")})
