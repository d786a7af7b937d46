"""Blobs notice changes, words name splits, and paths stay inside their set."""

import os

import pytest

from sctool.core.data.paths import inside, shown, unsafe, walk
from sctool.core.data.records import BytesBlob, Fault, FileBlob, Record, Source, TarBlob, split_name


def test_stamps_change_with_the_file(tmp_path, monkeypatch):
    file = tmp_path / "0.tar"
    file.write_bytes(b"0123456789")
    os.utime(file, ns=(1, 1))
    blobs = [
        FileBlob(file),
        TarBlob(str(file), "a", 2, 3),
        TarBlob(str(file), "b", 5, 3),
        TarBlob(str(file), "c", 2, 4),
    ]
    before = [blob.stamp() for blob in blobs]
    assert len(set(before)) == 4
    os.utime(file, ns=(1, 2))
    later = [blob.stamp() for blob in blobs]
    file.write_bytes(b"01234567890")
    os.utime(file, ns=(1, 2))
    longer = [blob.stamp() for blob in blobs]
    assert len({*before, *later, *longer}) == 12
    monkeypatch.chdir(tmp_path)
    assert FileBlob("0.tar").stamp() == longer[0], "the stamp has the absolute path"
    file.unlink()
    assert {blob.stamp() for blob in [*blobs, BytesBlob(b"x")]} == {None}


def test_a_member_beyond_the_end_is_an_error(tmp_path):
    file = tmp_path / "0.tar"
    file.write_bytes(b"0123456789")
    assert TarBlob(str(file), "a", 2, 3).read() == b"234"
    with pytest.raises(OSError, match=r"0\.tar:a ends after 2 of 3 bytes"):
        TarBlob(str(file), "a", 8, 3).read()


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train", ["train", "Train", "training"]),
        ("validation", ["validation", "valid", "VAL", "dev"]),
        ("test", ["test", "testing", "eval"]),
        (None, ["", None, "other", "trainer", 0]),
    ],
)
def test_words_for_splits(split, words):
    assert {split_name(word) for word in words} == {split}


def test_records_of_a_split():
    records = [Record(str(i), BytesBlob(b""), split=split) for i, split in enumerate(["train", None, "test", "train"])]
    source = Source("set", "code", records)
    assert [record.key for record in source.split("train", None)] == ["0", "1", "3"]
    assert [record.key for record in source.split("test")] == ["2"]


# -------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a/b.png", None),
        ("a..b/..c.png", None),
        ("", "empty"),
        ("a\0.png", "NUL"),
        ("\udcff.png", "not UTF-8"),
        ("/a.png", "absolute"),
        ("\\a.png", "absolute"),
        ("c:a.png", "absolute"),
        ("a/../b.png", "leaves"),
        ("a\\..\\b.png", "leaves"),
        ("..", "leaves"),
    ],
)
def test_unsafe_paths(tmp_path, name, reason):
    assert (unsafe(name) is None) == (reason is None)
    assert reason is None or reason in (unsafe(name) or "")
    assert inside(tmp_path, name) == (None, unsafe(name) or "no such file")


def test_folders_are_listed_in_order_without_hidden_files(tmp_path):
    names = ["b/a.png", "b.png", "a/c/d.png", "a/b.png", "B.png", "é.png"]
    for name in [*names, ".hidden.png", ".git/a.png", "a/.a.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
        pass
    faults: list[Fault] = []
    assert walk(tmp_path, faults) == ["B.png", "a/b.png", "a/c/d.png", "b.png", "b/a.png", "é.png"]
    assert [str(fault) for fault in faults] == ["\\udcff.png: the name is not UTF-8; rename the file"]
    assert shown("a") == "a"
