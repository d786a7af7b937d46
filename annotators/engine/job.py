"""A job: one shard, or up to 256 images of a folder. What it reads, where its files go, and whether it is finished.

A job writes its images and maps, then a marker file that says what it wrote and from what. A marker counts only while
the settings, the source and the sizes of the written files still agree with it; otherwise the job is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...core.data.records import PICTURES, Blob, Fault, Record, file_stamp, without_duplicates
from ...core.data.shards import list_maps, read_shard
from ..base import Annotator
from .maps import Size

STATE_FOLDER = ".sctool"
"""Folder of settings and markers inside a written set; data set loaders skip hidden folders."""


@dataclass(frozen=True)
class Job:
    """Everything that `run_job` needs. Picklable, and small for a shard: the worker lists the shard's members."""

    name: str
    out: Path
    merged: bool
    annotators: tuple[Annotator, ...]
    size: Size
    render: bool
    settings: str
    """Hash of the run's settings."""
    records: tuple[Record, ...] = ()
    image_paths: tuple[str, ...] = ()
    """Path of each image inside the written set, with its suffix."""
    tar: str = ""
    """The shard; empty for images of a folder."""
    sidecars: tuple[tuple[str, str], ...] = ()
    """(condition, tar) of the maps that already lie beside the shard."""
    split: str | None = None
    limit: int | None = None
    """Read only this many images of the shard."""

    @property
    def is_shard(self) -> bool:
        """Whether the job is a shard."""
        return bool(self.tar)

    @property
    def marker(self) -> Path:
        """The marker file: beside a shard, like img2dataset's stats; in the hidden folder for images of a folder."""
        return self.out / f"{self.name}_stats.json" if self.is_shard else self.out / STATE_FOLDER / f"{self.name}.json"

    @property
    def marker_pattern(self) -> str:
        """Matches the markers of all jobs like this one, below the written set."""
        return "**/*_stats.json" if self.is_shard else f"{STATE_FOLDER}/part-*.json"

    def fingerprint(self) -> str:
        """Hash of what the job reads.

        For a shard: size and time of its files. Otherwise: key, caption, columns, and size and time of every image.
        """
        digest = hashlib.sha256()
        if self.is_shard:
            files = [self.tar, *(tar for _, tar in self.sidecars)]
            digest.update(json.dumps([self.limit, *(file_stamp(file) for file in files)]).encode())
        for record, path in zip(self.records, self.image_paths, strict=True):
            row = [record.key, path, record.text, record.label, record.split, record.meta, blob_stamp(record.image)]
            digest.update(json.dumps([*row, sorted(record.maps)], sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def list_records(self) -> tuple[list[tuple[Record, str]], list[Fault]]:
        """The job's records, each with the path of its image in the written set, and the faults of its members."""
        if not self.is_shard:
            return list(zip(self.records, self.image_paths, strict=True)), []
        records, faults = read_shard(self.tar)
        records = without_duplicates(records, faults)[: self.limit]
        maps: dict[str, dict[str, Blob]] = {}
        for cond, tar in self.sidecars:
            blobs, map_faults = list_maps(tar, cond)
            faults += map_faults
            for key, blob in blobs.items():
                maps.setdefault(key, {})[cond] = blob
        listed = []
        for record in records:
            joined = {**record.maps, **maps.get(record.key, {})}
            record = replace(record, maps=joined, split=record.split or self.split)
            listed.append((record, f"{record.key}{image_suffix(record)}"))
        return listed, faults

    def read_marker(self) -> dict[str, Any]:
        """The contents of the marker file, valid or not; {} if there is none."""
        return read_marker(self.marker)

    def valid_marker(self) -> dict[str, Any] | None:
        """The contents of the marker file if it is whole and still true, otherwise None."""
        marker = self.read_marker()
        try:
            if marker["settings"] != self.settings or marker["source"] != self.fingerprint():
                return None
            if any(os.path.getsize(self.out / name) != size for name, size in marker["files"].items()):
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return marker


def read_marker(path: Path) -> dict[str, Any]:
    """The contents of a marker file; {} if it is missing or damaged."""
    try:
        marker = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def image_suffix(record: Record) -> str:
    """The suffix of the record's image file; .png if that is not an image suffix."""
    suffix = os.path.splitext(record.image.name)[1].lower()
    return suffix if suffix in PICTURES else ".png"


def blob_stamp(blob: Blob) -> str:
    """Changes whenever the blob's bytes may have changed."""
    try:
        return blob.stamp() or hashlib.sha256(blob.read()).hexdigest()
    except OSError:
        return "missing"
