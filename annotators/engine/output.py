"""The written set as a whole: who may write to it, what belongs to it, and the lists over all its units."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import shlex
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import cv2

from ...core.config import AnnotateConfig
from ...core.data.records import Fault, Source
from ...core.errors import SctoolError, UsageError
from ...core.files import replacing, write_json
from ..base import Annotator
from .jobs import HIDDEN, Job
from .writers import split_folder


def output_folder(config: AnnotateConfig, source: Source) -> Path:
    """The folder to write to. Raises `UsageError` where writing would change the source."""
    out = Path(config.out) if config.out else Path("annotated") / (source.name or Path(config.src).resolve().name)
    if config.src not in ("-", "photos") and source.root is not None:
        root, target = source.root.resolve(), out.resolve()
        if target == root or (target.is_relative_to(root) and not Path(config.src).is_file()):
            raise UsageError(f"--out '{out}' lies inside the source '{config.src}'. Choose a folder outside of it.")
    return out


def claim(out: Path, config: AnnotateConfig, annotators: tuple[Annotator, ...], source: Source) -> str:
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
def alone(out: Path, shared: bool) -> Iterator[None]:
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


def refuse_to_shrink(out: Path, units: list[Job]) -> None:
    """Raises `UsageError` where a limit would leave out what is finished already: that may be hours of work."""
    larger = any(
        read_marker(job).get("images", 0) > (len(job.records) if job.limit is None else job.limit) for job in units
    )
    if larger or _strays(out, units):
        raise UsageError(f"--out '{out}' holds more pictures than --limit. Choose another --out for a trial.")


def _strays(out: Path, units: list[Job]) -> list[Path]:
    """Markers of units that the source does not have any more."""
    own = {job.marker for job in units}
    found = out.rglob("*_stats.json") if units and units[0].shard else (out / HIDDEN).glob("part-*.json")
    return [marker for marker in found if marker not in own]


def drop_stale(out: Path, units: list[Job], before: set[str]) -> None:
    """Removes files of pictures that the source does not have any more, so that the set is what the lists say.

    before: files that the units which were done again had written before.
    """
    strays = _strays(out, units)
    old = before | {name for marker in strays for name in _read(marker).get("files", ())}
    if old:
        for name in old - {name for job in units for name in read_marker(job)["files"]}:
            (out / name).unlink(missing_ok=True)
    for marker in strays:
        marker.unlink(missing_ok=True)


def _sweep(out: Path) -> None:
    for part in out.rglob(".*.part"):
        part.unlink(missing_ok=True)


def write_lists(out: Path, jobs: list[Job], faults: list[Fault], own: str | None) -> Path | None:
    """Lists over the whole set, in the source's order, a unit at a time; gives the list of errors, if there are any.

    own: the name of a part's own list of errors, where other parts are still to come; then only that is written.
    """
    if own is None:
        for file in out.glob("errors-*-of-*.jsonl"):
            file.unlink(missing_ok=True)
        if jobs and not (jobs[0].shard and jobs[0].merged):
            columns = list(dict.fromkeys(key for row in _rows(jobs) for key in row))
            rows = ({key: row.get(key) for key in columns} for row in _rows(jobs))
            if jobs[0].merged:
                _write_metadata(out, rows)
            else:
                _write_lines(out / "params.jsonl", rows)
    path = out / (own or "errors.jsonl")
    errors = itertools.chain(map(vars, faults), (error for job in jobs for error in read_marker(job)["errors"]))
    first = next(errors, None)
    if first is None:
        path.unlink(missing_ok=True)
        return None
    _write_lines(path, itertools.chain([first], errors))
    return path


def read_marker(job: Job) -> dict[str, Any]:
    """What the unit's marker says, true or not; {} where there is none."""
    return _read(job.marker)


def _read(marker: Path) -> dict[str, Any]:
    try:
        found = json.loads(marker.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(jobs: list[Job]) -> Iterator[dict[str, Any]]:
    return (row for job in jobs for row in read_marker(job)["rows"])


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
