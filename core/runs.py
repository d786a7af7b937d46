"""Run folders: the config, metrics, samples, tuner and resume states of a training run. Imports no torch.

runs/<name>/config.yaml env.json metrics.jsonl tb/ samples/ tuner/ state/step-N/      runs/latest names the latest run

A run of several tasks has a tuner for each, tuner/TASK.safetensors, and its samples in samples/TASK/.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import SctoolError, UsageError, unknown
from .files import write_json, write_text
from .resolving import build, read_yaml, to_yaml
from .tasks import task_configs

PACKAGES = (
    "sctool",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "opencv-python-headless",
)
# Settings that may differ when a run is resumed: they decide when to stop and measure, not what is learned.
FREE_KEYS = {"save_every", "keep", "validate_every", "sample_every"}


def free_keys(config: TrainConfig) -> set[str]:
    """The settings that may differ; the number of steps only where neither learning rate nor masking depend on it."""
    return FREE_KEYS | (
        {"steps"} if config.schedule == "constant" and not (config.mask and config.mask_anneal) else set()
    )


@dataclass(frozen=True)
class Run:
    """One run folder; with a `task`, what of it belongs to that task."""

    path: Path
    task: str | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def title(self) -> str:
        """The name, and the task's where there is one."""
        return f"{self.name}, task {self.task}" if self.task else self.name

    @property
    def config(self) -> TrainConfig:
        """The resolved configuration saved with the run, or the task's."""
        config = build(TrainConfig, read_yaml(self.path / "config.yaml"))
        return task_configs(config)[self.task] if self.task else config

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of its tasks; () for a run without tasks."""
        return tuple(task.name for task in self.config.tasks)

    def of_task(self, task: str) -> Run:
        """What belongs to one of its tasks. Raises `UsageError` for a name that it does not have."""
        if not self.tasks:
            raise UsageError(f"run '{self.name}' was trained without tasks, so it has no task '{task}'.")
        if task not in self.tasks:
            raise unknown(f"task of run '{self.name}':", task, self.tasks)
        return Run(self.path, task)

    def parts(self) -> list[Run]:
        """The run itself, or what belongs to each of its tasks."""
        return [Run(self.path, task) for task in self.tasks] or [self]

    @property
    def tuner(self) -> Path:
        """The file of the trained tuner. Raises `UsageError` for a run that has one for each of its tasks."""
        if self.task is None and (self.path / "config.yaml").is_file() and self.tasks:
            raise several(self.path, self.tasks)
        return self.path / "tuner" / f"{self.task or 'tuner'}.safetensors"

    def in_diffusers(self, condition: str) -> Path:
        """The folder of what was trained for a condition as a model of diffusers' own, for methods that have one."""
        return self.path / "diffusers" / "-".join(filter(None, (self.task, condition)))

    @property
    def samples(self) -> Path:
        """The folder of previews and held-out samples."""
        return self.path / "samples" / (self.task or "")

    @property
    def metrics(self) -> Path:
        """The file of metrics, one JSON object per line: step, loss, lr, validation, adherence."""
        return self.path / "metrics.jsonl"

    def states(self) -> list[Path]:
        """Complete resume states, oldest first."""
        complete = [p for p in (self.path / "state").glob("step-*") if (p / "state.json").is_file()]
        return sorted(complete, key=lambda p: int(p.name[5:]))

    def become_latest(self) -> None:
        """Makes this the run that commands use when none is named."""
        write_text(self.path.parent / "latest", self.name + "\n")

    def log(self, row: dict[str, Any]) -> None:
        """Appends a row to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def forget_after(self, step: int) -> None:
        """Removes metrics of steps after `step`, which a resumed run computes again."""
        if not self.metrics.is_file():
            return
        lines = [line for line in self.metrics.read_text().splitlines() if line.endswith("}")]
        lines = [line for line in lines if json.loads(line).get("step", 0) <= step]
        write_text(self.metrics, "".join(line + "\n" for line in lines))

    def discard_if_untrained(self) -> None:
        """Removes the folder of a run that failed before its first row or state, so that nothing is left of it."""
        parts = self.parts() if (self.path / "config.yaml").is_file() else []
        if not self.metrics.exists() and not self.states() and not any(part.tuner.exists() for part in parts):
            shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the run for this process. Raises `SctoolError` when another process is training it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SctoolError(
                    f"{self.path} is being trained by another process; wait for it or use --name."
                ) from error
            yield


def several(path: Path, tasks: Iterable[str]) -> UsageError:
    """The error where one tuner is wanted of a run that has several."""
    return UsageError(f"{path} has a tuner for each of its tasks. Choose with --task: {', '.join(tasks)}.")


def default_name(config: TrainConfig) -> str:
    """A name that is the same for the same settings: method, conditions, base, data and a hash of all settings.

    The tasks stand for conditions and data where there are any.
    """
    values = {k: v for k, v in config.model_dump(mode="json").items() if k not in free_keys(config)}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]
    tasks, data = [task.name for task in config.tasks], Path(config.data).resolve().name
    words = [*tasks, Path(config.base).name] if tasks else [*config.conditions, Path(config.base).name, data]
    return "-".join(["distill" if config.distill else config.method, *words, digest])


def named_run(out: str | Path, name: str | None, config: TrainConfig) -> Run:
    """The run folder of that name, or of a name made from the settings; it may not exist.

    Raises `UsageError` for a name that is no single folder name.
    """
    run = Run(Path(out) / (name or default_name(config)))
    if name and (run.path.name != name or name in (".", "..")):
        raise UsageError(f"--name {name}: a run name is a single folder name; use --out for the folder of runs.")
    return run


def open_run(out: str | Path, name: str | None, config: TrainConfig) -> Run:
    """The run folder for `config`, created if it does not exist.

    Raises `UsageError` when a run of that name has other settings, naming the keys that differ, or has done more steps;
    `SctoolError` when the folder cannot be written.
    """
    run = named_run(out, name, config)
    if changed := changed_settings(run, config):
        raise UsageError(f"run '{run.name}' exists with other settings: {', '.join(changed)}. Choose another --name.")
    done = max((int(state.name[5:]) for state in run.states()), default=0)
    if done > config.steps:
        raise UsageError(f"run '{run.name}' has done {done} steps already, more than steps={config.steps}. Use --name.")
    write_text(run.path / "config.yaml", to_yaml(config))
    write_json(run.path / "env.json", environment())
    return run


def changed_settings(run: Run, config: TrainConfig) -> list[str]:
    """The settings of an existing run that `config` would change and may not, as "lr (0.1 before, 0.2 now)"."""
    if not (run.path / "config.yaml").is_file():
        return []
    old, new = run.config.model_dump(mode="json"), config.model_dump(mode="json")
    fixed = [key for key in new if key not in free_keys(config)]
    return [line for key in fixed for line in _changed(key, old[key], new[key])]


def _changed(key: str, old: Any, new: Any) -> Iterator[str]:
    """The values of a setting that differ; of a section, as a method's own settings, each by its name."""
    if isinstance(old, dict) and isinstance(new, dict):
        for part in dict.fromkeys([*old, *new]):
            yield from _changed(f"{key}.{part}", old.get(part), new.get(part))
    elif old != new:
        yield f"{key} ({old} before, {new} now)"


def environment() -> dict[str, Any]:
    """Versions and the command line, as saved in env.json."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return {**system, "packages": versions, "argv": sys.argv}


def latest(out: str | Path = "runs") -> Run:
    """The run that was trained last. Raises `UsageError` when there is none."""
    pointer = Path(out) / "latest"
    if not pointer.is_file():
        known = run_names(out)
        if known:
            raise UsageError(f"{out}/ does not say which run is the latest. Name one: {', '.join(known)}.")
        raise UsageError(f"no run in {out}/ yet. Train one first: sctool train --method scedit")
    return Run(Path(out) / pointer.read_text().strip())


def find_run(target: str | Path | None, out: str | Path = "runs") -> Run:
    """The run with that folder, or that name under `out`; for None the latest. Raises `UsageError` if there is none."""
    if target is None:
        return latest(out)
    for path in (Path(target), Path(out) / str(target)):
        if (path / "config.yaml").is_file():
            return Run(path)
    known = run_names(out)
    if not Path(target).exists() and known:
        raise unknown("run", str(target), known)
    reason = "is not a run folder (it has no config.yaml)" if Path(target).exists() else "does not exist"
    there = f"the runs in {out}/ are {', '.join(known)}" if known else f"{out}/ has no run"
    raise UsageError(f"'{target}' {reason}. Give a run folder or the name of a run; {there}.")


def run_names(out: str | Path) -> list[str]:
    """The names of the runs in a folder, sorted."""
    return sorted(path.parent.name for path in Path(out).glob("*/config.yaml"))
