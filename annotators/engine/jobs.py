"""One unit of work, a shard or a run of pictures: a pure function of its job, safe to repeat and to kill.

A unit writes its pictures and maps, then one marker that says what it made and from what. A marker counts only while
settings, source and the files' sizes still agree; otherwise the unit is done again, giving the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...core.data.images import BadImage
from ...core.data.records import ANY, PICTURES, Blob, Fault, Record, file_stamp, without_duplicates
from ...core.data.shards import list_maps, read_shard
from ...core.files import write_text
from ..base import Annotator
from .maps import Opened, Size, make, read
from .pool import Beat
from .writers import FolderWriter, ShardWriter, Writer

HIDDEN = ".sctool"
"""Folder of settings and markers in a written set; loaders of data sets skip hidden folders."""
BATCH = 16
PIXELS = 16 << 20
"""A batch holds no more pictures, and takes no further one once it has so many pixels: 50 MB and one picture."""


@dataclass(frozen=True)
class Job:
    """Everything `annotate_unit` needs; picklable, and small for a shard, whose members are listed by its worker."""

    unit: str
    out: Path
    merged: bool
    annotators: tuple[Annotator, ...]
    size: Size
    render: bool
    settings: str
    """Hash of the run's settings."""
    records: tuple[Record, ...] = ()
    names: tuple[str, ...] = ()
    """Path of each picture inside the written set, with its suffix."""
    tar: str = ""
    """The shard, where the unit is one."""
    sidecars: tuple[tuple[str, str], ...] = ()
    """(condition, tar) of the maps that lie beside the shard already."""
    split: str | None = None
    limit: int | None = None
    """Only the first so many pictures of the shard."""

    @property
    def shard(self) -> bool:
        """Whether the unit is a shard."""
        return bool(self.tar)

    @property
    def marker(self) -> Path:
        """Where the unit's marker lies: beside a shard as img2dataset's stats, hidden for folders."""
        return self.out / f"{self.unit}_stats.json" if self.shard else self.out / HIDDEN / f"{self.unit}.json"

    def fingerprint(self) -> str:
        """Hash of what the unit reads.

        Of a shard size and time of its files; else keys, captions, columns, and size and time of every picture.
        """
        digest = hashlib.sha256()
        if self.shard:
            files = [self.tar, *(tar for _, tar in self.sidecars)]
            digest.update(json.dumps([self.limit, *(file_stamp(file) for file in files)]).encode())
        for record, name in zip(self.records, self.names, strict=True):
            row = [record.key, name, record.text, record.label, record.split, record.meta, _stamp(record.image)]
            digest.update(json.dumps([*row, sorted(record.maps)], sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def listed(self) -> tuple[list[tuple[Record, str]], list[Fault]]:
        """The unit's pictures with their names in the written set, and what is wrong with its members."""
        if not self.shard:
            return list(zip(self.records, self.names, strict=True)), []
        records, faults = read_shard(self.tar)
        records = without_duplicates(records, faults)[: self.limit]
        maps: dict[str, dict[str, Blob]] = {}
        for cond, tar in self.sidecars:
            found, wrong = list_maps(tar, cond)
            faults += wrong
            for key, blob in found.items():
                maps.setdefault(key, {})[cond] = blob
        listed = []
        for record in records:
            joined = {**record.maps, **maps.get(record.key, {})}
            record = replace(record, maps=joined, split=record.split or self.split)
            listed.append((record, f"{record.key}{suffix_of(record)}"))
        return listed, faults


def suffix_of(record: Record) -> str:
    """The suffix of a picture's file, .png where it has no picture's suffix."""
    suffix = os.path.splitext(record.image.name)[1].lower()
    return suffix if suffix in PICTURES else ".png"


def _stamp(blob: Blob) -> str:
    """What changes whenever the blob's bytes may have changed."""
    try:
        return blob.stamp() or hashlib.sha256(blob.read()).hexdigest()
    except OSError:
        return "missing"


def finished(job: Job) -> dict[str, Any] | None:
    """The unit's marker, if it is whole and still true."""
    try:
        marker = json.loads(job.marker.read_text())
        if marker["settings"] != job.settings or marker["source"] != job.fingerprint():
            return None
        if any(os.path.getsize(job.out / name) != size for name, size in marker["files"].items()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return marker


def annotate_unit(job: Job, beat: Beat) -> dict[str, int]:
    """Makes every map of the unit and writes its marker; gives the number of images and of errors.

    A picture that cannot be read is listed under `errors` and left out. Raises `SctoolError` only when nothing can be
    written.
    """
    fingerprint = job.fingerprint()
    listed, faults = job.listed()
    errors: list[dict[str, str]] = [vars(fault) for fault in faults]
    rows: list[dict[str, Any]] = []
    writer: Writer
    with ShardWriter(job) if job.shard else FolderWriter(job) as writer:
        for batch in _batches(job, listed, errors, beat):
            made = make(
                [opened for _, _, opened, _ in batch], job.annotators, job.size, render=job.render, image=job.merged
            )
            for (record, name, opened, carried), each in zip(batch, made, strict=True):
                row = writer.add(record, name, opened.data, each, carried)
                if not (job.shard and job.merged):
                    rows.append(row)
                writer.count += 1
                beat()
    marker = {
        "settings": job.settings,
        "source": fingerprint,
        "images": writer.count,
        "failed": len(errors),
        "errors": errors,
        "files": writer.files,
    }
    if not (job.shard and job.merged):
        marker["rows"] = rows
    write_text(job.marker, json.dumps(marker, ensure_ascii=False, indent=1) + "\n")
    return {"images": writer.count, "failed": len(errors)}


Ready = tuple[Record, str, Opened, dict[str, bytes]]
"""A picture that was read, its name in the set, and the files of maps that are carried over."""


def _batches(
    job: Job, listed: list[tuple[Record, str]], errors: list[dict[str, str]], beat: Beat
) -> Iterator[list[Ready]]:
    """The unit's pictures in batches of `BATCH` or about `PIXELS`; the unit alone decides which go together."""
    batch: list[Ready] = []
    pixels = 0
    carried = sorted({cond for record, _ in listed for cond in record.maps} - {a.name for a in job.annotators} - {ANY})
    if not job.merged or job.size.kind != "none":  # the maps alone, or maps that do not fit the new size
        carried = []
    for record, name in listed:
        try:
            opened = read(record.image.read(), record.key, job.size)
            batch.append((record, name, opened, _carried(job, record, carried, errors)))
        except (BadImage, OSError) as error:
            errors.append({"where": record.image.name, "reason": str(error)})
            beat()
            continue
        pixels += opened.pixels.shape[0] * opened.pixels.shape[1]
        if len(batch) == BATCH or pixels >= PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def _carried(job: Job, record: Record, conds: list[str], errors: list[dict[str, str]]) -> dict[str, bytes]:
    """Files of the maps that the set has already; one that is missing in a shard or cannot be read is listed."""
    found = {}
    for cond in conds:
        blob = record.maps.get(cond)
        try:
            if blob is not None:
                found[cond] = blob.read()
            elif job.shard:  # where readers want every field in every sample
                errors.append(
                    {"where": record.image.name, "reason": f"has no {cond} map, which others of its shard have"}
                )
        except OSError as error:
            errors.append({"where": blob.name if blob else cond, "reason": f"the {cond} map is left out: {error}"})
    return found
