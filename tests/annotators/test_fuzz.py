"""A thousand damaged pictures, and shards that attack: all listed, the rest complete, nothing outside the folder."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from sctool.annotators.engine.run import annotate
from sctool.core.config import AnnotateConfig
from sctool.core.data.images import decode_rgb

PHOTO = data.chelsea()
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def picture(i: int, suffix: str, side: int = 40) -> bytes:
    y, x = (i * 17) % (300 - side), (i * 29) % (450 - side)
    buffer = io.BytesIO()
    Image.fromarray(PHOTO[y : y + side, x : x + side]).save(buffer, FORMATS[suffix])
    return buffer.getvalue()


def mutated(whole: bytes, rng: np.random.Generator) -> bytes:
    """Cut, flipped, zeroed, doubled, swapped or grown, in one place or many, header or body."""
    content = bytearray(whole)
    kind = rng.integers(7)
    at = int(rng.integers(len(content)))
    if kind == 0:
        del content[at:]
    elif kind == 1:
        for place in rng.integers(0, len(content), rng.integers(1, 40)):
            content[place] = rng.integers(256)
    elif kind == 2:
        for place in rng.integers(0, min(64, len(content)), rng.integers(1, 8)):
            content[place] = rng.integers(256)
    elif kind == 3:
        content[at : at + 32] = bytes(len(content[at : at + 32]))
    elif kind == 4:
        content[at:at] = content[at : at + int(rng.integers(1, 200))]
    elif kind == 5:
        content[at:] = rng.bytes(int(rng.integers(1, 300)))
    else:
        del content[at : at + int(rng.integers(1, 60))]
    return bytes(content)


@pytest.mark.slow
def test_a_thousand_mutated_pictures(tmp_path):
    rng = np.random.default_rng(0)
    src = tmp_path / "src"
    src.mkdir()
    for i in range(1000):
        suffix = list(FORMATS)[i % 3]
        (src / f"{i:04d}.{suffix}").write_bytes(mutated(picture(i, suffix), rng))
    for i in range(20):
        (src / f"whole{i}.png").write_bytes(picture(i, "png"))
    summary = annotate(AnnotateConfig(src=str(src), cond=("canny,color,mask",), out=str(tmp_path / "out"), jobs=1))
    rows = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    errors = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert summary["images"] == len(rows)
    assert summary["failed"] == len(errors)
    assert len(rows) + len(errors) == 1020
    assert len({error["where"] for error in errors}) == len(errors), "a picture is listed twice"
    assert all(error["reason"] and "\n" not in error["reason"] for error in errors)
    assert 100 < len(errors) < 1000, "the mutations are no test"
    assert {f"whole{i}.png" for i in range(20)} <= {row["file_name"] for row in rows}
    for row in rows:
        image = decode_rgb((tmp_path / "out" / row["file_name"]).read_bytes())
        for cond, shape in (("canny", image.shape[:2]), ("mask", image.shape[:2])):
            map = cv2.imread(str(tmp_path / "out" / row[f"{cond}_file_name"]), cv2.IMREAD_UNCHANGED)
            assert map.shape == shape, row


def member(tar: tarfile.TarFile, name: str, content: bytes, **more) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def test_a_shard_that_attacks(tmp_path):
    src = tmp_path / "set/src"
    src.mkdir(parents=True)
    with tarfile.open(src / "00000.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for i in range(3):
            member(tar, f"good{i}.jpg", picture(i, "jpg"))
            member(tar, f"good{i}.txt", b"a cat")
            member(tar, f"good{i}.json", b"{}")
        member(tar, "good1.jpg", picture(9, "jpg"))  # a second time
        member(tar, "../../escape.jpg", picture(1, "jpg"))
        member(tar, "/tmp/absolute.jpg", picture(1, "jpg"))
        member(tar, "a/../../climb.jpg", picture(1, "jpg"))
        member(tar, "link.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        member(tar, "hard.jpg", b"", type=tarfile.LNKTYPE, linkname="../../etc/passwd")
        member(tar, "pipe.jpg", b"", type=tarfile.FIFOTYPE)
        member(tar, "nocaption.jpg", picture(4, "jpg"))
        member(tar, "badjson.jpg", picture(5, "jpg"))
        member(tar, "badjson.json", b"{not json")
        member(tar, "listjson.jpg", picture(6, "jpg"))
        member(tar, "listjson.json", b"[1, 2]")
        member(tar, "nopicture.txt", b"a caption alone")
        member(tar, "caf\udce9.jpg", picture(7, "jpg"))  # a name in Latin-1, no UTF-8
        member(tar, "latin.jpg", picture(8, "jpg"))
        member(tar, "latin.txt", "caf\xe9".encode("latin-1"))
        member(tar, "empty.jpg", b"")
        member(tar, "text.jpg", b"this is text")
    with open(src / "00001.tar", "wb") as file:
        file.write((src / "00000.tar").read_bytes()[:9000])  # cut in the middle
    (src / "00002.tar").write_bytes(b"no tar at all")
    summary = annotate(AnnotateConfig(src=str(src), cond=("canny",), out=str(tmp_path / "out"), jobs=1))
    said = (tmp_path / "out/errors.jsonl").read_text("utf-8")
    for word in (
        "escape",
        "absolute",
        "climb",
        "link",
        "hard",
        "pipe",
        "good1",
        "badjson",
        "empty",
        "text",
        r"caf\\udce9",
        "00001.tar",
        "00002.tar",
    ):
        assert word in said, word
    with tarfile.open(tmp_path / "out/00000.tar", errors="surrogateescape") as tar:
        names = tar.getnames()
    assert len(names) == len(set(names))
    keys = {name.partition(".")[0] for name in names}
    assert {"good0", "good1", "good2", "nocaption", "badjson", "listjson", "latin"} <= keys
    assert all({f"{key}.jpg", f"{key}.txt", f"{key}.json", f"{key}.canny.png"} <= set(names) for key in keys)
    assert summary["images"] >= 8
    outside = {p.name for p in tmp_path.rglob("*") if "out" not in p.relative_to(tmp_path).parts[0]}
    assert outside == {"set", "src", "00000.tar", "00001.tar", "00002.tar"}
    assert not Path("/tmp/absolute.jpg").exists()


def test_names_that_are_no_utf8_in_a_folder(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    (src / "plain.jpg").write_bytes(picture(0, "jpg"))
    odd = b"caf\xe9.jpg"
    try:
        with open(bytes(src) + b"/" + odd, "wb") as file:
            file.write(picture(1, "jpg"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    (src / "caf\xe9 \U0001f600.png").write_bytes(picture(2, "png"))
    summary = annotate(AnnotateConfig(src=str(src), cond=("canny",), out=str(tmp_path / "out"), jobs=1))
    rows = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text("utf-8").splitlines()]
    assert {"plain.jpg", "caf\xe9 \U0001f600.png"} <= {row["file_name"] for row in rows}
    assert (summary["images"], summary["failed"]) == (2, 1)
    assert r"caf\\udce9.jpg" in (tmp_path / "out/errors.jsonl").read_text()


def test_missing_and_doubled_fields_of_tables(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    for i in range(4):
        (src / f"{i}.png").write_bytes(picture(i, "png"))
    rows = [
        '{"file_name": "0.png", "text": "a cat"}',
        '{"text": "no file named"}',
        '{"file_name": "0.png", "text": "a second time"}',
        '{"file_name": "gone.png", "text": "not there"}',
        '{"file_name": "../../etc/passwd", "text": "outside"}',
        '{"file_name": 7, "text": "a number"}',
        "not json",
        '{"file_name": "1.png", "text": null}',
        '{"file_name": "2.png"}',
        "",
    ]
    (src / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    summary = annotate(AnnotateConfig(src=str(src), cond=("canny",), out=str(tmp_path / "out"), jobs=1))
    assert summary["images"] == 3
    said = (tmp_path / "out/errors.jsonl").read_text()
    assert summary["failed"] == len(said.splitlines()) == 6
