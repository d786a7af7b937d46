"""Fréchet distance against scipy's sqrtm, pytorch-fid and closed forms; pytorch-fid's Inception rebuilt."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from sctool.core.errors import SctoolError, UsageError
from sctool.eval.frechet import FrechetStats, Moments, frechet_distance, small_sample_note


def stats(x: np.ndarray, parts: int = 3) -> FrechetStats:
    made = FrechetStats(x.shape[1])
    for part in np.array_split(x, parts):
        made.update(part)
    return made


def features(n: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)


@pytest.mark.parametrize(("n", "m", "close"), [(300, 280, 1e-10), (12, 15, 1e-5), (12, 300, 1e-5)])
def test_equals_pytorch_fid_whatever_the_numbers(n: int, m: int, close: float) -> None:
    # sqrtm itself is good to about 1e-6 only where the covariances are singular
    from pytorch_fid.fid_score import calculate_frechet_distance

    a, b = features(n, 20, 0), features(m, 20, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = calculate_frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert frechet_distance(stats(a).compute(), stats(b).compute()) == pytest.approx(wanted, rel=close)


def test_equal_covariances_leave_the_squared_distance_of_the_means() -> None:
    a = features(100, 8, 2)
    shift = np.arange(8.0)
    few = a[:6]
    for x in (a, few):
        moved = frechet_distance(stats(x).compute(), stats(x + shift).compute())
        assert moved == pytest.approx((shift**2).sum(), rel=1e-9)
        assert frechet_distance(stats(x).compute(), stats(x).compute()) == pytest.approx(0, abs=1e-9)


def test_nuclear_norm_equals_the_trace_of_covariances() -> None:
    a, b = stats(features(9, 30, 3)).compute(), stats(features(7, 30, 4)).compute()
    assert a.centred is not None
    without = [Moments(m.mu, m.sigma, m.n) for m in (a, b)]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(*without), rel=1e-5)


@pytest.mark.parametrize("sizes", [(5, 6), (40, 6), (6, 40), (40, 50), (0, 9)])
def test_merging_equals_one_stream(sizes: tuple[int, int]) -> None:
    x = features(sum(sizes), 10, 5)
    first, second = stats(x[: sizes[0]]), stats(x[sizes[0] :])
    first.merge(second)
    one, merged = stats(x, 1).compute(), first.compute()
    np.testing.assert_allclose(merged.sigma, np.cov(x.T), atol=1e-10)
    np.testing.assert_allclose(merged.mu, one.mu, atol=1e-12)
    assert merged.n == len(x)


def test_statistics_files_are_pytorch_fids(tmp_path: Path) -> None:
    moments = stats(features(50, 6, 6)).compute()
    moments.save(tmp_path / "ours.npz")
    back = Moments.load(tmp_path / "ours.npz")
    assert back.n == 50
    assert frechet_distance(moments, back) == pytest.approx(0, abs=1e-9)
    with np.load(tmp_path / "ours.npz") as file:
        np.savez(tmp_path / "theirs.npz", mu=file["mu"], sigma=file["sigma"])
    assert Moments.load(tmp_path / "theirs.npz").n is None
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(2))
    np.savez(tmp_path / "unlike.npz", mu=np.zeros(3), sigma=np.eye(2))
    (tmp_path / "text.npz").write_text("no")
    for name in ("pickled", "unlike", "text"):
        with pytest.raises(UsageError, match=name):
            Moments.load(tmp_path / f"{name}.npz")


def test_too_few_and_unlike_features_are_refused() -> None:
    with pytest.raises(SctoolError, match="at least 2"):
        stats(features(1, 4, 0), 1).compute()
    with pytest.raises(SctoolError, match="other extractors"):
        frechet_distance(stats(features(9, 4, 0)).compute(), stats(features(9, 5, 0)).compute())
    assert "fewer than its 2048" in (small_sample_note("FID", 500, 2048) or "")
    assert small_sample_note("FID", 50_000, 2048) is None


def test_inception_equals_pytorch_fids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_fid.inception import InceptionV3

    from sctool.eval.features import INCEPTION_FILE, InceptionFeatures, _FidInception, choose_features, inception_cache

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    cached = inception_cache()
    cached.parent.mkdir(parents=True)
    assert cached.name == INCEPTION_FILE
    torch.save(_FidInception().net.state_dict(), cached)
    theirs = InceptionV3().eval()
    pictures = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8)
    ours = choose_features("auto", base="mini", offline=True)
    assert isinstance(ours, InceptionFeatures)
    with torch.no_grad():
        wanted = theirs(pictures.float() / 255)[0].flatten(1)
    torch.testing.assert_close(ours(pictures), wanted, rtol=1e-4, atol=1e-5)
    assert ours.protocol["weights_sha256"]


def test_without_inception_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sctool.eval import features as module

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SctoolError) as error:
        module.choose_features("auto", base="some/base", offline=True)
    assert all(word in str(error.value) for word in ("--weights PATH", "download", "--features mini"))
    with pytest.raises(UsageError, match="no such file"):
        module.choose_features("inception", weights=str(tmp_path / "none.pth"))
    with pytest.raises(UsageError, match="Did you mean 'inception'"):
        module.choose_features("incepton")
    (tmp_path / "other.pth").write_bytes(b"not weights")
    with pytest.raises(SctoolError, match="is not pytorch-fid's Inception"):
        module.choose_features("inception", weights=str(tmp_path / "other.pth"))
