"""What is to be annotated: folders, shards, single files and lists of paths, as jobs of a unit each."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ...core.data.records import Fault, FileBlob, Record, Source
from ...core.data.sources import Shard, open_source
from ...core.errors import UsageError
from .jobs import Job, suffix_of

CHUNK = 256
"""Pictures of a folder done as one unit; a kill costs at most this many a process."""
HEAVY_CHUNK = 64
"""The same for annotators that run a network."""


def open_input(src: str, paths: Iterable[str] | None) -> Source:
    """A set that is no shards: a folder, one picture, or for "-" the pictures named by `paths`."""
    if src == "-":
        return _listed("stdin", [Path(line.strip()) for line in paths or () if line.strip()])
    path = Path(src)
    if path.is_file() and path.suffix.lower() not in (".tar", ".json", ".jsonl"):
        return _listed(path.stem, [path])
    return open_source(src)


def _listed(name: str, paths: list[Path]) -> Source:
    """A source of single files, named by their paths below the folder that holds all of them."""
    if not paths:
        raise UsageError("no path came on stdin; pipe picture paths in, one a line.")
    absolute = [Path(os.path.abspath(path)) for path in paths]
    root = Path(os.path.commonpath([path.parent for path in absolute]))
    records: list[Record] = []
    faults: list[Fault] = []
    seen: set[Path] = set()
    for given, path in zip(paths, absolute, strict=True):
        if path in seen:
            faults.append(Fault(str(given), "named twice"))
        elif not path.is_file():
            faults.append(Fault(str(given), "no such file"))
        else:
            key = path.relative_to(root).with_suffix("").as_posix()
            records.append(Record(key, FileBlob(str(path), str(given))))
        seen.add(path)
    return Source(name=name, kind="textfolder", records=records, faults=faults, root=root)


def folder_jobs(base: Job, source: Source, limit: int | None) -> list[Job]:
    """One job for each run of pictures."""
    records = source.records[:limit]
    names = _names(source, records)
    heavy = any(annotator.needs_weights for annotator in base.annotators)
    step = HEAVY_CHUNK if heavy else CHUNK
    groups = [records[start : start + step] for start in range(0, len(records), step)]
    return [
        replace(base, unit=f"part-{i:05d}", records=tuple(g), names=tuple(names[id(record)] for record in g))
        for i, g in enumerate(groups)
    ]


def shard_jobs(base: Job, shards: list[Shard], limit: int | None) -> list[Job]:
    """One job a shard, unlisted; with a limit only as many shards as it reaches."""
    jobs = [
        replace(base, unit=shard.name.rpartition(".")[0], tar=shard.tar, sidecars=shard.sidecars, split=shard.split)
        for shard in shards
    ]
    if limit is None:
        return jobs
    taken: list[Job] = []
    for job in jobs:
        if limit <= 0:
            break
        taken.append(replace(job, limit=limit))
        limit -= len(taken[-1].listed()[0])
    return taken


def _names(source: Source, records: list[Record]) -> dict[int, str]:
    """A path inside the written set for every picture: the one it has in its own folder, else its key.

    Pictures that differ in their suffix alone keep it (`a.jpg.jpg`), so that their maps do not meet.
    """
    names: dict[int, str] = {}
    taken: set[str] = set()
    for record in records:
        path = record.image.path if isinstance(record.image, FileBlob) else None
        name = f"{record.key}{suffix_of(record)}"
        if path is not None and source.root is not None and Path(path).is_relative_to(source.root):
            name = Path(path).relative_to(source.root).as_posix()
        if os.path.splitext(name)[0] in taken:
            name += os.path.splitext(name)[1]
        taken.add(os.path.splitext(name)[0])
        names[id(record)] = name
    return names
