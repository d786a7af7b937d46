"""The sets that a run trains on and holds out: opened, checked, and missing maps made."""

from __future__ import annotations

from typing import Any

from ..core.config import TrainConfig
from ..core.data.check import check
from ..core.data.conditions import parse_conditions
from ..core.data.prompts import Prompt, PromptRule, count_prompts
from ..core.data.records import Source
from ..core.data.sources import open_source
from ..core.data.streaming.folder import PreparedFolder
from ..core.data.streaming.layout import is_prepared
from ..core.errors import SctoolError, UsageError
from ..core.progress import Progress
from . import make_annotators
from .engine.ondemand import ensure_maps

FAULTS_SHOWN = 20


def open_training_sets(
    config: TrainConfig, size: int, *, prompt: Prompt | None = None, strict: bool = False, quiet: bool = False
) -> tuple[Source, Source | None, dict[str, Any]]:
    """The training set, the held-out set of `--val-data` if any, and how each condition's maps were made.

    Missing maps that need no weights are made at `size` px and kept in the cache. All faults are listed in one pass,
    and how many captions are empty or come from class labels; `strict` decodes every image and raises `SctoolError`
    when there is any fault. Of a prepared folder only the sizes of its files are checked.
    `prompt` is what the base's family conditions on; captions when not given.
    """
    progress, prompt = Progress(quiet), prompt or PromptRule(config.trigger, config.caption)
    map_meta: dict[str, Any] = {}
    sources = []
    for path in filter(None, (config.data, config.val_data)):
        if is_prepared(path):
            sources.append(_open_prepared(path, config, size, map_meta, progress))
            continue
        source = open_source(path, config.maps)
        if config.conditions:
            source, how = ensure_maps(source, config.cond, size, maps=config.maps)
            map_meta |= how
        _check(source, config, prompt, size, strict, progress)
        sources.append(source)
    return sources[0], sources[1] if len(sources) > 1 else None, map_meta


def _open_prepared(
    path: str, config: TrainConfig, size: int, map_meta: dict[str, Any], progress: Progress
) -> PreparedFolder:
    """A prepared folder that fits the run; notes in `map_meta` how its maps were made.

    Raises `UsageError` for a run that wants what it was not prepared for, such as other settings of an annotator.
    """
    folder = PreparedFolder(path)
    flip = config.flip and path == config.data
    folder.check_fits(
        size=size, conds=config.conditions, flip=flip, trigger=config.trigger, caption=config.caption, maps=config.maps
    )
    made = folder.manifest.conditions
    for spec in parse_conditions(config.cond):
        if spec.settings and not make_annotators(str(spec))[0].made_with_same_settings(made[spec.name]):
            shown = ", ".join(f"{key}={value}" for key, value in made[spec.name].items()) or "unknown settings"
            raise UsageError(
                f"--cond {spec} does not fit '{path}': its {spec.name} maps were made with {shown}. Leave the settings "
                f"out (--cond {spec.name}), or prepare the set with them: sctool prepare {folder.manifest.source}"
            )
    if changed := folder.changed_sources():
        total, origin = len(folder.manifest.shards), folder.manifest.source
        progress.note(
            f"{changed} of {total} shards of {origin} have changed since they were prepared; training uses what was "
            f"prepared. The same sctool prepare again brings '{path}' up to date."
        )
    map_meta |= {name: made[name] for name in config.conditions}
    return folder


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
