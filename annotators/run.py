"""`annotate`: every picture of a set to its condition maps, in processes, resumable at any moment."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import cv2

from ..core.config import AnnotateConfig
from ..core.data.records import Fault, FileBlob, Record, Source
from ..core.data.sources import Shard, open_shards, open_source
from ..core.errors import SctoolError, UsageError
from ..core.files import replacing, write_json
from . import parse_conditions
from .base import Annotator
from .maps import Size
from .pool import gpus, run_jobs
from .units import HIDDEN, Job, annotate_unit, finished, split_folder, suffix_of

CHUNK = 256
"""Pictures of a folder done as one unit; a kill costs at most this many a process."""
HEAVY_CHUNK = 64
"""The same for annotators that run a network."""
WORKERS_A_GPU = 2
"""Each loads the networks; while one decodes and writes, the other computes."""
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
    for annotator in annotators:
        annotator.ready()
    size = Size.parse(config.size)
    part = Part.parse(config.shards)
    source, shards = open_shards(config.src) or (_open(config.src, paths), [])
    out = _output(config, source)
    if not shards and not source.records and not source.faults:
        raise UsageError(f"'{config.src}' holds no picture.")

    with _alone(out, shared=part is not None):
        settings = _claim(out, config, annotators, source)
        base = Job("", out, config.layout == "merged", annotators, size, config.render, settings)
        units = _shard_jobs(base, shards, config.limit) if shards else _jobs(base, source, config.limit)
        jobs = units[part.number - 1 :: part.of] if part else units
        if config.limit is not None:
            _refuse_to_shrink(out, units)
        skipped, counts, before = _run(jobs, config, annotators, progress)
        whole = part is None or all(finished(job) for job in units)
        if whole:
            _drop_stale(out, units, before)
        listed = _finish(out, units if whole else jobs, source.faults, part if not whole else None)

    seconds = time.monotonic() - begun
    images = sum(count["images"] for count in counts)
    failed = sum(count["failed"] for count in counts) + len(source.faults)
    fresh = images - skipped
    summary = {
        "out": str(out),
        "conditions": [annotator.name for annotator in annotators],
        "images": images,
        "failed": failed,
        "skipped": skipped,
        "seconds": round(seconds, 3),
        "images_per_second": round(fresh / seconds, 1) if fresh else 0.0,
        "errors": str(listed) if listed else None,
        "whole": whole,
    }
    if not images and listed:
        with open(listed, encoding="utf-8") as lines:
            first = json.loads(next(lines))
        raise SctoolError(f"no picture could be annotated; first: {first['where']}: {first['reason']} (see {listed}).")
    if not images and jobs:
        raise UsageError(f"'{config.src}' holds no picture among the members of its shards.")
    if failed and config.strict:
        raise SctoolError(
            f"{failed} of {failed + images} pictures could not be read (--strict); they are listed in "
            f"{listed}. The others are annotated in {out}."
        )
    return summary


@dataclass(frozen=True)
class Part:
    """`--shards 3/16`: every 16th unit from the third on, for one of 16 array jobs that write one set."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str | None) -> Part | None:
        """Reads the flag; None for none. Raises `UsageError`."""
        if text is None:
            return None
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(
                f"--shards '{text}' is no part. Write K/N with K from 1 to N, e.g. 3/16 for the third of 16."
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def errors(self) -> str:
        """The name of the part's own list of errors."""
        return f"errors-{self.number}-of-{self.of}.jsonl"


def _run(
    jobs: list[Job], config: AnnotateConfig, annotators: tuple[Annotator, ...], progress: Progress | None
) -> tuple[int, list[dict[str, int]], set[str]]:
    """Does the units that are not finished.

    Gives the number of pictures found finished, all units' counts, and the files that units done again had before.
    """
    counts = [_counts(finished(job)) for job in jobs]
    todo = [i for i, count in enumerate(counts) if count is None]
    skipped = sum(count["images"] + count["failed"] for count in counts if count)
    kept = sum(count["images"] for count in counts if count)
    before = {name for i in todo for name in _marker(jobs[i]).get("files", ())}
    fresh = _expected([jobs[i] for i in todo])

    def tell(done: int) -> None:
        if progress:
            progress(skipped + done, max(skipped + fresh, skipped + done))

    resume = "Run the same command again to continue."
    chosen = [jobs[i] for i in todo]
    if config.ray is not None:
        from .cluster import run_ray

        heavy = any(annotator.needs_weights for annotator in annotators)
        made = run_ray(annotate_unit, chosen, config.ray, config.jobs, tell, resume, lambda job: job.unit, gpu=heavy)
    else:
        workers = _workers(config.jobs, fresh, annotators)
        made = run_jobs(annotate_unit, chosen, workers, tell, resume, lambda job: job.unit)
    for i, count in zip(todo, made, strict=True):
        counts[i] = count
    tell(sum(count["images"] + count["failed"] for count in made))  # a unit done twice was counted twice
    return kept, [count for count in counts if count is not None], before


def _counts(marker: dict[str, Any] | None) -> dict[str, int] | None:
    return marker and {"images": marker["images"], "failed": marker["failed"]}


def _expected(jobs: list[Job]) -> int:
    """How many pictures the units hold; for shards estimated from the first one's pictures and all files' sizes."""
    if not jobs or not jobs[0].shard:
        return sum(len(job.records) for job in jobs)
    first = len(jobs[0].listed()[0])
    if any(job.limit is not None for job in jobs):
        return sum(job.limit if job.limit is not None else first for job in jobs)
    sizes = [os.path.getsize(job.tar) for job in jobs if os.path.exists(job.tar)]
    return round(first * sum(sizes) / sizes[0]) if sizes and sizes[0] else first


def _workers(wanted: int | None, pictures: int, annotators: tuple[Annotator, ...]) -> int:
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0))
    if any(annotator.needs_weights for annotator in annotators):
        return min(cores, WORKERS_A_GPU * len(gpus())) or cores
    return cores if pictures > IN_PROCESS else 1


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


def _jobs(base: Job, source: Source, limit: int | None) -> list[Job]:
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


def _shard_jobs(base: Job, shards: list[Shard], limit: int | None) -> list[Job]:
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

    Raises `UsageError` when the folder was made with other settings; one in which nothing is finished yet is free.
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
    begun = any(child.name != HIDDEN for child in out.iterdir()) or any((out / HIDDEN).glob("part-*.json"))
    if previous is None or (previous != settings and not begun):
        write_json(path, settings)
    elif previous != settings:
        what, then, now = _difference(previous, settings)
        raise UsageError(
            f"--out '{out}' was made with {what} = {then}, now it is {now}. Choose another --out, or remove it: "
            f"rm -r {shlex.quote(str(out))}"
        )
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _difference(previous: dict[str, Any], settings: dict[str, Any]) -> tuple[str, str, str]:
    """The first setting that differs: its name, what it was, and what it is."""
    key = next(key for key in settings if previous.get(key) != settings[key])
    then, now = previous.get(key), settings[key]
    if key == "conditions" and isinstance(then, list):
        names = [", ".join(str(each.get("name")) for each in side) for side in (then, now)]
        if names[0] != names[1]:
            return key, *names
        old, new = next(pair for pair in zip(then, now, strict=True) if pair[0] != pair[1])
        inner = next(k for k in new if old.get(k) != new[k])
        return f"{new['name']} {inner}", json.dumps(old.get(inner)), json.dumps(new[inner])
    return key, json.dumps(then), json.dumps(now)


@contextmanager
def _alone(out: Path, shared: bool) -> Iterator[None]:
    """Holds the written set for this run, or `shared` with other parts of it.

    Alone, it removes what killed runs, and workers that died in this one, left half-written. Raises `UsageError` for
    a folder that holds something else, or that another run holds.
    """
    mine = out / HIDDEN / "settings.json"
    if out.exists() and not mine.is_file() and (not out.is_dir() or any(c.name != HIDDEN for c in out.iterdir())):
        raise UsageError(f"--out '{out}' holds other files. Choose an empty or new folder.")
    try:
        mine.parent.mkdir(parents=True, exist_ok=True)
        lock = open(out / HIDDEN / "lock", "w")  # noqa: SIM115 - held below
    except OSError as error:
        raise SctoolError(f"--out '{out}' cannot be written: {error.strerror}. Choose another folder.") from error
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"another sctool annotate is writing to '{out}'. Wait for it, or choose another --out."
            ) from error
        try:
            if not shared:
                _sweep(out)
            yield
        finally:
            if not shared:
                _sweep(out)


def _refuse_to_shrink(out: Path, units: list[Job]) -> None:
    """Raises `UsageError` where a limit would leave out what is finished already: that may be hours of work."""
    larger = any(
        _marker(job).get("images", 0) > (len(job.records) if job.limit is None else job.limit) for job in units
    )
    if larger or _strays(out, units):
        raise UsageError(f"--out '{out}' holds more pictures than --limit. Choose another --out for a trial.")


def _strays(out: Path, units: list[Job]) -> list[Path]:
    """Markers of units that the source does not have any more."""
    own = {job.marker for job in units}
    found = out.rglob("*_stats.json") if units and units[0].shard else (out / HIDDEN).glob("part-*.json")
    return [marker for marker in found if marker not in own]


def _drop_stale(out: Path, units: list[Job], before: set[str]) -> None:
    """Removes files of pictures that the source does not have any more, so that the set is what the lists say.

    before: files that the units which were done again had written before.
    """
    strays = _strays(out, units)
    old = before | {name for marker in strays for name in _read(marker).get("files", ())}
    if old:
        for name in old - {name for job in units for name in _marker(job)["files"]}:
            (out / name).unlink(missing_ok=True)
    for marker in strays:
        marker.unlink(missing_ok=True)


def _sweep(out: Path) -> None:
    for part in out.rglob(".*.part"):
        part.unlink(missing_ok=True)


def _finish(out: Path, jobs: list[Job], faults: list[Fault], part: Part | None) -> Path | None:
    """Lists over the whole set, in the source's order, a unit at a time; gives the list of errors, if there are any.

    `part` is given where other parts are still to come: then only the part's own errors are listed.
    """
    if part is None:
        for file in out.glob("errors-*-of-*.jsonl"):
            file.unlink(missing_ok=True)
        if jobs and not (jobs[0].shard and jobs[0].merged):
            columns = list(dict.fromkeys(key for row in _rows(jobs) for key in row))
            rows = ({key: row.get(key) for key in columns} for row in _rows(jobs))
            if jobs[0].merged:
                _write_metadata(out, rows)
            else:
                _write_lines(out / "params.jsonl", rows)
    path = out / (part.errors if part else "errors.jsonl")
    errors = itertools.chain(map(vars, faults), (error for job in jobs for error in _marker(job)["errors"]))
    first = next(errors, None)
    if first is None:
        path.unlink(missing_ok=True)
        return None
    _write_lines(path, itertools.chain([first], errors))
    return path


def _marker(job: Job) -> dict[str, Any]:
    """What the unit's marker says, true or not; {} where there is none."""
    return _read(job.marker)


def _read(marker: Path) -> dict[str, Any]:
    try:
        found = json.loads(marker.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(jobs: list[Job]) -> Iterator[dict[str, Any]]:
    return (row for job in jobs for row in _marker(job)["rows"])


def _write_metadata(out: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One table, or one in each split's folder; paths are relative to the folder that the table lies in."""
    with ExitStack() as stack:
        tables: dict[str, IO[str]] = {}
        for row in rows:
            base = split_folder(row["file_name"])
            if base not in tables:
                path = stack.enter_context(replacing(out / base / "metadata.jsonl"))
                tables[base] = stack.enter_context(open(path, "w", encoding="utf-8"))
            paths = {k: v.removeprefix(base) for k, v in row.items() if k.endswith("file_name") and v is not None}
            tables[base].write(_line(row | paths))


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(map(_line, rows))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
