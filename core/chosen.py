"""Which tuner files are sampled with, and for which task each acts: what --tuner and --task mean. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .checkpoint import NAME, read_meta, task_files, tuner_file
from .errors import UsageError, unknown


@dataclass(frozen=True)
class Chosen:
    """A tuner file, its scale, and the task that it acts for; None for all samples. `name` is what the user gave."""

    name: str
    file: Path
    scale: float = 1.0
    task: str | None = None

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The description in the file."""
        return read_meta(self.file)


def choose(tuners: Sequence[tuple[str, float]], tasks: Sequence[str] = ()) -> list[Chosen]:
    """The files of tuners given as (run, folder or file; scale): those of `tasks`, or without tasks one each.

    Raises `UsageError` for a task that no tuner has, for a tuner that has none of them, and without `tasks` for a run
    that has several tuners.
    """
    if not tasks:
        return [Chosen(name, tuner_file(name), scale) for name, scale in tuners]
    offered = [(name, scale, files_by_task(name)) for name, scale in tuners]
    known = {task for _, _, files in offered for task in files}
    for task in tasks:
        if task not in known:
            raise unknown("task", task, known)
    for name, _, files in offered:
        if not files.keys() & set(tasks):
            raise UsageError(f"--tuner {name} has none of the tasks {', '.join(tasks)}, but {', '.join(files)}.")
    return [Chosen(name, files[task], scale, task) for name, scale, files in offered for task in tasks if task in files]


def files_by_task(name: str) -> dict[str, Path]:
    """The tuner files at `name` by task. An ordinary one's task is the one it was trained for, or its run's name."""
    if files := task_files(name):
        return files
    file = tuner_file(name)
    return {read_meta(file).get("task") or _run_name(file.resolve()): file}


def _run_name(file: Path) -> str:
    """NAME of NAME/tuner/tuner.safetensors, NAME/tuner.safetensors and NAME.safetensors."""
    if file.name != NAME:
        return file.stem
    return file.parent.parent.name if file.parent.name == "tuner" else file.parent.name


def base_of(chosen: Sequence[Chosen]) -> str:
    """The base of the first tuner that says it; mini without tuners. Raises `UsageError` where none does."""
    for one in chosen:
        if "base" in one.meta:
            return one.meta["base"]["id"]
    if chosen:
        raise UsageError(f"{chosen[0].name} does not say which base it is for; give --base.")
    return "mini"


def split_scale(text: str) -> tuple[str, float]:
    """FILE or FILE:SCALE as (file, scale); the scale is 1 where none is given."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return head, float(tail)
    except ValueError:
        return text, 1.0
