"""The sets that a run trains on and holds out, opened and checked; missing maps are made."""

from __future__ import annotations

from typing import Any

from ..core.config import TrainConfig
from ..core.data.check import check
from ..core.data.records import Source
from ..core.data.sources import open_source
from ..core.errors import SctoolError
from ..core.progress import Progress
from .engine.ondemand import ensure_maps

FAULTS_SHOWN = 20


def open_training_sets(
    config: TrainConfig, size: int, *, strict: bool = False, quiet: bool = False
) -> tuple[Source, Source | None, dict[str, Any]]:
    """The training set, the held-out set of `--val-data` if any, and how each condition's maps were made.

    Missing maps of conditions without a network are made at `size` px and cached. All faults are listed in one pass;
    `strict` decodes every image and turns any fault into a `SctoolError`. Raises `UsageError` as `ensure_maps` does.
    """
    progress = Progress(quiet)
    map_settings: dict[str, Any] = {}
    sources = []
    for path in filter(None, (config.data, config.val_data)):
        source = open_source(path, config.maps)
        if config.conditions:
            source, settings = ensure_maps(source, config.cond, size, maps=config.maps)
            map_settings |= settings
        _report_faults(source, config, size, progress, strict)
        sources.append(source)
    return sources[0], sources[1] if len(sources) > 1 else None, map_settings


def _report_faults(source: Source, config: TrainConfig, size: int, progress: Progress, strict: bool) -> None:
    faults = check(source, conds=config.conditions, need_text=not config.trigger, deep=strict, size=size)
    for fault in faults[:FAULTS_SHOWN]:
        progress.note(str(fault))
    if not faults:
        return
    shown = f", the first {FAULTS_SHOWN} of them above" if len(faults) > FAULTS_SHOWN else ""
    message = f"{len(faults)} faults in {source.name}{shown}"
    if strict:
        raise SctoolError(f"{message}. Fix them, or leave --strict out to train on the rest.")
    progress.note(f"{message}; continuing with the rest. --strict decodes every image and refuses instead.")
