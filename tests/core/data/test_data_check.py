"""One look names every fault; the set `photos` keeps its held-out regions apart."""

import itertools

import cv2
import numpy as np
import pytest

from sctool.core.data.check import check
from sctool.core.data.images import decode_rgb
from sctool.core.data.photos import photos
from sctool.core.data.sources import open_source

RNG = np.random.default_rng(0)


def png(height, width, channels=3):
    return cv2.imencode(".png", RNG.integers(0, 256, (height, width, channels), dtype=np.uint8))[1].tobytes()


@pytest.fixture
def spoilt(tmp_path):
    """A folder with one fault of every kind, and two good pictures."""
    (tmp_path / "canny").mkdir()
    for name in ("good", "nocaption", "nomap", "wide", "badmap", "square"):
        (tmp_path / f"{name}.png").write_bytes(png(40, 60))
        (tmp_path / f"{name}.txt").write_text("" if name == "nocaption" else "a caption")
        (tmp_path / f"canny/{name}.png").write_bytes(png(20, 30, 1))
    for name, data in {"text": b"words", "zero": b"", "dot": png(1, 1), "cut": png(40, 60)[:-500]}.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
        (tmp_path / f"{name}.txt").write_text("a caption")
        (tmp_path / f"canny/{name}.png").write_bytes(png(1, 1, 1) if name == "dot" else png(20, 30, 1))
    (tmp_path / "canny/nomap.png").unlink()
    (tmp_path / "canny/wide.png").write_bytes(png(20, 60, 1))
    (tmp_path / "canny/badmap.png").write_bytes(b"words")
    (tmp_path / "canny/square.png").write_bytes(png(32, 32, 1))
    (tmp_path / "good.PNG").write_bytes(png(40, 60))
    return tmp_path


EXPECTED = {
    "nocaption.png": "has no caption",
    "nomap.png": "has no canny map",
    "canny/wide.png": "and its image differ in proportions: 60x20 for an image of 60x40",
    "canny/badmap.png": "is not an image",
    "text.jpg": "is not an image",
    "zero.jpg": "is empty (0 bytes)",
    "dot.jpg": "is 1x1 pixels, smaller than 8",
    "cut.jpg": "cut off",
    "good.png": "the key 'good' is already used by good.PNG",
}


def test_every_fault_is_named_at_once(spoilt):
    faults = check(open_source(spoilt), conds=["canny"], size=32)
    assert sorted(fault.where for fault in faults) == sorted(EXPECTED)
    for fault in faults:
        assert EXPECTED[fault.where] in fault.reason
    square = {fault.where for fault in check(open_source(spoilt), conds=["canny"])} - set(EXPECTED)
    assert square == {"canny/square.png"}, "a square map fits only when it has the training size"


def test_shallow_look_reads_headers_only(spoilt):
    found = {fault.where for fault in check(open_source(spoilt), prompt=None, deep=False)}
    assert found == {"text.jpg", "zero.jpg", "dot.jpg", "good.png"}


@pytest.mark.slow
def test_processes_find_the_same(spoilt):
    source = open_source(spoilt)
    assert check(source, conds=["canny"], jobs=2) == check(source, conds=["canny"])


# ------------------------------------------------------------------------------------------------------- photos


def test_photos_are_real_captioned_and_reproducible():
    source = photos()
    assert source.kind == "photos"
    assert 150 <= len(source) <= 320
    assert len({record.key for record in source.records}) == len(source)
    assert all(record.text.startswith(("a photo of", "a black and white photo of")) for record in source.records)
    assert [r.key for r in source.records] == [r.key for r in photos().records]
    source.records = source.records[::25]
    assert not check(source)
    for record in source.records:
        pixels = decode_rgb(record.image)
        assert pixels.shape[0] == pixels.shape[1] >= 128
        assert pixels.std() > 2
        assert record.image.read() == record.image.read()


def test_photos_held_out_regions_are_disjoint():
    source = photos()
    held = source.split("validation")
    training = source.split("train")
    assert 0.12 <= len(held) / len(source) <= 0.2
    for a, b in itertools.product(held, training):
        if a.meta["file"] == b.meta["file"]:
            x, y = (min(a.meta["box"][i + 2], b.meta["box"][i + 2]) for i in (0, 1))
            x, y = x - max(a.meta["box"][0], b.meta["box"][0]), y - max(a.meta["box"][1], b.meta["box"][1])
            assert min(x, y) <= 0, f"{a.key} and {b.key} share pixels"
    assert {record.label for record in held} == {record.label for record in training}
