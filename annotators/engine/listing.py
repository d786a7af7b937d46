"""The jobs of a source: folders, shards, single files and lists of paths."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ...core.data.records import Fault, FileBlob, Record, Source
from ...core.data.sources import Shard, open_source
from ...core.errors import UsageError
from .job import Job, image_suffix

CHUNK = 256
"""Images of a folder per job. A kill loses at most this many per process."""
NETWORK_CHUNK = 64
"""The same for annotators that run a network."""


def open_input(src: str, paths: Iterable[str] | None) -> Source:
    """A set that is not made of shards: a folder, one image, or for "-" the images named by `paths`."""
    if src == "-":
        return _source_of_paths("stdin", [Path(line.strip()) for line in paths or () if line.strip()])
    path = Path(src)
    if path.is_file() and path.suffix.lower() not in (".tar", ".json", ".jsonl"):
        return _source_of_paths(path.stem, [path])
    return open_source(src)


def _source_of_paths(name: str, paths: list[Path]) -> Source:
    """A source of single files. Their keys are their paths below the folder that contains all of them."""
    if not paths:
        raise UsageError("no path came on stdin. Pipe image paths in, one per line.")
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


def folder_jobs(template: Job, source: Source, limit: int | None, chunk: int | None = None) -> list[Job]:
    """One job per `chunk` images; `template` has the settings that all jobs share."""
    records = source.records[:limit]
    paths = _image_paths(source, records)
    step = chunk or (NETWORK_CHUNK if any(annotator.needs_weights for annotator in template.annotators) else CHUNK)
    return [
        replace(
            template,
            name=f"part-{number:05d}",
            records=tuple(records[start : start + step]),
            image_paths=tuple(paths[start : start + step]),
        )
        for number, start in enumerate(range(0, len(records), step))
    ]


def shard_jobs(template: Job, shards: list[Shard], limit: int | None) -> list[Job]:
    """One job per shard, whose members are not listed; with a limit only as many shards as it needs."""
    jobs = [
        replace(template, name=shard.name.rpartition(".")[0], tar=shard.tar, sidecars=shard.sidecars, split=shard.split)
        for shard in shards
    ]
    if limit is None:
        return jobs
    limited: list[Job] = []
    for job in jobs:
        if limit <= 0:
            break
        limited.append(replace(job, limit=limit))
        limit -= len(limited[-1].list_records()[0])
    return limited


def _image_paths(source: Source, records: list[Record]) -> list[str]:
    """The path of every image inside the written set: its path in the source's folder, or else its key.

    Images that differ only in their suffix keep it (`a.jpg.jpg`), so that their maps get different names.
    """
    paths: list[str] = []
    taken: set[str] = set()
    for record in records:
        path = record.image.path if isinstance(record.image, FileBlob) else None
        name = f"{record.key}{image_suffix(record)}"
        if path is not None and source.root is not None and Path(path).is_relative_to(source.root):
            name = Path(path).relative_to(source.root).as_posix()
        if os.path.splitext(name)[0] in taken:
            name += os.path.splitext(name)[1]
        taken.add(os.path.splitext(name)[0])
        paths.append(name)
    return paths
