"""The sets that a run trains on and holds out: opened, checked, and missing maps made."""

from __future__ import annotations

from typing import Any

from ..core.config import TrainConfig
from ..core.data.check import check
from ..core.data.prompts import Prompt, PromptRule, count_prompts
from ..core.data.records import Source
from ..core.data.sources import open_source
from ..core.errors import SctoolError
from ..core.progress import Progress
from .engine.ondemand import ensure_maps

FAULTS_SHOWN = 20


def open_training_sets(
    config: TrainConfig, size: int, *, prompt: Prompt | None = None, strict: bool = False, quiet: bool = False
) -> tuple[Source, Source | None, dict[str, Any]]:
    """The training set, the held-out set of `--val-data` if any, and how each condition's maps were made.

    Missing maps that need no weights are made at `size` px and kept in the cache. All faults are listed in one pass,
    and how many captions are empty or come from class labels; `strict` decodes every image and raises `SctoolError`
    when there is any fault. `prompt` is what the base's family conditions on; captions when not given.
    """
    progress, prompt = Progress(quiet), prompt or PromptRule(config.trigger, config.caption)
    map_meta: dict[str, Any] = {}
    sources = []
    for path in filter(None, (config.data, config.val_data)):
        source = open_source(path, config.maps)
        if config.conditions:
            source, how = ensure_maps(source, config.cond, size, maps=config.maps)
            map_meta |= how
        _check(source, config, prompt, size, strict, progress)
        sources.append(source)
    return sources[0], sources[1] if len(sources) > 1 else None, map_meta


def _check(source: Source, config: TrainConfig, prompt: Prompt, size: int, strict: bool, progress: Progress) -> None:
    """Prints the faults and how the captions were made up. Raises `SctoolError` for faults if `strict`."""
    faults = check(source, conds=config.conditions, prompt=prompt, deep=strict, size=size)
    for fault in faults[:FAULTS_SHOWN]:
        progress.note(str(fault))
    if prompts := str(count_prompts(source, prompt)):
        progress.note(f"{source.name}: {prompts}")
    if faults:
        rest = f", the first {FAULTS_SHOWN} of them above" if len(faults) > FAULTS_SHOWN else ""
        message = f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in {source.name}{rest}"
        if strict:
            raise SctoolError(f"{message}. Fix them, or leave --strict out to train on the rest.")
        progress.note(f"{message}; continuing with the rest. --strict decodes every image and stops at faults.")
