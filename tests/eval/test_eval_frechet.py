"""Fréchet distance against scipy's sqrtm, pytorch-fid and closed forms; pytorch-fid's Inception rebuilt."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sctool.core.errors import SctoolError, UsageError
from sctool.eval.sets.frechet import FrechetStats, Moments, frechet_distance, small_sample_note


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


def test_both_roots_of_a_covariance_are_roots() -> None:
    for n in (90, 8):  # full rank, by Cholesky; singular, by eigenvalues
        moments = stats(features(n, 20, 7)).compute()
        root = moments.root.numpy()
        np.testing.assert_allclose(root @ root.T, moments.sigma, atol=1e-9)
        assert np.allclose(root, np.tril(root)) == (n == 90)


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
    with pytest.raises(SctoolError, match="different extractors"):
        frechet_distance(stats(features(9, 4, 0)).compute(), stats(features(9, 5, 0)).compute())
    assert "fewer than its 2048" in (small_sample_note("FID", 500, 2048) or "")
    assert small_sample_note("FID", 50_000, 2048) is None


def test_inception_equals_pytorch_fids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_fid.inception import InceptionV3

    from sctool.eval.features.choosing import choose_features
    from sctool.eval.features.inception import INCEPTION_FILE, FidInception, InceptionFeatures, inception_cache

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    cached = inception_cache()
    cached.parent.mkdir(parents=True)
    assert cached.name == INCEPTION_FILE
    torch.save(FidInception().net.state_dict(), cached)
    theirs = InceptionV3().eval()
    pictures = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8)
    ours = choose_features("auto", base="mini", offline=True)
    assert isinstance(ours, InceptionFeatures)
    with torch.no_grad():
        wanted = theirs(pictures.float() / 255)[0].flatten(1)
    torch.testing.assert_close(ours(pictures), wanted, rtol=1e-4, atol=1e-5)
    assert ours.protocol["weights_sha256"]
    features = ours(pictures)
    torch.testing.assert_close(ours.logits(features), features @ ours.net.net.fc.weight.T)
    assert ours.logits(features).shape == (2, 1008)
    clean = choose_features("inception-clean", weights={"inception": str(cached)})
    assert (clean.label, clean.key, clean.name) == ("FID (clean resize)", "fid_clean", "clean")
    assert not torch.allclose(clean(pictures), features)


def float_bicubic(picture: np.ndarray) -> np.ndarray:
    """clean-fid's rule, written down once more: Pillow's bicubic on float channels, clipped, not rounded."""
    channels = [
        np.asarray(Image.fromarray(picture[..., c].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    return np.stack(channels, -1).clip(0, 255)


@pytest.mark.parametrize("size", [(512, 400), (64, 64), (299, 299), (130, 700)])
def test_clean_resize_equals_clean_fids(size: tuple[int, int]) -> None:
    from sctool.eval.features.inception import clean_resize

    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = clean_resize(torch.from_numpy(picture).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours, float_bicubic(picture), atol=1e-2)
    cleanfid = pytest.importorskip("cleanfid.resize")
    np.testing.assert_allclose(ours, cleanfid.build_resizer("clean")(picture), atol=1e-2)


@pytest.mark.slow
def test_a_folder_measured_through_the_network_equals_pytorch_fids_own_flow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_fid import fid_score, inception

    from sctool.eval.features.inception import FidInception, InceptionFeatures
    from sctool.eval.sets.frechet import FrechetDistance

    torch.manual_seed(1)
    net = FidInception().net
    monkeypatch.setattr(inception, "fid_inception_v3", lambda: net)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    random = np.random.default_rng(2)
    pictures = {name: random.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8) // (k + 1) for k, name in enumerate("ab")}
    for name, few in pictures.items():
        (tmp_path / name).mkdir()
        for index, picture in enumerate(few):
            Image.fromarray(picture).save(tmp_path / name / f"{index}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = [str(tmp_path / name) for name in pictures]
        wanted = fid_score.calculate_fid_given_paths(paths, 6, "cpu", 2048, num_workers=0)
    extractor = InceptionFeatures(tmp_path / "net.pth")
    drawn, real = FrechetDistance(2048), FrechetStats(2048)
    for meter, few in zip((drawn, real), pictures.values(), strict=True):
        meter.update(extractor(torch.from_numpy(few).permute(0, 3, 1, 2)))
    # random weights make small features, so the distance is about 1e-13
    assert drawn.compute(real.compute())["fid"].value == pytest.approx(wanted, rel=1e-6, abs=0)


def test_without_inception_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sctool.eval.features import choosing as module

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SctoolError) as error:
        module.choose_features("auto", base="some/base", offline=True)
    assert all(word in str(error.value) for word in ("--weights PATH", "download", "--features mini"))
    with pytest.raises(UsageError, match="no such file"):
        module.choose_features("inception", weights={"inception": str(tmp_path / "none.pth")})
    with pytest.raises(UsageError, match="Did you mean 'inception'"):
        module.choose_features("incepton")
    (tmp_path / "other.pth").write_bytes(b"not weights")
    with pytest.raises(SctoolError, match="is not pytorch-fid's Inception"):
        module.choose_features("inception", weights={"inception": str(tmp_path / "other.pth")})
