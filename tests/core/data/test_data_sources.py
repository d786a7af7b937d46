"""Every layout of a set is listed alike; what is unsafe, double or missing becomes a fault, never a crash."""

import io
import json
import os
import tarfile

import cv2
import numpy as np
import pytest

from sctool.core.data.records import ANY
from sctool.core.data.sources import list_shard, open_source
from sctool.core.errors import UsageError


def picture(seed=0, height=24, width=32, extension=".png"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(extension, pixels)[1].tobytes()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def put_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            data = data if isinstance(data, bytes) else data.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def by_key(source):
    return {record.key: record for record in source.records}


def reasons(source):
    return " | ".join(map(str, source.faults))


# ------------------------------------------------------------------------------------------------------- layouts


def test_imagefolder_columns(tmp_path):
    for name in ("train/a.JPG", "validation/b.png", "maps/a.png", "edges/a.png", "c.png"):
        put(tmp_path / name, picture(extension=os.path.splitext(name)[1].lower()))
    put(tmp_path / "conditions/color/train/a.png", picture())
    put(
        tmp_path / "metadata.jsonl",
        lines(
            {"file_name": "train/a.JPG", "text": " a cat ", "class": "cat", "canny_file_name": "edges/a.png"}
            | {"conditioning_image_file_name": "maps/a.png", "extra": 3},
            {"file_name": "validation/b.png", "caption": "a dog", "label": 1},
            {"file_name": "c.png", "split": "val"},
        ),
    )
    source = open_source(str(tmp_path))
    assert source.kind == "imagefolder"
    assert not source.faults
    a, b, c = (by_key(source)[key] for key in ("train/a", "validation/b", "c"))
    assert (a.text, a.split, a.label, a.meta["extra"]) == ("a cat", "train", "cat", 3)
    assert (b.text, b.split, b.label) == ("a dog", "validation", "1")
    assert (c.text, c.split) == (None, "validation")
    assert set(a.maps) == {"canny", "color", ANY}
    assert a.map_for("canny").name == "edges/a.png"
    assert a.map_for("depth").name == "maps/a.png"
    assert a.map_for("depth", only=False) is None


def test_metadata_in_split_folders(tmp_path):
    for split in ("train", "test"):
        put(tmp_path / split / "a.png", picture())
        put(tmp_path / split / "metadata.jsonl", lines({"file_name": "a.png", "text": split}))
    assert {(r.key, r.split, r.text) for r in open_source(tmp_path).records} == {
        ("train/a", "train", "train"),
        ("test/a", "test", "test"),
    }


def test_text_folder_and_sibling_maps(tmp_path):
    put(tmp_path / "dogs/a.PNG", picture())
    put(tmp_path / "dogs/a.txt", "a dog\n")
    put(tmp_path / "b.c.jpg", picture(extension=".jpg"))
    put(tmp_path / "dogs/a.canny.png", picture())
    put(tmp_path / "color/dogs/a.png", picture())
    put(tmp_path / "conditions/anything/dogs/a.png", picture())
    source = open_source(tmp_path)
    assert source.kind == "textfolder"
    assert set(by_key(source)) == {"dogs/a", "b.c"}
    a = by_key(source)["dogs/a"]
    assert (a.text, a.label) == ("a dog", "dogs")
    assert {cond: blob.name for cond, blob in a.maps.items()} == {
        "canny": "dogs/a.canny.png",
        "color": "color/dogs/a.png",
        "anything": "conditions/anything/dogs/a.png",
    }


def test_prompt_json(tmp_path):
    put(tmp_path / "source/0.png", picture())
    put(tmp_path / "target/0.png", picture(1))
    put(tmp_path / "prompt.json", lines({"source": "source/0.png", "target": "target/0.png", "prompt": "a circle"}))
    for given in (tmp_path, tmp_path / "prompt.json"):
        source = open_source(given)
        (record,) = source.records
        assert source.kind == "prompts"
        assert (record.key, record.text, record.image.name) == ("target/0", "a circle", "target/0.png")
        assert record.map_for("canny").read() == picture()


def test_shards_members_and_sidecars(tmp_path):
    put_tar(
        tmp_path / "00000.tar",
        [
            ("000.JPG", picture(0, extension=".jpg")),
            ("000.txt", "a shirt"),
            ("000.json", json.dumps({"caption": "not used", "split": "test", "class": "shirt"})),
            ("000.canny.png", picture(1)),
            ("d/001.png", picture(2)),
            ("d/001.json", json.dumps({"caption": "from json"})),
        ],
    )
    put_tar(tmp_path / "conditions/color/00000.tar", [("000.color.png", picture(3)), ("d/001.png", picture(4))])
    source = open_source(tmp_path)
    assert source.kind == "shards"
    assert not source.faults
    first, second = source.records
    assert (first.key, first.text, first.split, first.label) == ("000", "a shirt", "test", "shirt")
    assert (second.key, second.text, second.split) == ("d/001", "from json", None)
    assert first.image.read() == picture(0, extension=".jpg")
    assert first.image.name == "00000.tar:000.JPG"
    assert first.maps["canny"].read() == picture(1)
    assert (first.maps["color"].read(), second.maps["color"].read()) == (picture(3), picture(4))
    assert [record.key for record in list_shard(tmp_path / "00000.tar")] == ["000", "d/001"]
    assert len(open_source(tmp_path / "00000.tar")) == 2


@pytest.mark.parametrize("layout", ["canny/a.png", "a.canny.png", "conditions/canny/a.png", "canny/00000.tar"])
def test_maps_elsewhere(tmp_path, layout):
    put(tmp_path / "set/a.png", picture())
    if layout.endswith(".tar"):
        put_tar(tmp_path / "maps" / layout, [("a.canny.png", picture(7))])
    else:
        put(tmp_path / "maps" / layout, picture(7))
    (record,) = open_source(tmp_path / "set", tmp_path / "maps").records
    assert record.maps["canny"].read() == picture(7)


def test_maps_folder_of_one_condition(tmp_path):
    put(tmp_path / "set/a.png", picture())
    put(tmp_path / "edges/a.png", picture(7))
    assert set(open_source(tmp_path / "set", tmp_path / "edges").records[0].maps) == {"edges"}
    put(tmp_path / "other/z.png", picture(7))
    with pytest.raises(UsageError, match="is a map of an image"):
        open_source(tmp_path / "set", tmp_path / "other")


def test_maps_folder_of_one_condition_in_shards(tmp_path):
    put_tar(tmp_path / "set/00000.tar", [("a.png", picture()), ("b.png", picture(1)), ("b.edges.png", picture(2))])
    put_tar(tmp_path / "edges/00000.tar", [("a.png", picture(7)), ("b.edges.png", picture(8)), ("c.png", picture(9))])
    maps = {record.key: record.maps for record in open_source(tmp_path / "set", tmp_path / "edges").records}
    assert {key: {cond: blob.read() for cond, blob in value.items()} for key, value in maps.items()} == {
        "a": {"edges": picture(7)},
        "b": {"edges": picture(8)},
    }, "the folder's maps come before the set's own"


def test_columns_in_order_of_precedence(tmp_path):
    for name in ("a.png", "b.png", "train/c.png", "train/d.png", "train/e.png"):
        put(tmp_path / name, picture())
    put(
        tmp_path / "metadata.jsonl",
        "\ufeff"
        + lines(
            {
                "image": "b.png",
                "file_name": "a.png",
                "prompt": "p",
                "caption": "c",
                "text": "t",
                "label": 1,
                "class": "k",
            },
            {"image_file_name": "b.png", "prompt": "p", "caption": " c ", "text": " ", "class": "", "label": 0},
            {"image": "train/c.png", "prompt": "p", "caption": None, "split": "test"},
            {"file_name": "train/d.png", "text": 5, "split": "other"},
            {"file_name": "train/e.png", "text": ["a"], "class": None},
        ),
    )
    source = open_source(tmp_path)
    assert [(r.key, r.text, r.label, r.split) for r in source] == [
        ("a", "t", "k", None),
        ("b", "c", "0", None),
        ("train/c", "p", None, "test"),
        ("train/d", None, None, "train"),
        ("train/e", None, None, "train"),
    ]
    assert not source.faults


def test_columns_that_are_maps(tmp_path):
    for name in ("a.png", "e.png", "s.png", "d.png", "c.png"):
        put(tmp_path / name, picture())
    row = {"canny": "e.png", "conditioning_image": "s.png", "any_file_name": "d.png", "depth": "near", "other": "c.png"}
    put(tmp_path / "metadata.jsonl", lines({"file_name": "a.png"} | row))
    source = open_source(tmp_path)
    assert not source.faults
    (record,) = source.records
    assert {cond: blob.name for cond, blob in record.maps.items()} == {"canny": "e.png", ANY: "s.png", "any": "d.png"}
    assert record.meta == row


def test_columns_that_name_no_file_are_no_maps(tmp_path):
    put(tmp_path / "a.png", picture())
    row = {"canny": 3, "depth": None, "seg_file_name": None, "pose_file_name": False, "hed": ["a.png"]}
    put(tmp_path / "metadata.jsonl", lines({"file_name": "a.png"} | row))
    source = open_source(tmp_path)
    assert [record.maps for record in source] == [{}]
    assert not source.faults


def test_tables_as_one_json_list(tmp_path):
    put(tmp_path / "a.png", picture())
    put(tmp_path / "b.png", picture())
    rows = [
        {"target": "a.png", "prompt": "x", "split": "val", "label": "k"},
        7,
        {"target": "b.png", "source": "gone.png"},
    ]
    put(tmp_path / "prompt.json", " " + json.dumps(rows, indent=1))
    source = open_source(tmp_path)
    assert [(r.key, r.text, r.split, r.label, r.maps) for r in source] == [
        ("a", "x", "validation", "k", {}),
        ("b", None, None, None, {}),
    ]
    assert [str(fault) for fault in source.faults] == [
        "prompt.json, row 2: is not a JSON object",
        "prompt.json, row 3, source: 'gone.png': no such file",
    ]
    put(tmp_path / "metadata.jsonl", lines({"file_name": "b.png"}))
    assert open_source(tmp_path).kind == "imagefolder", "metadata.jsonl comes first"
    put(tmp_path / "metadata.jsonl", "[{]")
    with pytest.raises(UsageError, match=r"metadata\.jsonl: is not valid JSON"):
        open_source(tmp_path)


def test_folders_are_splits_or_classes(tmp_path):
    for name in ("train/dog/a.png", "val/b.png", "cat/train/c.png", "d.png", "cat/big/e.png", "test/f.png"):
        put(tmp_path / name, picture())
    put(tmp_path / "d.txt", "  \n")
    assert {r.key: (r.split, r.label, r.text) for r in open_source(tmp_path)} == {
        "train/dog/a": ("train", "dog", None),
        "val/b": ("validation", None, None),
        "cat/train/c": (None, None, None),
        "d": (None, None, None),
        "cat/big/e": (None, "big", None),
        "test/f": ("test", None, None),
    }


def test_maps_in_order_of_precedence(tmp_path):
    """--maps, then a column, then a sibling; of shards --maps, then a sidecar, then the member."""
    put(tmp_path / "set/a.png", picture())
    for name in ("set/column.png", "set/a.canny.png", "maps/canny/a.canny.png"):
        put(tmp_path / name, picture())
    put(tmp_path / "set/metadata.jsonl", lines({"file_name": "a.png", "canny_file_name": "column.png"}))
    assert open_source(tmp_path / "set").records[0].maps["canny"].name == "column.png"
    blob = open_source(tmp_path / "set", tmp_path / "maps").records[0].maps["canny"]
    assert blob.name == "canny/a.canny.png"
    (tmp_path / "set/metadata.jsonl").unlink()
    assert open_source(tmp_path / "set").records[0].maps["canny"].name == "a.canny.png"

    put_tar(tmp_path / "shards/0.tar", [("a.png", picture()), ("a.canny.png", picture(1))])
    assert open_source(tmp_path / "shards").records[0].maps["canny"].read() == picture(1)
    sidecar = [("a.png", picture(2)), ("a.depth.png", picture(3)), ("a.txt", "x")]
    put_tar(tmp_path / "shards/canny/0.tar", sidecar)
    assert open_source(tmp_path / "shards").records[0].maps["canny"].read() == picture(2)
    assert open_source(tmp_path / "shards", tmp_path / "maps").records[0].maps["canny"].read() == picture()


def test_names_of_maps_beside_images(tmp_path):
    for name in (
        "dog/a.png", "dog/a.foo.png", "b.foo.png", "b.canny.png", "hed/c.png", "HED/dog/a.hed.png",
        "conditions/bar/dog/a.bar.png", "conditions/d.png", "mine/dog/a.png",
    ):  # fmt: skip
        put(tmp_path / name, picture())
    assert {r.key: {c: b.name for c, b in r.maps.items()} for r in open_source(tmp_path)} == {
        "dog/a": {"foo": "dog/a.foo.png", "hed": "HED/dog/a.hed.png", "bar": "conditions/bar/dog/a.bar.png"},
        "b.foo": {},
        "mine/dog/a": {},
    }


def test_folders_of_sidecar_shards(tmp_path):
    put_tar(tmp_path / "set/0.tar", [("a.png", picture())])
    for folder in ("conditions/foo", "depth"):
        put_tar(tmp_path / "set" / folder / "0.tar", [("a.png", picture())])
    put_tar(tmp_path / "maps/bar/0.tar", [("a.png", picture()), ("b.png", picture())])
    put_tar(tmp_path / "maps/conditions/baz/0.tar", [("a.foo.png", picture()), ("a.baz.png", picture(1))])
    assert set(open_source(tmp_path / "set").records[0].maps) == {"foo", "depth"}
    maps = open_source(tmp_path / "set", tmp_path / "maps").records[0].maps
    assert set(maps) == {"foo", "depth", "bar", "baz"}
    assert maps["baz"].read() == picture(1)
    put_tar(tmp_path / "other/mine/0.tar", [("a.png", picture())])
    put_tar(tmp_path / "other/0.tar", [("b.png", picture())])
    assert [(r.key, set(r.maps)) for r in open_source(tmp_path / "other") if r.maps] == []


def test_an_image_that_the_table_lists_is_not_a_map(tmp_path):
    put(tmp_path / "a.png", picture())
    put(tmp_path / "a.canny.png", picture())
    put(tmp_path / "metadata.jsonl", lines({"file_name": "a.png"}, {"file_name": "a.canny.png"}))
    assert [(r.key, r.maps) for r in open_source(tmp_path)] == [("a", {}), ("a.canny", {})]


def test_splits_and_captions_of_shards(tmp_path):
    members = [
        ("a.png", picture()), ("a.txt", " \n"), ("a.json", json.dumps({"caption": "from json", "split": "test"})),
        ("b.png", picture()), ("b.txt", "x" * ((1 << 20) + 1)),
        ("._c.png", picture()), ("c.json", "[1]"), ("c.PNG", picture()),
        ("d.png", picture()), ("d.json", "{"),
    ]  # fmt: skip
    put_tar(tmp_path / "train/0.tar", members)
    source = open_source(tmp_path)
    assert [(r.key, r.text, r.split) for r in source] == [
        ("a", "from json", "test"),
        ("b", None, "train"),
        ("c", None, "train"),
        ("d", None, "train"),
    ]
    assert [fault.where for fault in source.faults] == ["0.tar:b.txt", "0.tar:d.png"]
    assert "1,048,577 bytes" in source.faults[0].reason


# ------------------------------------------------------------------------------------------- missing and empty


def test_missing_folder_names_the_nearest(tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(UsageError, match=r"Did you mean '.*flowers'"):
        open_source(tmp_path / "flowrs")
    with pytest.raises(UsageError, match="does not exist"):
        open_source(tmp_path / "no" / "such" / "place")


def test_empty_and_pictureless_folders(tmp_path):
    with pytest.raises(UsageError, match="is empty"):
        open_source(tmp_path)
    put(tmp_path / "notes.md", "text")
    with pytest.raises(UsageError, match="contains no images"):
        open_source(tmp_path)
    with pytest.raises(UsageError, match="give the folder"):
        open_source(tmp_path / "notes.md")
    put(tmp_path / "metadata.jsonl", lines({"file_name": "gone.png"}))
    with pytest.raises(UsageError, match=r"line 1: 'gone.png': no such file"):
        open_source(tmp_path)


def test_rows_that_are_wrong_are_listed_together(tmp_path):
    put(tmp_path / "a.png", picture())
    rows = lines({"file_name": "a.png", "canny_file_name": "gone.png"}, {"text": "x"}, {"file_name": "gone.png"}, 7)
    put(tmp_path / "metadata.jsonl", rows + "{broken\n" + lines({"file_name": "a.png"}))
    source = open_source(tmp_path)
    assert len(source) == 1
    assert [fault.where for fault in source.faults[:5]] == [
        "metadata.jsonl, line 1, canny_file_name",
        "metadata.jsonl, line 2",
        "metadata.jsonl, line 3",
        "metadata.jsonl, line 4",
        "metadata.jsonl, line 5",
    ]
    assert "the key 'a' is already used" in source.faults[5].reason


# ------------------------------------------------------------------------------------------------------ security


@pytest.mark.parametrize("name", ["../secret.png", "{outside}", "x/../../secret.png", "link.png", "linked/secret.png"])
@pytest.mark.parametrize("table", ["metadata.jsonl", "prompt.json"])
def test_tables_cannot_leave_their_folder(tmp_path, table, name):
    root = tmp_path / "set"
    put(tmp_path / "secret.png", picture())
    put(root / "a.png", picture())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    name = name.replace("{outside}", str(tmp_path / "secret.png"))
    column = "file_name" if table == "metadata.jsonl" else "target"
    put(root / table, lines({column: "a.png", "canny_file_name": name}, {column: name}))
    source = open_source(root)
    assert [record.key for record in source.records] == ["a"]
    assert not source.records[0].maps
    assert sum(f.where.startswith(table) for f in source.faults) == 2


def test_folder_links_that_lead_out_are_faults(tmp_path):
    root = tmp_path / "set"
    put(tmp_path / "secret.png", picture())
    put(root / "a.png", picture())
    (root / "b.png").symlink_to(root / "a.png")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "loop").symlink_to(root)
    source = open_source(root)
    assert set(by_key(source)) == {"a", "b"}
    assert {fault.where for fault in source.faults} == {"out.png", "loop"}


def test_shard_members_cannot_escape(tmp_path):
    put_tar(tmp_path / "0.tar", [("a.png", picture()), ("../b.png", picture()), ("/c.png", picture())])
    with tarfile.open(tmp_path / "0.tar", "a") as archive:
        link = tarfile.TarInfo("d.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = open_source(tmp_path)
    assert [record.key for record in source.records] == ["a"]
    assert [fault.where for fault in source.faults] == ["0.tar:../b.png", "0.tar:/c.png", "0.tar:d.png"]


def test_duplicate_keys_and_damaged_shards(tmp_path):
    put_tar(tmp_path / "0.tar", [("a.png", picture()), ("b.png", picture()), ("b.png", picture())])
    put_tar(tmp_path / "1.tar", [("a.png", picture()), ("c.canny.png", picture())])
    put(tmp_path / "2.tar", b"no tar at all" * 100)
    whole = (tmp_path / "0.tar").read_bytes()
    put(tmp_path / "3.tar", whole[: len(whole) // 4].replace(b"a.png", b"z.png"))
    source = open_source(tmp_path)
    assert [record.key for record in source.records][:2] == ["a", "b"]
    text = reasons(source)
    assert "0.tar:b.png: occurs twice" in text
    assert "1.tar:a.png: the key 'a' is already used by 0.tar:a.png" in text
    assert "1.tar:c.canny.png: is a map without an image" in text
    assert "2.tar: is not a complete uncompressed tar" in text


@pytest.mark.shared
@pytest.mark.parametrize(("name", "count", "kind"), [("clothing", 3781, "shards"), ("flowers", 4317, "imagefolder")])
def test_real_sets(name, count, kind):
    if "SCTOOL_TEST_DATA" not in os.environ:
        pytest.skip("SCTOOL_TEST_DATA is not set")
    source = open_source(os.path.join(os.environ["SCTOOL_TEST_DATA"], name))
    assert (len(source), source.kind, source.faults) == (count, kind, [])
    assert all(record.text and record.label for record in source.records)
