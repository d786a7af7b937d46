"""What can be evaluated: folders of samples, with or without the run that they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.data.images import BadImage, decode_rgb
from ..core.data.paths import is_picture
from ..core.errors import UsageError
from ..core.files import sha256
from ..core.runs import Run, find_run, several
from .metadata import read_rows, read_sampling
from .metrics import SET_METRICS, flag_list

KINDS = ("base", "tuned")


@dataclass(frozen=True)
class SampleFolder:
    """A folder of images as `sctool sample` writes it: rows of metadata.jsonl, and how the images were drawn."""

    label: str
    path: Path
    rows: list[dict[str, Any]] = field(repr=False)
    sampling: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def base(self) -> str | None:
        """The base's id, where sampling.json has it."""
        return self.sampling.get("base", {}).get("id")

    def protocol(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What determines the images of `rows` besides the tuners: sampler, base, seeds, prompts, number."""
        return {
            "n": len(rows),
            "seeds": short_seeds([row.get("seed") for row in rows]),
            "prompts_sha256": digest([row.get("prompt") for row in rows]),
            "base_hash": self.sampling.get("base", {}).get("hash"),
            "sampling": {k: v for k, v in self.sampling.items() if k not in ("tuners", "base", "batch")},
        }


@dataclass(frozen=True)
class Target:
    """What `evaluate` was given; `run` is None for a folder of samples outside any run."""

    name: str
    path: Path
    run: Run | None
    folders: list[SampleFolder]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of all folders."""
        return [row for folder in self.folders for row in folder.rows]


# --------------------------------------------------------------------------------------------- finding the target


def find_target(
    target: str | Path | None, runs: str | Path = "runs", *, bare: bool = False, task: str | None = None
) -> Target:
    """A samples folder, a folder of several (base, tuned), a run by folder or name, or the latest run for None.

    bare: accept images without metadata.jsonl. task: one of the run's tasks. A run without samples has no folders yet.
    Raises `UsageError` for a name that is both a folder here and a run, and for what is missing, with the remedy.
    """
    path = None if target is None else Path(target).expanduser()
    if path is None or not path.is_dir() or _is_run(path):
        _refuse_ambiguous(target, runs, path if path and path.is_dir() else None)
        return run_target(of_task(find_run(path, runs), task))
    named = run_of_name(target, runs)
    folders = [read_folder(path)] if (path / "metadata.jsonl").is_file() else _sample_folders(path)
    if folders or (bare and image_names(path)):
        _refuse_ambiguous(target, runs, path)
    elif named and _is_run(named):
        return run_target(of_task(Run(named), task))
    if task is not None:
        raise UsageError(f"--task {task}: {path} is a folder of samples; a task belongs to a run.")
    return Target(str(target), path, None, folders or [_bare_folder(path, bare)])


def of_task(run: Run, task: str | None) -> Run:
    """The run, or what belongs to a task. Raises `UsageError` for a run of several tasks where none is named."""
    if task is not None:
        return run.of_task(task)
    if run.tasks:
        raise several(run.path, run.tasks)
    return run


def run_target(run: Run) -> Target:
    """A run, or a task of one, with the held-out samples that it has."""
    return Target(run.title, run.samples if run.task else run.path, run, _sample_folders(run.samples))


def run_of_name(target: str | Path | None, runs: str | Path) -> Path | None:
    """The folder that a run of this name has under `runs`; None for a path such as ./NAME or a/b."""
    return Path(runs) / target if target is not None and Path(target).name == str(target) else None


def ambiguous(target: str | Path, here: Path, run: Path) -> UsageError:
    """The error for a name that means both the folder `here` and the folder `run`."""
    return UsageError(f"'{target}' is both the folder {here} and the run {run}. Write ./{here} or {run}.")


def _refuse_ambiguous(target: str | Path | None, runs: str | Path, here: Path | None) -> None:
    """Raises `UsageError` where `target` names a valid folder `here` and another run under `runs`."""
    run = run_of_name(target, runs)
    if target is not None and here and run and _is_run(run) and run.resolve() != here.resolve():
        raise ambiguous(target, here, run)


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def _sample_folders(path: Path) -> list[SampleFolder]:
    """The complete sample folders in `path`, base first."""
    return [read_folder(path / kind) for kind in KINDS if (path / kind / "metadata.jsonl").is_file()]


def _bare_folder(path: Path, allowed: bool) -> SampleFolder:
    names = image_names(path)
    if not names:
        raise UsageError(f"{path} contains no images. Give a folder that `sctool sample` wrote, or a run folder.")
    if not allowed:
        compared = {name: row for name, row in SET_METRICS.items() if row.references}
        raise UsageError(
            f"{path} contains images ({len(names)}) but no metadata.jsonl, which lists prompts, hints and references. "
            f"`sctool sample` writes it. For {flag_list(compared)} alone, pass the reference images with "
            "--reference FOLDER."
        )
    return SampleFolder(path.name, path, [{"file_name": name} for name in names])


def read_folder(path: Path) -> SampleFolder:
    """A samples folder. Raises `UsageError` for malformed rows, or none."""
    rows = read_rows(path / "metadata.jsonl")
    if not rows:
        raise UsageError(f"{path / 'metadata.jsonl'} lists no images. Draw some: sctool sample")
    return SampleFolder(path.name, path, rows, read_sampling(path / "sampling.json"))


# ------------------------------------------------------------------------------------------------- reading images


def image_names(folder: Path) -> list[str]:
    """Images below `folder`, by relative path, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if is_picture(path.name))


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises `BadImage` when it leads out of the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadImage("its name leads out of the folder")
    return path


def read_image(folder: Path, name: str) -> np.ndarray:
    """uint8 (H, W, 3). Raises `BadImage` for a file that is missing or cannot be decoded."""
    try:
        return decode_rgb(inside(folder, name).read_bytes())
    except (OSError, ValueError) as error:  # ValueError: a name with NUL or a lone surrogate
        raise BadImage(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def file_hash(folder: Path, name: str) -> str:
    """SHA-256 of an image file; "unreadable" for a missing one."""
    try:
        return sha256(inside(folder, name))
    except (OSError, BadImage):
        return "unreadable"


def short_seeds(seeds: Sequence[Any]) -> str:
    """ "0-199" for consecutive seeds, else their number and hash."""
    if not seeds or any(not isinstance(seed, int) for seed in seeds):
        return "unknown"
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return f"{len(seeds)} seeds, sha256 {digest(list(seeds))}"


def digest(value: Any) -> str:
    """Twelve hex digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
