"""What there is to evaluate: folders of samples, with or without the run that they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.data.images import BadImage, decode_rgb
from ..core.errors import SctoolError, UsageError
from ..core.runs import Run, find_run
from .metadata import read_rows, read_sampling

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
KINDS = ("base", "tuned")


@dataclass(frozen=True)
class SampleFolder:
    """A folder of pictures as `sctool sample` writes it: rows of metadata.jsonl, and how they were drawn."""

    label: str
    path: Path
    rows: list[dict[str, Any]] = field(repr=False)
    sampling: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def base(self) -> str | None:
        """The base's id, where the folder says it."""
        return self.sampling.get("base", {}).get("id")

    def protocol(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What decides the pictures of `rows` besides the tuners: sampler, base, seeds, prompts, number."""
        return {
            "n": len(rows),
            "seeds": short_seeds([row.get("seed") for row in rows]),
            "prompts_sha256": digest([row.get("prompt") for row in rows]),
            "base_hash": self.sampling.get("base", {}).get("hash"),
            "sampling": {k: v for k, v in self.sampling.items() if k not in ("tuners", "base", "batch")},
        }


@dataclass(frozen=True)
class Target:
    """What `evaluate` was pointed at; `run` is None for a bare folder of samples."""

    name: str
    path: Path
    run: Run | None
    folders: list[SampleFolder]


def resolve(target: str | Path | None, runs: str | Path = "runs", *, bare: bool = False) -> Target:
    """A samples folder, a folder of several (base, tuned), a run by folder or name, or the latest run for None.

    bare: accept pictures without metadata.jsonl. A run without samples has no folders yet.
    Raises `UsageError` that says what is missing and how to get it.
    """
    if target is not None and not is_run(target):
        path = Path(target).expanduser()
        found = [path] if (path / "metadata.jsonl").is_file() else _within(path)
        folders = [read_folder(each) for each in found] or [_bare_folder(path, bare)]
        return Target(str(target), path, None, folders)
    run = find_run(target, runs)
    return Target(run.name, run.path, run, [read_folder(each) for each in _within(run.samples)])


def _within(path: Path) -> list[Path]:
    """The complete sample folders in `path`, base first."""
    return [path / kind for kind in KINDS if (path / kind / "metadata.jsonl").is_file()]


def is_run(target: str | Path | None) -> bool:
    """Whether the target means a run: nothing, a run folder, or a name that is no folder here."""
    path = Path(target).expanduser() if target is not None else None
    return path is None or not path.is_dir() or (path / "config.yaml").is_file()


def _bare_folder(path: Path, allowed: bool) -> SampleFolder:
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.suffix.lower() in PICTURES)
    if not names:
        raise UsageError(f"{path} holds no pictures. Give a folder that `sctool sample` wrote, or a run folder.")
    if not allowed:
        raise UsageError(
            f"{path} holds pictures ({len(names)}) and no metadata.jsonl, which says what each was drawn from. "
            "`sctool sample` writes it; for --fid, --kid, --pr and --cmmd alone give the real pictures with "
            "--reference FOLDER."
        )
    return SampleFolder(path.name, path, [{"file_name": name} for name in names])


def read_folder(path: Path) -> SampleFolder:
    """A samples folder. Raises `UsageError` for malformed or no rows."""
    rows = read_rows(path / "metadata.jsonl")
    if not rows:
        raise UsageError(f"{path / 'metadata.jsonl'} lists no pictures. Draw some: sctool sample")
    return SampleFolder(path.name, path, rows, read_sampling(path / "sampling.json"))


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises `BadImage` when it leads out of the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadImage("its name leads out of the folder")
    return path


def read_picture(folder: Path, name: str) -> np.ndarray:
    """uint8 (H, W, 3). Raises `BadImage` for what is missing or cannot be decoded."""
    try:
        return decode_rgb(inside(folder, name).read_bytes())
    except (OSError, ValueError) as error:  # ValueError: a name with NUL or a lone surrogate
        raise BadImage(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def short_seeds(seeds: Sequence[Any]) -> str:
    """ "0-199" for seeds that count up, else their number and hash."""
    if not seeds or any(not isinstance(seed, int) for seed in seeds):
        return "unknown"
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return f"{len(seeds)} seeds, sha256 {digest(list(seeds))}"


def digest(value: Any) -> str:
    """Twelve hex digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def require(found: bool, flag: str, target: str, reason: str) -> None:
    """Raises `SctoolError` when a metric that was asked for by name cannot be computed."""
    if not found:
        raise SctoolError(f"{flag}: {target} {reason}")
