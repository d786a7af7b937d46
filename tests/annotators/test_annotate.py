"""`sctool annotate` from end to end: layouts, resume, every bad picture, stdin, JSON."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from sctool.annotators.engine.ondemand import ensure_maps, recorded
from sctool.annotators.engine.run import annotate
from sctool.cli import run as cli
from sctool.core.config import AnnotateConfig
from sctool.core.data.images import Geometry, decode_map, decode_rgb
from sctool.core.data.sources import open_source
from sctool.core.errors import SctoolError, UsageError

ALL = ("canny,color,mask",)
PHOTO = data.astronaut()


def jpeg(image: np.ndarray, **more) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90, **more)
    return buffer.getvalue()


def crop(i: int, height: int = 96, width: int = 80) -> np.ndarray:
    y, x = (i * 37) % (512 - height), (i * 53) % (512 - width)
    return np.ascontiguousarray(PHOTO[y : y + height, x : x + width])


def folder_of(path: Path, count: int, height: int = 96) -> Path:
    rows = []
    for i in range(count):
        name = f"{'ab'[i % 2]}/{i:03d}.jpg"
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(jpeg(crop(i, height)))
        rows.append({"file_name": name, "text": f"picture {i}", "class": "ab"[i % 2]})
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def shards_of(path: Path, shards: int, each: int, extra: dict[str, bytes] | None = None) -> Path:
    path.mkdir(parents=True)
    for s in range(shards):
        with tarfile.open(path / f"{s:05d}.tar", "w") as tar:
            for i in range(each):
                key = f"{s:05d}{i:04d}"
                add(tar, f"{key}.jpg", jpeg(crop(s * each + i)))
                add(tar, f"{key}.txt", f"picture {key}".encode())
                add(tar, f"{key}.json", json.dumps({"key": key, "class": "hat", "caption": f"picture {key}"}).encode())
            for name, content in (extra or {}).items() if s == 0 else ():
                add(tar, name, content)
    return path


def go(src: Path | str, out: Path, cond: tuple[str, ...] = ALL, **more) -> dict:
    return annotate(AnnotateConfig(src=str(src), cond=cond, out=str(out), **more))


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def png(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)))


# ------------------------------------------------------------------------------------------------------ layouts


def test_merged_folder_is_read_by_datasets_and_by_sctool(tmp_path):
    src = folder_of(tmp_path / "src", 6)
    summary = go(src, tmp_path / "out")
    assert (summary["images"], summary["failed"]) == (6, 0)
    rows = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [f"{'ab'[i % 2]}/{i:03d}.jpg" for i in range(6)]
    assert rows[1]["text"] == "picture 1"
    assert rows[1]["class"] == "b"
    assert os.stat(tmp_path / "out/a/000.jpg").st_ino == os.stat(src / "a/000.jpg").st_ino
    noted = json.loads(rows[0]["conditions"])
    assert (noted["canny"]["low"], noted["canny"]["high"]) == (100, 200)
    assert noted["canny"]["opencv"] == cv2.__version__
    assert set(noted) == {"canny", "color", "mask", "source_sha256"}

    import datasets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = datasets.load_dataset(
            "imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"), split="train"
        )
    assert {"image", "text", "conditioning_image", "canny", "color", "mask", "class"} <= set(loaded.column_names)
    assert len(loaded) == 6
    for i, row in enumerate(loaded):
        image = np.array(row["image"].convert("RGB"))
        edges = np.array(row["conditioning_image"].convert("RGB"))
        assert np.array_equal(edges, np.repeat(cv2.Canny(image, 100, 200)[..., None], 3, 2)), i

    source = open_source(str(tmp_path / "out"))
    assert not source.faults
    assert len(source.records) == 6
    assert all(set(record.maps) >= {"canny", "color", "mask"} for record in source.records)
    edges = decode_map(source.records[0].maps["canny"])
    assert np.array_equal(edges, cv2.Canny(decode_rgb(source.records[0].image), 100, 200))


def test_merged_shards_are_read_by_datasets_and_by_sctool(tmp_path):
    src = shards_of(tmp_path / "src", 2, 6)
    go(src, tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(p.name for p in out.glob("[0-9]*")) == [
        "00000.tar", "00000_stats.json", "00001.tar", "00001_stats.json",
    ]  # fmt: skip
    with tarfile.open(out / "00000.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
        assert {m.mtime for m in tar} == {0}
    with tarfile.open(src / "00000.tar") as tar:
        assert members["000000003.jpg"] == tar.extractfile("000000003.jpg").read()
    suffixes = {"jpg", "txt", "json", "canny.png", "color.png", "mask.png"}
    assert set(members) == {f"00000{i:04d}.{s}" for i in range(6) for s in suffixes}
    meta = json.loads(members["000000003.json"])
    assert meta["class"] == "hat"
    assert meta["conditions"]["mask"]["preset"] == "train"
    image = decode_rgb(members["000000003.jpg"])
    assert np.array_equal(png(members["000000003.canny.png"]) * np.uint8(255), cv2.Canny(image, 100, 200))

    import datasets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = datasets.load_dataset(
            "webdataset", data_files=str(out / "*.tar"), cache_dir=str(tmp_path / "hf"), split="train"
        )
    assert len(loaded) == 12
    assert {"jpg", "txt", "json", "canny.png", "mask.png"} <= set(loaded.column_names)

    source = open_source(str(out))
    assert not source.faults
    assert all(set(record.maps) == {"canny", "color", "mask"} for record in source.records)
    assert source.records[0].text == "picture 000000000"


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_maps_layout_lies_beside_the_set(tmp_path, kind):
    src = folder_of(tmp_path / "src", 4) if kind == "folder" else shards_of(tmp_path / "src", 2, 2)
    go(src, tmp_path / "out", ("canny,mask",), layout="maps")
    files = set(tree(tmp_path / "out"))
    expected = {"conditions/canny/a/000.png"} if kind == "folder" else {"conditions/mask/00001.tar"}
    assert expected <= files
    assert not any(name.endswith(".jpg") for name in files)
    rows = [json.loads(line) for line in (tmp_path / "out/params.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert json.loads(rows[0]["conditions"])["canny"]["low"] == 100
    source = open_source(str(src), str(tmp_path / "out"))
    assert not source.faults
    for record in source.records:
        edges = decode_map(record.maps["canny"])
        assert np.array_equal(edges, cv2.Canny(decode_rgb(record.image), 100, 200))


@pytest.mark.parametrize(("size", "shape"), [("short:32", (38, 32)), ("crop:48", (48, 48)), ("short:200", (240, 200))])
def test_maps_are_made_on_the_pixels_that_are_written(tmp_path, size, shape):
    src = folder_of(tmp_path / "src", 1)
    go(src, tmp_path / "out", ("canny",), size=size)
    image = np.array(Image.open(tmp_path / "out/a/000.png"))
    assert image.shape == (*shape, 3)
    edges = png((tmp_path / "out/conditions/canny/a/000.png").read_bytes())
    assert np.array_equal(edges * np.uint8(255), cv2.Canny(image, 100, 200))


def test_resized_shards_hold_png_for_every_sample(tmp_path):
    go(shards_of(tmp_path / "src", 1, 3), tmp_path / "out", size="crop:64")
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        names = tar.getnames()
        image = png(tar.extractfile("000000001.png").read())
        edges = png(tar.extractfile("000000001.canny.png").read())
    assert not any(name.endswith(".jpg") for name in names)
    assert np.array_equal(edges * np.uint8(255), cv2.Canny(image, 100, 200))


def test_rendered_maps_are_rgb_at_full_size(tmp_path):
    go(folder_of(tmp_path / "src", 1), tmp_path / "out", render=True)
    shapes = {
        c: png((tmp_path / f"out/conditions/{c}/a/000.png").read_bytes()).shape for c in ("canny", "color", "mask")
    }
    assert set(shapes.values()) == {(96, 80, 3)}


def test_split_folders_stay_splits(tmp_path):
    for i, name in enumerate(("train/x/0", "train/x/1", "test/2")):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / f"{name}.jpg").write_bytes(jpeg(crop(i)))
        (tmp_path / "src" / f"{name}.txt").write_text(f"picture {i}")
    go(tmp_path / "src", tmp_path / "out")

    import datasets

    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"))
    assert {name: part["text"] for name, part in loaded.items()} == {
        "train": ["picture 0", "picture 1"], "test": ["picture 2"],
    }  # fmt: skip
    assert "mask" in loaded["train"].column_names
    source = open_source(str(tmp_path / "out"))
    assert sorted((r.split, r.key, *sorted({"canny", "mask"} & set(r.maps))) for r in source.records) == [
        ("test", "test/2", "canny", "mask"),
        ("train", "train/x/0", "canny", "mask"),
        ("train", "train/x/1", "canny", "mask"),
    ]


def test_a_second_condition_joins_the_first(tmp_path):
    for kind, src in (("folder", folder_of(tmp_path / "f", 2)), ("shards", shards_of(tmp_path / "s", 1, 2))):
        go(src, tmp_path / kind / "one", ("canny",))
        go(tmp_path / kind / "one", tmp_path / kind / "two", ("color",))
        (record, _) = open_source(str(tmp_path / kind / "two")).records
        assert {"canny", "color"} <= set(record.maps)
        how = record.meta["conditions"]
        assert {"canny", "color"} <= set(json.loads(how) if isinstance(how, str) else how)


# ------------------------------------------------------------------------------------------------------- resume


def test_any_number_of_processes_gives_the_same_bytes(tmp_path):
    src = shards_of(tmp_path / "src", 3, 3)
    go(src, tmp_path / "one", jobs=1)
    go(src, tmp_path / "two", jobs=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    keys = {"000020001.mask.png", "000020001.canny.png"}
    shutil.copytree(src, tmp_path / "moved")
    os.rename(tmp_path / "moved/00002.tar", tmp_path / "moved/00009.tar")
    go(tmp_path / "moved", tmp_path / "three", jobs=1)
    with tarfile.open(tmp_path / "one/00002.tar") as a, tarfile.open(tmp_path / "three/00009.tar") as b:
        assert all(a.extractfile(k).read() == b.extractfile(k).read() for k in keys)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_killed_and_run_again_gives_the_same_bytes(tmp_path, kind):
    src = folder_of(tmp_path / "src", 330, 32) if kind == "folder" else shards_of(tmp_path / "src", 5, 40)
    go(src, tmp_path / "whole", jobs=1)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "sctool", "annotate", str(src), "--cond", ALL[0], "--out", str(out), "-j", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    markers = ".sctool/part-*.json" if kind == "folder" else "*_stats.json"
    while not list(out.glob(markers)) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (out / "metadata.jsonl").exists()
    summary = go(src, out, jobs=1)
    assert 0 < summary["skipped"] < summary["images"]
    assert tree(out) == tree(tmp_path / "whole")
    assert go(src, out)["skipped"] == summary["images"]


@pytest.mark.parametrize(("number", "jobs", "code"), [(signal.SIGINT, "1", 130), (signal.SIGTERM, "2", 143)])
def test_signals_end_with_a_word_on_how_to_resume(tmp_path, number, jobs, code):
    src = shards_of(tmp_path / "src", 8, 40)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sctool", "annotate", str(src), "--cond", ALL[0], "--out", str(out), "-j", jobs]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not list(out.glob("*_stats.json")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "same command again" in said
    assert "Traceback" not in said
    assert not list(out.rglob("*.part"))
    assert go(src, out)["skipped"] > 0


def test_hidden_files_keep_their_names_and_fields_so_that_older_sets_resume(tmp_path):
    fields = ["settings", "source", "images", "failed", "errors", "files"]
    go(folder_of(tmp_path / "f", 2), tmp_path / "folder")
    assert sorted(tree(tmp_path / "folder/.sctool")) == ["lock", "part-00000.json", "settings.json"]
    assert list(json.loads((tmp_path / "folder/.sctool/part-00000.json").read_text())) == [*fields, "rows"]
    settings = json.loads((tmp_path / "folder/.sctool/settings.json").read_text())
    assert list(settings) == ["source", "kind", "conditions", "opencv", "size", "layout", "render", "seed"]
    go(shards_of(tmp_path / "s", 1, 2), tmp_path / "shards")
    assert list(json.loads((tmp_path / "shards/00000_stats.json").read_text())) == fields


def test_other_settings_or_another_source_never_mix(tmp_path):
    src = folder_of(tmp_path / "src", 2)
    go(src, tmp_path / "out", ("canny",))
    with pytest.raises(UsageError, match="was made with canny low = 100, now it is 50"):
        go(src, tmp_path / "out", ("canny:low=50",))
    with pytest.raises(UsageError, match="was made with source"):
        go(folder_of(tmp_path / "other", 2), tmp_path / "out", ("canny",))
    with pytest.raises(UsageError, match="contains other files"):
        go(src, src.parent / "other", ("canny",))
    with pytest.raises(UsageError, match="inside the source"):
        go(src, src / "out", ("canny",))


def test_changed_or_deleted_files_are_made_again(tmp_path):
    src = folder_of(tmp_path / "src", 3)
    out = tmp_path / "out"
    go(src, out)
    before = tree(out)
    (out / "conditions/canny/a/000.png").unlink()
    (out / "conditions/mask/a/002.png").write_bytes(b"")
    assert go(src, out)["skipped"] == 0
    assert tree(out) == before
    (src / "b/001.jpg").write_bytes(jpeg(crop(40)))
    go(src, out)
    assert (out / "b/001.jpg").read_bytes() == (src / "b/001.jpg").read_bytes()
    assert (out / "conditions/canny/b/001.png").read_bytes() != before["conditions/canny/b/001.png"]


def test_a_full_disk_is_one_clear_message_and_no_half_file(tmp_path, monkeypatch):
    src = folder_of(tmp_path / "src", 3)
    real, written = os.replace, []

    def replace(a, b):
        written.append(b)
        if len(written) >= 6:
            raise OSError(28, "No space left on device")
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SctoolError, match="No space left on device"):
        go(src, tmp_path / "out")
    monkeypatch.undo()
    assert not list((tmp_path / "out").rglob("*.part"))
    go(src, tmp_path / "out")
    go(src, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_limit_then_all(tmp_path):
    src = folder_of(tmp_path / "src", 5)
    assert go(src, tmp_path / "out", limit=2)["images"] == 2
    assert go(src, tmp_path / "out")["images"] == 5


# ---------------------------------------------------------------------------------------------------- bad input


def bad_pictures() -> dict[str, bytes]:
    """Files that are no usable picture, by name."""
    one = io.BytesIO()
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(one, "PNG")

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    giant = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 90001))
        + chunk(b"IEND", b"")
    )
    return {
        "text.jpg": b"this is no picture\n" * 20,
        "truncated.jpg": jpeg(crop(3))[:1200],
        "empty.jpg": b"",
        "giant.png": giant,
        "one.png": one.getvalue(),
    }


def odd_pictures() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files that are unusual but fine, with the RGB pixels that they show."""
    rgb = crop(5)
    pictures = {}

    def save(name: str, image: Image.Image, pixels: np.ndarray, kind: str, **more) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind, **more)
        pictures[name] = buffer.getvalue(), pixels

    deep = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    save("deep.png", deep, np.repeat(rgb[..., :1], 3, 2), "PNG")
    quarter = Image.fromarray(rgb).quantize(16)
    shown = np.array(quarter.convert("RGB"))
    clear = int(np.bincount(np.array(quarter).ravel()).argmax())
    shown[np.array(quarter) == clear] = 255
    save("palette.png", quarter, shown, "PNG", transparency=clear)
    gray = Image.fromarray(rgb).convert("L")
    save("gray.png", gray, np.repeat(np.array(gray)[..., None], 3, 2), "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(io.BytesIO(jpeg(rgb)))
    save(
        "turned.jpg", turned, np.rot90(np.array(Image.open(io.BytesIO(jpeg(rgb)))), -1), "JPEG", exif=exif, quality=100
    )
    cmyk = Image.fromarray(rgb).convert("CMYK")
    save("cmyk.jpg", cmyk, rgb, "JPEG", quality=100)
    return pictures


def test_bad_pictures_are_listed_and_never_end_the_run(tmp_path):
    src = folder_of(tmp_path / "src", 3)
    rows = (src / "metadata.jsonl").read_text()
    for name, content in bad_pictures().items():
        (src / name).write_bytes(content)
        rows += json.dumps({"file_name": name, "text": name, "class": "bad"}) + "\n"
    (src / "metadata.jsonl").write_text(rows)
    summary = go(src, tmp_path / "out")
    assert (summary["images"], summary["failed"]) == (3, 5)
    errors = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert sorted(Path(error["where"]).name for error in errors) == sorted(bad_pictures())
    assert all(error["reason"] for error in errors)
    assert len((tmp_path / "out/metadata.jsonl").read_text().splitlines()) == 3
    with pytest.raises(SctoolError, match="5 of 8"):
        go(src, tmp_path / "out", strict=True)
    import datasets

    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"))
    assert len(loaded["train"]) == 3


def test_odd_pictures_just_work_and_stay_aligned_for_plain_readers(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    for name, (content, _) in odd_pictures().items():
        (src / name).write_bytes(content)
        (src / name).with_suffix(".txt").write_text(name)
    summary = go(src, tmp_path / "out", ("canny",))
    assert (summary["images"], summary["failed"]) == (5, 0)
    for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        _, expected = odd_pictures()[row["text"]]
        image = np.array(Image.open(tmp_path / "out" / row["file_name"]).convert("RGB"))
        assert image.shape == expected.shape, row
        assert np.abs(image.astype(int) - expected).mean() < 6, row
        edges = png((tmp_path / "out" / row["canny_file_name"]).read_bytes())
        assert np.array_equal(edges * np.uint8(255), cv2.Canny(image, 100, 200)), row


def test_bad_members_of_shards_are_faults(tmp_path):
    extra = {
        "../escape.jpg": jpeg(crop(1)),
        "/absolute.jpg": jpeg(crop(2)),
        "000000001.jpg": jpeg(crop(9)),
        "broken.jpg": b"no picture",
        "broken.txt": b"a caption",
        "broken.json": b"{}",
    }
    src = shards_of(tmp_path / "src", 1, 6, extra)
    summary = go(src, tmp_path / "out")
    assert 5 <= summary["images"] <= 6
    said = (tmp_path / "out/errors.jsonl").read_text()
    assert all(word in said for word in ("escape", "absolute", "000000001", "broken"))
    assert not list(tmp_path.rglob("escape*"))
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        names = tar.getnames()
    assert len(names) == len(set(names)) == summary["images"] * 6


@pytest.mark.parametrize("kind", ["missing", "empty", "bad"])
def test_nothing_to_do_is_one_clear_message(tmp_path, kind, capsys):
    src = tmp_path / "src"
    if kind != "missing":
        src.mkdir()
    if kind == "bad":
        (src / "x.jpg").write_bytes(b"no picture")
    code = cli(["annotate", str(src if kind != "bad" else src / "x.jpg"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert code == (1 if kind == "bad" else 2)
    assert "src" in said
    assert "Traceback" not in said


# ------------------------------------------------------------------------------------------------- other inputs


def test_paths_on_stdin_with_json(tmp_path, monkeypatch, capsys):
    src = folder_of(tmp_path / "src", 4)
    listed = "".join(f"{path}\n" for path in sorted(src.rglob("*.jpg"))) + f"{src}/nowhere.jpg\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(listed))
    assert cli(["annotate", "-", "--cond", "canny", "--out", str(tmp_path / "out"), "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert (summary["images"], summary["failed"], summary["skipped"]) == (4, 1, 0)
    assert (tmp_path / "out/conditions/canny/a/000.png").exists()
    assert "nowhere.jpg" in (tmp_path / "out/errors.jsonl").read_text()


def test_one_picture(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(jpeg(crop(0)))
    go(tmp_path / "cat.jpg", tmp_path / "out", ("canny",))
    edges = png((tmp_path / "out/conditions/canny/cat.png").read_bytes())
    assert np.array_equal(edges * np.uint8(255), cv2.Canny(decode_rgb(jpeg(crop(0))), 100, 200))


def test_photos_are_built_in(tmp_path):
    summary = go("photos", tmp_path / "out", ("canny",), size="crop:32", limit=20, jobs=1)
    assert summary["images"] == 20
    assert all(record.text for record in open_source(str(tmp_path / "out")).records)


def test_misspelt_flags_name_the_nearest(tmp_path, capsys):
    src = folder_of(tmp_path / "src", 1)
    for flags, words in (
        (["--cond", "cany"], "Did you mean 'canny'"),
        (["--cond", "canny:lwo=3"], "Did you mean 'low'"),
        (["--size", "64"], "short:512"),
        (["--layout", "merge"], "'merged'"),
    ):
        assert cli(["annotate", str(src), "--out", str(tmp_path / "out"), *flags]) == 2
        assert words in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- on demand


def test_training_gets_maps_on_its_own_pixels(tmp_path):
    src = open_source(str(folder_of(tmp_path / "src", 3)))
    ready, settings = ensure_maps(src, ("canny", "color:ratio=16", "mask"), 48, tmp_path / "cache")
    assert settings["color"]["ratio"] == 16
    assert not src.records[0].maps
    geometry = Geometry(48)
    for record in ready.records:
        image = decode_rgb(record.image)
        seen = geometry.apply(image)
        maps = {c: geometry.apply_map(decode_map(blob), image.shape) for c, blob in record.maps.items()}
        assert np.array_equal(maps["canny"], cv2.Canny(np.ascontiguousarray(seen), 100, 200))
        assert {m.shape[:2] for m in maps.values()} == {(48, 48)}
        assert len(np.unique(maps["color"].reshape(-1, 3), axis=0)) <= 9
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.png")}
    again, _ = ensure_maps(src, ("canny", "color:ratio=16", "mask"), 48, tmp_path / "cache")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.png")} == stamps
    assert [r.maps["mask"].read() for r in again.records] == [r.maps["mask"].read() for r in ready.records]


def test_a_condition_that_needs_a_model_names_the_command(tmp_path, monkeypatch):
    from sctool.annotators import ANNOTATORS, Canny

    monkeypatch.setitem(ANNOTATORS, "hed", type("Hed", (Canny,), {"name": "hed"}))
    src = open_source(str(folder_of(tmp_path / "src", 1)))
    with pytest.raises(UsageError, match=r"sctool annotate .* --cond hed"):
        ensure_maps(src, ("hed",), 32, tmp_path / "cache")


def test_how_maps_were_made_is_read_back_from_an_annotated_set(tmp_path):
    go(shards_of(tmp_path / "src", 1, 3), tmp_path / "out", cond=("canny:low=50",))
    source, settings = ensure_maps(open_source(tmp_path / "out"), ["canny"], 64, tmp_path / "cache")
    assert (settings["canny"]["low"], settings["canny"]["high"]) == (50, 200)
    varied = [replace(r, meta={"conditions": {"canny": {"low": i, "high": 200}}}) for i, r in enumerate(source.records)]
    assert recorded(varied, ["canny"]) == {"canny": {"high": 200, "low_varies": True}}
