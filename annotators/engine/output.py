"""The written set as a whole: who may write to it, what belongs to it, and the lists over all its jobs."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import cv2

from ...core.config import AnnotateConfig, PrepareConfig
from ...core.data.records import Fault, Source
from ...core.errors import SctoolError, UsageError
from ...core.files import replacing, write_json
from ..base import Annotator
from .job import STATE_FOLDER, Job, read_marker
from .writers import split_folder

SETTINGS_FILE = f"{STATE_FOLDER}/settings.json"


def output_folder(config: AnnotateConfig | PrepareConfig, source: Source, parent: str = "annotated") -> Path:
    """The folder to write to. Raises `UsageError` if writing to it would change the source."""
    out = Path(config.out) if config.out else Path(parent) / (source.name or Path(config.src).resolve().name)
    if config.src not in ("-", "photos") and source.root is not None:
        root, target = source.root.resolve(), out.resolve()
        if target == root or (target.is_relative_to(root) and not Path(config.src).is_file()):
            raise UsageError(f"--out '{out}' is inside the source '{config.src}'. Choose a folder outside of it.")
    return out


def record_settings(out: Path, config: AnnotateConfig, annotators: tuple[Annotator, ...], source: Source) -> str:
    """Saves the settings in the written set and returns their hash, so that two runs' maps are never mixed.

    Raises `UsageError` if the folder was made with other settings and a job has already been finished.
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
    return settle(out, settings)


def settle(out: Path, settings: dict[str, Any]) -> str:
    """Saves the settings of a run in its output, and returns their hash. Raises as `record_settings` does."""
    previous = read_settings(out)
    begun = any(child.name != STATE_FOLDER for child in out.iterdir()) or any((out / STATE_FOLDER).glob("part-*.json"))
    if previous is None or (previous != settings and not begun):
        write_json(out / SETTINGS_FILE, settings)
    elif previous != settings:
        name, before, now = _first_difference(previous, settings)
        raise UsageError(
            f"--out '{out}' was made with {name} = {before}, now it is {now}. Choose another --out, or delete it: "
            f"rm -r {shlex.quote(str(out))}"
        )
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings that a written set was made with; None if the folder is not a written set."""
    try:
        return json.loads((folder / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        return None


def _first_difference(previous: dict[str, Any], settings: dict[str, Any]) -> tuple[str, str, str]:
    """The first setting that differs: its name, its earlier value, and its value now."""
    key = next(key for key in settings if previous.get(key) != settings[key])
    before, now = previous.get(key), settings[key]
    if key == "conditions" and isinstance(before, list):
        names, names_now = (", ".join(str(identity.get("name")) for identity in side) for side in (before, now))
        if names != names_now:
            return key, names, names_now
        old, new = next(pair for pair in zip(before, now, strict=True) if pair[0] != pair[1])
        field = next(field for field in new if old.get(field) != new[field])
        return f"{new['name']} {field}", json.dumps(old.get(field)), json.dumps(new[field])
    return key, json.dumps(before), json.dumps(now)


@contextmanager
def locked_output(out: Path, shared: bool) -> Iterator[None]:
    """Locks the written set for this run, or if `shared` together with other parts of it.

    Unless `shared`, removes the temporary files of killed runs and of workers that died in this one. Raises
    `UsageError` if the folder contains something else, or if another run has locked it.
    """
    settings = out / SETTINGS_FILE
    used = out.exists() and (not out.is_dir() or any(child.name != STATE_FOLDER for child in out.iterdir()))
    if used and not settings.is_file():
        raise UsageError(f"--out '{out}' contains other files. Choose an empty or new folder.")
    try:
        settings.parent.mkdir(parents=True, exist_ok=True)
        lock = open(out / STATE_FOLDER / "lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise SctoolError(f"--out '{out}' cannot be written: {error.strerror}. Choose another folder.") from error
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another sctool is writing to '{out}'. Wait for it, or choose another --out.") from error
        try:
            if not shared:
                _remove_temporary_files(out)
            yield
        finally:
            if not shared:
                _remove_temporary_files(out)


def _remove_temporary_files(out: Path) -> None:
    for path in out.rglob(".*.part"):
        path.unlink(missing_ok=True)


def refuse_to_shrink(out: Path, jobs: Sequence[Job]) -> None:
    """Raises `UsageError` if a limit would remove finished images, which may be hours of work."""
    larger = any(
        job.read_marker().get("images", 0) > (len(job.records) if job.limit is None else job.limit) for job in jobs
    )
    if larger or _obsolete_markers(out, jobs):
        raise UsageError(f"--out '{out}' contains more images than --limit. Choose another --out for a trial.")


def _obsolete_markers(out: Path, jobs: Sequence[Job]) -> list[Path]:
    """Markers of jobs that the source no longer has."""
    current = {job.marker for job in jobs}
    pattern = jobs[0].marker_pattern if jobs else f"{STATE_FOLDER}/part-*.json"
    return [path for path in out.glob(pattern) if path not in current]


def remove_obsolete_files(out: Path, jobs: Sequence[Job], replaced: set[str]) -> None:
    """Removes the files of images that the source no longer has.

    replaced: files that jobs which were done again had written before.
    """
    markers = _obsolete_markers(out, jobs)
    old = replaced | {name for marker in markers for name in read_marker(marker).get("files", ())}
    if old:
        for name in old - {name for job in jobs for name in job.read_marker()["files"]}:
            (out / name).unlink(missing_ok=True)
    for marker in markers:
        marker.unlink(missing_ok=True)


def write_lists(out: Path, jobs: list[Job], faults: list[Fault], part_errors: str | None) -> Path | None:
    """Writes the lists over the whole set, in the source's order, job by job. Returns the list of errors, if any.

    part_errors: name of the list of errors of one part, while other parts are still to come; then only it is written.
    """
    if part_errors is None and jobs and not (jobs[0].is_shard and jobs[0].merged):
        columns = list(dict.fromkeys(key for row in _rows(jobs) for key in row))
        # "" and not null for images without a class: `datasets` wants one type per column in every split's table.
        missing = {key: "" if key == "label" else None for key in columns}
        rows = (missing | row for row in _rows(jobs))
        if jobs[0].merged:
            _write_metadata(out, rows)
        else:
            _write_lines(out / "params.jsonl", rows)
    return write_errors(out, jobs, faults, part_errors)


def write_errors(out: Path, jobs: Sequence[Job], faults: list[Fault], part_errors: str | None) -> Path | None:
    """Writes the list of errors, of the whole set or of one part, and returns it; removes it where there are none."""
    if part_errors is None:
        for file in out.glob("errors-*-of-*.jsonl"):
            file.unlink(missing_ok=True)
    path = out / (part_errors or "errors.jsonl")
    errors = itertools.chain(map(vars, faults), (error for job in jobs for error in job.read_marker()["errors"]))
    first = next(errors, None)
    if first is None:
        path.unlink(missing_ok=True)
        return None
    _write_lines(path, itertools.chain([first], errors))
    return path


def _rows(jobs: list[Job]) -> Iterator[dict[str, Any]]:
    return (row for job in jobs for row in job.read_marker()["rows"])


def _write_metadata(out: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One metadata.jsonl, or one in each split's folder; its paths are relative to its folder."""
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
