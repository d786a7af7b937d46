"""Webdataset shards as img2dataset writes them: the members of a sample share the name before its first dot."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

from .paths import shown, unsafe
from .records import PICTURES, Blob, Fault, Record, TarBlob, split_name

TEXT_LIMIT = 1 << 20
"""A caption or JSON member of more bytes than this is a fault."""


def list_shard(tar: str | Path) -> list[Record]:
    """The records of one uncompressed tar, in its order; pixels are read later, at their offsets."""
    return read_shard(tar)[0]


def read_shard(tar: str | Path) -> tuple[list[Record], list[Fault]]:
    """The records of one tar and the faults of its members; of a damaged tar, those before the damage."""
    samples, faults = _members(str(tar))
    records = []
    for key, members in samples.items():
        record = _record(key, members, faults)
        if record is not None:
            records.append(record)
    return records, faults


def list_maps(tar: str | Path, cond: str) -> tuple[dict[str, Blob], list[Fault]]:
    """Maps by key from a sidecar tar with members `KEY.png` or `KEY.<cond>.png`."""
    samples, faults = _members(str(tar), f"{cond}/{Path(tar).name}")
    maps: dict[str, Blob] = {}
    for key, members in samples.items():
        for extension, value in members.items():
            name, _, kind = extension.rpartition(".")
            if isinstance(value, TarBlob) and f".{kind.lower()}" in PICTURES and name in ("", cond):
                maps[key] = value
    return maps, faults


def _members(tar: str, label: str | None = None) -> tuple[dict[str, dict[str, Any]], list[Fault]]:
    """{key: {extension: TarBlob of an image | text of .txt and .json}}, and faults that name the tar `label`."""
    samples: dict[str, dict[str, Any]] = {}
    faults: list[Fault] = []
    shard = label or Path(tar).name
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                reason = _refused(member)
                if reason:
                    faults.append(Fault(f"{shard}:{shown(member.name)}", reason))
                if reason or member.isdir():
                    continue
                path = PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                extension = extension.lower()
                sample = samples.setdefault(str(path.with_name(stem)) if stem else "", {})
                if extension in sample:
                    faults.append(Fault(f"{shard}:{member.name}", "occurs twice in the shard; the first one is used"))
                elif f".{extension.rpartition('.')[2]}" in PICTURES:
                    sample[extension] = TarBlob(tar, member.name, member.offset_data, member.size)
                elif extension in ("txt", "json"):
                    if member.size > TEXT_LIMIT:
                        faults.append(Fault(f"{shard}:{member.name}", f"is {member.size:,} bytes, too long for text"))
                        continue
                    file = archive.extractfile(member)
                    sample[extension] = file.read().decode("utf-8", "replace") if file else ""
            if os.path.getsize(tar) < archive.offset + tarfile.BLOCKSIZE:
                faults.append(
                    Fault(shard, "has no end-of-archive mark: it was cut off; the members before the cut are used")
                )
    except (tarfile.TarError, OSError, EOFError) as error:
        faults.append(Fault(shard, f"is not a complete uncompressed tar ({error}); members before the damage are used"))
    samples.pop("", None)  # hidden files, such as macOS adds
    return samples, faults


def _refused(member: tarfile.TarInfo) -> str | None:
    if member.isdir():
        return None
    reason = unsafe(member.name)
    if reason:
        return reason
    if member.issym() or member.islnk():
        return "is a link; a shard must contain the files themselves"
    if not member.isfile() or member.issparse():
        return "is not a regular file"
    return None


def _record(key: str, members: dict[str, Any], faults: list[Fault]) -> Record | None:
    blobs = {name: value for name, value in members.items() if isinstance(value, TarBlob)}
    image = next((value for name, value in blobs.items() if "." not in name), None)
    maps: dict[str, Blob] = {name.rpartition(".")[0]: value for name, value in blobs.items() if "." in name}
    if image is None:
        if blobs:
            where = next(iter(blobs.values())).name
            faults.append(Fault(where, f"is a map without an image: the shard contains no {key}.jpg or .png"))
        return None
    meta: dict[str, Any] = {}
    if "json" in members:
        try:
            value = json.loads(members["json"])
            meta = value if isinstance(value, dict) else {}
        except ValueError as error:
            faults.append(Fault(image.name, f"its .json member cannot be read: {error}"))
    text = members.get("txt")
    if text is None or not text.strip():
        text = caption(meta)
    return Record(key, image, text and text.strip(), maps, split_name(meta.get("split")), label(meta), meta)


def caption(row: dict[str, Any]) -> str | None:
    """The caption of a row: the first of the columns text, caption and prompt that is not empty."""
    for name in ("text", "caption", "prompt"):
        if isinstance(row.get(name), str) and row[name].strip():
            return row[name].strip()
    return None


def label(row: dict[str, Any]) -> str | None:
    """The class label of a row: the first of the columns class and label that is not empty."""
    for name in ("class", "label"):
        if row.get(name) not in (None, ""):
            return str(row[name])
    return None
