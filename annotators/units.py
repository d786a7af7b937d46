"""One unit of work, a shard or a run of pictures: a pure function of its job, safe to repeat and to kill.

A unit writes its pictures and maps, then one marker that says what it made and from what. A marker counts only while
settings, source and the files' sizes still agree; otherwise the unit is done again, giving the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..core.data.images import BadImage
from ..core.data.records import (
    ANY,
    PICTURES,
    Blob,
    Fault,
    FileBlob,
    Record,
    file_stamp,
    split_name,
    without_duplicates,
)
from ..core.data.shards import list_maps, read_shard
from ..core.errors import SctoolError
from ..core.files import replacing, write_bytes, write_text
from .base import Annotator
from .maps import Made, Opened, Size, make, read
from .pool import Beat

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


class Writer(Protocol):
    """Takes finished pictures in order; `files` are the sizes of what it wrote, by path; `count` is the caller's."""

    files: dict[str, int]
    count: int

    def __enter__(self) -> Writer: ...
    def __exit__(self, *failure: Any) -> None: ...
    def add(self, record: Record, name: str, data: bytes, made: Made, carried: dict[str, bytes]) -> dict[str, Any]:
        """Writes one picture's files; gives its row of metadata."""
        ...


def _row(record: Record, name: str, made: Made) -> dict[str, Any]:
    """Columns that both layouts keep: the picture's own, then how its maps were made, as one JSON text."""
    kept = {k: v for k, v in record.meta.items() if not k.endswith("_file_name") and k not in record.maps}
    row: dict[str, Any] = {"file_name": name, "text": record.text} | kept | {"file_name": name, "text": record.text}
    if record.split is not None:
        row.setdefault("split", record.split)
    row["conditions"] = json.dumps(_conditions(record, made), sort_keys=True)
    return row


def _conditions(record: Record, made: Made) -> dict[str, Any]:
    """How all maps of the row were made: those made now, and those of an earlier run that are carried over."""
    earlier = record.meta.get("conditions", {})
    if isinstance(earlier, str):
        try:
            earlier = json.loads(earlier)
        except ValueError:
            earlier = {}
    kept = {cond: how for cond, how in earlier.items() if cond in record.maps} if isinstance(earlier, dict) else {}
    return {**kept, **made.conditions}


class FolderWriter:
    """Pictures under their own names (hard links where possible), maps under `conditions/NAME/`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.files: dict[str, int] = {}
        self.count = 0

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(self, *failure: Any) -> None: ...

    def _write(self, name: str, data: bytes) -> None:
        write_bytes(self.job.out / name, data, flush=False)  # the marker holds its size
        self.files[name] = len(data)

    def add(self, record: Record, name: str, data: bytes, made: Made, carried: dict[str, bytes]) -> dict[str, Any]:
        """As in the protocol."""
        base = split_folder(name) if self.job.merged else ""
        maps = {cond: _map_name(base, cond, name) for cond in made.maps}
        for cond, png in made.maps.items():
            self._write(maps[cond], png)
        if not self.job.merged:
            return {"key": record.key, **_row(record, name, made)}
        if made.image is not None:
            name = name if name.endswith(".png") else f"{name.rpartition('.')[0]}.png"
            self._write(name, made.image)
        elif not link(record.image, self.job.out / name):
            self._write(name, data)
        else:
            self.files[name] = len(data)
        for cond, png in carried.items():
            maps[cond] = _map_name(base, cond, name)
            self._write(maps[cond], png)
        row = _row(record, name, made)
        first = self.job.annotators[0].name
        return row | {"conditioning_image_file_name": maps[first]} | {f"{c}_file_name": m for c, m in maps.items()}


def _map_name(base: str, cond: str, name: str) -> str:
    return f"{base}conditions/{cond}/{name.removeprefix(base).rpartition('.')[0]}.png"


def split_folder(name: str) -> str:
    """`train/` where a path begins with a split's folder, which holds its own metadata as `datasets` wants it."""
    first, slash, _ = name.partition("/")
    return f"{first}/" if slash and split_name(first) else ""


class ShardWriter:
    """A shard under its own name: KEY.jpg, .txt, .json and KEY.NAME.png, every field for every sample.

    In the maps layout one shard a condition, `conditions/NAME/00000.tar`. Times and owners are fixed, so the same
    pictures give the same bytes.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.files: dict[str, int] = {}
        self.count = 0
        conds = [annotator.name for annotator in job.annotators]
        self.names = (
            dict.fromkeys(["", *conds], f"{job.unit}.tar")
            if job.merged
            else {cond: f"conditions/{cond}/{job.unit.replace('/', '-')}.tar" for cond in conds}
        )

    def __enter__(self) -> ShardWriter:
        self.stack = contextlib.ExitStack()
        self.tars: dict[str, tarfile.TarFile] = {}
        with contextlib.ExitStack() as opening:
            for name in dict.fromkeys(self.names.values()):
                path = opening.enter_context(replacing(self.job.out / name))
                self.tars[name] = opening.enter_context(tarfile.open(path, "w", format=tarfile.PAX_FORMAT))
            self.stack = opening.pop_all()
        return self

    def __exit__(self, *failure: Any) -> None:
        self.stack.__exit__(*failure)
        if failure[0] is None:
            self.files = {name: os.path.getsize(self.job.out / name) for name in self.tars}

    def _put(self, cond: str, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self.tars[self.names[cond]].addfile(info, io.BytesIO(data))

    def add(self, record: Record, name: str, data: bytes, made: Made, carried: dict[str, bytes]) -> dict[str, Any]:
        """As in the protocol."""
        if self.job.merged:
            # Columns must not change from sample to sample: only a PNG, or a set that is all resized, is written anew.
            resized = self.job.size.kind != "none"
            suffix = ".png" if resized else os.path.splitext(name)[1].lower().replace(".jpeg", ".jpg")
            image = made.image if suffix == ".png" and made.image is not None else data
            self._put("", f"{record.key}{suffix}", image)
            self._put("", f"{record.key}.txt", (record.text or "").encode())
            meta = {**record.meta, "width": made.width, "height": made.height, "conditions": _conditions(record, made)}
            self._put("", f"{record.key}.json", json.dumps(meta, sort_keys=True, ensure_ascii=False).encode())
            for cond, png in carried.items():
                self._put("", f"{record.key}.{cond}.png", png)
        for cond, png in made.maps.items():
            self._put(cond, f"{record.key}.{cond}.png", png)
        return {"key": record.key, "conditions": json.dumps(_conditions(record, made), sort_keys=True)}


def link(source: Blob, target: Path) -> bool:
    """Makes `target` a hard link to the file that `source` is; False where that is not possible."""
    if not isinstance(source, FileBlob):
        return False
    try:
        with replacing(target, flush=False) as temporary:
            os.link(os.path.realpath(source.path), temporary)
    except SctoolError:
        return False
    return True
