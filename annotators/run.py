"""`annotate`: every picture of a set to its condition maps, in processes, resumable at any moment."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2

from ..core.config import AnnotateConfig
from ..core.data.records import PICTURES, Fault, FileBlob, Record, Source, TarBlob
from ..core.data.sources import open_source
from ..core.errors import SctoolError, UsageError
from ..core.files import write_json, write_text
from . import parse_conditions
from .base import Annotator
from .maps import Size
from .pool import run_jobs
from .units import HIDDEN, Job, annotate_unit, finished, split_folder

CHUNK = 256
"""Pictures of a folder done as one unit; a kill costs at most this many a process."""
IN_PROCESS = 128
"""Below this many pictures starting processes takes longer than the work."""

Progress = Callable[[int, int], None]
"""progress(done, total) in pictures, called some times a second."""


def annotate(
    config: AnnotateConfig, *, paths: Iterable[str] | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Annotates a set and gives a summary: counts, seconds, where it lies.

    paths: picture files, for `src = "-"`. The same call again continues where a killed one ended and gives the same
    bytes as an undisturbed one. Raises `UsageError` (wrong names, an output made with other settings), `Interrupted`
    (signals, after which the same call resumes), `SctoolError` (nothing could be written or read; faults with
    `strict`).
    """
    begun = time.monotonic()
    annotators = parse_conditions(config.cond, config.seed)
    size = Size.parse(config.size)
    source = _open(config.src, paths)
    out = _output(config, source)
    settings = _claim(out, config, annotators, source)
    records = source.records[: config.limit]
    if not records and not source.faults:
        raise UsageError(f"'{config.src}' holds no picture.")
    jobs = _jobs(source, records, out, config, annotators, size, settings)

    with _alone(out):
        skipped, whole = _run(jobs, config.jobs, progress)
        errors = [vars(fault) for fault in source.faults] + [error for marker in whole for error in marker["errors"]]
        _finish(out, jobs, whole, errors)

    seconds = time.monotonic() - begun
    images = sum(marker["images"] for marker in whole)
    fresh = len(records) - skipped
    summary = {
        "out": str(out),
        "conditions": [annotator.name for annotator in annotators],
        "images": images,
        "failed": len(errors),
        "skipped": skipped,
        "seconds": round(seconds, 3),
        "images_per_second": round(fresh / seconds, 1) if fresh else 0.0,
        "errors": str(out / "errors.jsonl") if errors else None,
    }
    if not images:
        first = errors[0]
        raise SctoolError(
            f"no picture could be annotated; first: {first['where']}: {first['reason']} (see {out}/errors.jsonl)."
        )
    if errors and config.strict:
        raise SctoolError(
            f"{len(errors)} of {len(errors) + images} pictures could not be read (--strict); they are listed in "
            f"{out}/errors.jsonl. The others are annotated in {out}."
        )
    return summary


def _run(jobs: list[Job], workers: int | None, progress: Progress | None) -> tuple[int, list[dict[str, Any]]]:
    """Does the units that are not finished; gives the number of pictures found finished, and all markers in order."""
    markers = [finished(job) for job in jobs]
    todo = [i for i, marker in enumerate(markers) if marker is None]
    total = sum(len(job.records) for job in jobs)
    fresh = sum(len(jobs[i].records) for i in todo)
    made = run_jobs(
        annotate_unit,
        [jobs[i] for i in todo],
        _workers(workers, fresh),
        lambda done: progress(total - fresh + done, total) if progress else None,
        "Run the same command again to continue.",
    )
    for i, marker in zip(todo, made, strict=True):
        markers[i] = marker
    return total - fresh, [marker for marker in markers if marker is not None]


def _workers(wanted: int | None, pictures: int) -> int:
    if wanted is not None:
        return wanted
    return len(os.sched_getaffinity(0)) if pictures > IN_PROCESS else 1


# ------------------------------------------------------------------------------------------------------- input


def _open(src: str, paths: Iterable[str] | None) -> Source:
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


def _jobs(
    source: Source,
    records: list[Record],
    out: Path,
    config: AnnotateConfig,
    annotators: tuple[Annotator, ...],
    size: Size,
    settings: str,
) -> list[Job]:
    """One job a shard, or one for each run of `CHUNK` pictures."""
    shard = source.kind == "shards"
    units: dict[str, list[Record]] = {}
    for i, record in enumerate(records):
        unit = f"part-{i // CHUNK:05d}"
        if shard and isinstance(record.image, TarBlob):
            unit = Path(os.path.relpath(record.image.tar, source.root)).with_suffix("").as_posix()
        units.setdefault(unit, []).append(record)
    names = _names(source, records)
    base = Job("", (), (), out, shard, config.layout == "merged", annotators, size, config.render, settings)
    return [
        replace(base, unit=unit, records=tuple(group), names=tuple(names[id(record)] for record in group))
        for unit, group in units.items()
    ]


def _names(source: Source, records: list[Record]) -> dict[int, str]:
    """A path inside the written set for every picture: the one it has in its own folder, else its key.

    Pictures that differ in their suffix alone keep it (`a.jpg.jpg`), so that their maps do not meet.
    """
    names: dict[int, str] = {}
    taken: set[str] = set()
    for record in records:
        path = record.image.path if isinstance(record.image, FileBlob) else None
        suffix = os.path.splitext(record.image.name)[1].lower()
        suffix = suffix if suffix in PICTURES else ".png"
        name = f"{record.key}{suffix}"
        if path is not None and source.root is not None and Path(path).is_relative_to(source.root):
            name = Path(path).relative_to(source.root).as_posix()
        if os.path.splitext(name)[0] in taken:
            name += os.path.splitext(name)[1]
        taken.add(os.path.splitext(name)[0])
        names[id(record)] = name
    return names


# ------------------------------------------------------------------------------------------------------ output


def _output(config: AnnotateConfig, source: Source) -> Path:
    """The folder to write to. Raises `UsageError` where writing would change the source."""
    out = Path(config.out) if config.out else Path("annotated") / (source.name or Path(config.src).resolve().name)
    if config.src not in ("-", "photos") and source.root is not None:
        root, target = source.root.resolve(), out.resolve()
        if target == root or (target.is_relative_to(root) and not Path(config.src).is_file()):
            raise UsageError(f"--out '{out}' lies inside the source '{config.src}'. Choose a folder outside of it.")
    return out


def _claim(out: Path, config: AnnotateConfig, annotators: tuple[Annotator, ...], source: Source) -> str:
    """Settings of a written set, saved in it; gives their hash. Two runs' maps are never mixed.

    Raises `UsageError` when the folder holds something else or was made with other settings.
    """
    settings = {
        "source": config.src if config.src in ("-", "photos") else str(Path(config.src).resolve()),
        "kind": source.kind,
        "conditions": [annotator.id for annotator in annotators],
        "opencv": cv2.__version__,
        "size": config.size,
        "layout": config.layout,
        "render": config.render,
        "seed": config.seed,
    }
    path = out / HIDDEN / "settings.json"
    try:
        previous = json.loads(path.read_text())
    except (OSError, ValueError):
        previous = None
    if previous is None:
        if out.exists() and (not out.is_dir() or any(child.name != HIDDEN for child in out.iterdir())):
            raise UsageError(f"--out '{out}' holds other files. Choose an empty or new folder.")
        write_json(path, settings)
    elif previous != settings:
        key = next(key for key in settings if previous.get(key) != settings[key])
        raise UsageError(
            f"--out '{out}' was made with {key} = {json.dumps(previous.get(key))}, now it is "
            f"{json.dumps(settings[key])}. Choose another --out, or remove it: rm -r {shlex.quote(str(out))}"
        )
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds the written set for this run, and removes what killed runs left half-written in it."""
    with open(out / HIDDEN / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"another sctool annotate is writing to '{out}'. Wait for it, or choose another --out."
            ) from error
        for part in out.rglob(".*.part"):
            part.unlink(missing_ok=True)
        yield


def _finish(out: Path, jobs: list[Job], markers: list[dict[str, Any]], errors: list[dict[str, Any]]) -> None:
    """Lists over the whole set, in the source's order."""
    rows = [row for marker in markers for row in marker.get("rows", ())]
    if jobs and not (jobs[0].shard and jobs[0].merged):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        rows = [{key: row.get(key) for key in columns} for row in rows]
        if jobs[0].merged:
            _write_metadata(out, rows)
        else:
            _write_lines(out / "params.jsonl", rows)
    if errors:
        _write_lines(out / "errors.jsonl", errors)
    else:
        (out / "errors.jsonl").unlink(missing_ok=True)


def _write_metadata(out: Path, rows: list[dict[str, Any]]) -> None:
    """One table, or one in each split's folder; paths are relative to the folder that the table lies in."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        base = split_folder(row["file_name"])
        paths = {k: v.removeprefix(base) for k, v in row.items() if k.endswith("file_name") and v is not None}
        tables.setdefault(base, []).append(row | paths)
    for base, table in tables.items():
        _write_lines(out / base / "metadata.jsonl", table)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
