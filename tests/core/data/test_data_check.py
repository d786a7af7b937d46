"""One look names every fault; the set `photos` keeps its held-out regions apart."""

import hashlib
import itertools
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from sctool.core.data import check as check_module
from sctool.core.data.check import check
from sctool.core.data.images import decode_rgb
from sctool.core.data.photos import photos
from sctool.core.data.prompts import PromptRule, caption_of
from sctool.core.data.records import ANY, Fault, FileBlob, Record, Source
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


def test_the_shorter_side_and_the_map_of_each_condition_count(tmp_path):
    (tmp_path / "a.png").write_bytes(png(40, 7))
    (tmp_path / "b.png").write_bytes(png(40, 8))
    records = [Record(name, FileBlob(tmp_path / f"{name}.png", name), "x") for name in ("a", "b")]
    (fault,) = check(Source("set", "code", records))
    assert str(fault) == "a: is 7x40 pixels, smaller than 8 on a side"
    nameless = [replace(record, maps={ANY: record.image}) for record in records[1:]]
    assert not check(Source("set", "code", nameless), conds=["canny"])
    faults = check(Source("set", "code", nameless), conds=["canny", "depth"])
    assert [str(fault) for fault in faults] == ["b: has no canny map", "b: has no depth map"]
    twice = check(Source("set", "code", records[1:] * 2, [Fault("line 1", "is broken")]))
    assert [fault.where for fault in twice] == ["line 1", "b"], "faults of listing come first"


@pytest.mark.parametrize(
    ("map", "image", "fits"),
    [
        ((50, 100), (500, 1000), True),
        ((500, 1000), (50, 100), True),
        ((8, 11), (500, 730), True),  # 1/64, rounded up
        ((100, 200), (100, 206), True),  # 1.5 % off
        ((1000, 2000), (1000, 2060), True),
        ((1000, 2000), (1000, 2100), False),  # 2.4 % off
        ((100, 200), (200, 100), False),
    ],
)
def test_maps_may_differ_in_proportions_by_two_percent(tmp_path, map, image, fits):
    (tmp_path / "map.png").write_bytes(png(*map, 1))
    (tmp_path / "image.png").write_bytes(png(*image))
    record = Record("a", FileBlob(tmp_path / "image.png"), "x", {"canny": FileBlob(tmp_path / "map.png")})
    assert (not check(Source("set", "code", [record]), conds=["canny"], deep=False)) == fits


def test_prompts_that_are_needed(tmp_path):
    (tmp_path / "a.png").write_bytes(png(40, 40))
    image = FileBlob(tmp_path / "a.png")
    records = [Record("1", image, "x"), Record("2", image, " ", label="dog"), Record("3", image)]
    source = Source("set", "code", records)
    rules = [caption_of, PromptRule(template="a {label}"), PromptRule("<s>"), None]
    counts = [len(check(source, prompt=rule)) for rule in rules]
    assert counts == [2, 1, 0, 0]


def test_large_sets_are_checked_by_all_cores(tmp_path, monkeypatch):
    started = []

    class Pool:
        def __init__(self, jobs, mp_context):
            started.append((jobs, mp_context.get_start_method()))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def map(self, function, chunks):
            return map(function, chunks)

    monkeypatch.setattr(check_module, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(check_module, "CHUNK", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    (tmp_path / "a.png").write_bytes(png(40, 40))
    records = [Record(str(i), FileBlob(tmp_path / "a.png", str(i))) for i in range(1025)]
    assert [f.where for f in check(Source("set", "code", records[:5]))] == ["0", "1", "2", "3", "4"]
    assert not started
    assert [f.where for f in check(Source("set", "code", records), deep=False)] == [str(i) for i in range(1025)]
    check(Source("set", "code", records[:5]), jobs=2)
    assert started == [(3, "spawn"), (2, "spawn")]


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


CROPS = {
    "astronaut.png": "a3b2ca4b",
    "chelsea.png": "04422e28",
    "coffee.png": "ca308eda",
    "rocket.jpg": "6e681d7d",
    "motorcycle_left.png": "46686bad",
    "camera.png": "a319f41d",
    "coins.png": "149e2f3d",
    "hubble_deep_field.jpg": "7200ca79",
    "retina.jpg": "0874e54f",
    "brick.png": "6951113f",
    "gravel.png": "5592136e",
    "grass.png": "af83a2e4",
}


def test_photos_keep_their_crops_and_captions():
    """Results on the built-in set depend on its boxes, captions and split."""
    rows: dict[str, list] = {}
    for record in photos():
        rows.setdefault(record.meta["file"], []).append([record.key, record.text, record.split, record.label])
    hashes = {file: hashlib.sha256(json.dumps(crops).encode()).hexdigest()[:8] for file, crops in rows.items()}
    assert hashes == {file: CROPS[file] for file in hashes}


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
