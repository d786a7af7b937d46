"""Tasks of one run: read from a file, each with the config that a run of its own would have. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .config import TrainConfig
from .errors import UsageError


def read_tasks(path: str | Path) -> list[Any]:
    """The rows of a file of tasks, YAML or JSON: a list of mappings with a `name`, or a mapping from names to them.

    The rows are checked by `TrainConfig`. Raises `UsageError` for a file that is missing, malformed or empty.
    """
    try:
        value = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"--tasks {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UsageError(f"--tasks {path}{line}: not valid YAML or JSON ({str(error).splitlines()[0]}).") from error
    if isinstance(value, Mapping):
        value = [_named(str(name), row, path) for name, row in value.items()]
    if not isinstance(value, list) or not value:
        raise UsageError(f"--tasks {path}: write a list of tasks, each as {{name: NAME, data: FOLDER, cond: ...}}.")
    return value


def _named(name: str, row: Any, path: str | Path) -> dict[str, Any]:
    """A row of a mapping from names to rows, with its name."""
    if not isinstance(row or {}, Mapping) or (row or {}).get("name", name) != name:
        raise UsageError(f"--tasks {path}: {name}: {row!r} is no task; write {name}: {{data: FOLDER, cond: ...}}.")
    return {**(row or {}), "name": name}


def task_configs(config: TrainConfig) -> dict[str | None, TrainConfig]:
    """Each task's config by its name: the run's with the task's own keys. {None: config} for a run without tasks.

    A task's `tuner` is added to the run's; every other key replaces it.
    """
    configs: dict[str | None, TrainConfig] = {}
    for task in config.tasks:
        own = {key: getattr(task, key) for key in task.model_fields_set - {"name"} if getattr(task, key) is not None}
        if task.tuner:
            own["tuner"] = {**config.tuner, **task.tuner}
        configs[task.name] = config.model_copy(update={"tasks": (), **own})
    return configs or {None: config}
