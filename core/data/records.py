"""The parts of a data set: blobs of bytes, records, faults."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

ANY = "conditioning_image"
"""A map that names no condition (diffusers' column, ControlNet's `source`): used for whichever is requested."""


class Blob:
    """Bytes that can be read again, with a name for messages. Small and picklable: records have blobs, never pixels."""

    @property
    def name(self) -> str:
        """Its name in messages, e.g. `00000.tar:000000001.jpg`."""
        raise NotImplementedError

    def read(self) -> bytes:
        """The bytes. Raises `OSError` when they can no longer be read."""
        raise NotImplementedError

    def stamp(self) -> str | None:
        """Differs whenever the bytes may have changed, without reading them; None when that cannot be known."""
        return None


@dataclass(frozen=True)
class BytesBlob(Blob):
    """Bytes in memory."""

    data: bytes = field(repr=False)
    label: str = "bytes"

    @property
    def name(self) -> str:
        """The label."""
        return self.label

    def read(self) -> bytes:
        """The bytes."""
        return self.data


@dataclass(frozen=True)
class FileBlob(Blob):
    """A file; `label` is its path inside the set, for messages."""

    path: str | Path
    label: str = ""

    @property
    def name(self) -> str:
        """Its path inside the set, else the full path."""
        return self.label or str(self.path)

    def read(self) -> bytes:
        """The file's bytes. Raises `OSError`."""
        with open(self.path, "rb") as file:
            return file.read()

    def stamp(self) -> str | None:
        """Path, size and modification time."""
        return file_stamp(self.path)


@dataclass(frozen=True)
class TarBlob(Blob):
    """One member of an uncompressed tar, read at its offset (bytes) without walking the tar."""

    tar: str
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """`SHARD.tar:MEMBER`."""
        return f"{os.path.basename(self.tar)}:{self.member}"

    def read(self) -> bytes:
        """The member's bytes. Raises `OSError` when the tar is cut off."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise OSError(f"{self.name} ends after {len(data)} of {self.size} bytes")
        return data

    def stamp(self) -> str | None:
        """The tar's path, size and modification time, and the member's offset and size."""
        stamp = file_stamp(self.tar)
        return stamp and f"{stamp}|{self.offset}|{self.size}"


def file_stamp(path: str | Path) -> str | None:
    """`path|size|mtime_ns`, or None when there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return f"{os.path.abspath(path)}|{status.st_size}|{status.st_mtime_ns}"


@dataclass(frozen=True)
class Record:
    """One image with its caption and maps.

    `key` is unique in the set (path without extension, or the shard's key). `maps` holds a map per condition. `split`
    is train, validation, test or None.
    """

    key: str
    image: Blob
    text: str | None = None
    maps: dict[str, Blob] = field(default_factory=dict)
    split: str | None = None
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def map_for(self, cond: str, only: bool = True) -> Blob | None:
        """The map of a condition; when it is the `only` one used, a map that names no condition will do."""
        return self.maps.get(cond) or (self.maps.get(ANY) if only else None)


@dataclass(frozen=True)
class Fault:
    """Something wrong with the set: where (a file, a line, a record) and why, with the remedy if there is one."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass
class Source:
    """A listed set. `faults` are those found while listing; `check` finds those that need decoding."""

    name: str
    kind: str
    records: list[Record]
    faults: list[Fault] = field(default_factory=list)
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def split(self, *names: str | None) -> list[Record]:
        """The records of the named splits; None means records without a split."""
        return [record for record in self.records if record.split in names]

    def conditions(self) -> list[str]:
        """The names of all conditions that occur, sorted."""
        return sorted({name for record in self.records for name in record.maps})


_SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
_SPLITS |= {"val": "validation", "dev": "validation", "test": "test", "testing": "test", "eval": "test"}


def split_name(word: Any) -> str | None:
    """train, validation or test for a word that means one of them (Hugging Face's folder names), else None."""
    return _SPLITS.get(str(word).lower()) if word else None


def without_duplicates(records: list[Record], faults: list[Fault]) -> list[Record]:
    """The first record of each key; the others become faults."""
    by_key: dict[str, Record] = {}
    for record in records:
        if record.key in by_key:
            first = by_key[record.key].image.name
            reason = f"the key '{record.key}' is already used by {first}; keys must be unique in a set"
            faults.append(Fault(record.image.name, reason))
        else:
            by_key[record.key] = record
    return list(by_key.values())
