"""The sets that a run trains on and holds out, opened and checked; maps that they lack are made."""

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

    Weight-free maps that the set lacks are made at `size` px and kept in the cache. Faults are listed, all in one pass;
    `strict` decodes every picture and turns any fault into a `SctoolError`.
    """
    progress = Progress(quiet)
    made: dict[str, Any] = {}
    ready = []
    for path in filter(None, (config.data, config.val_data)):
        source = open_source(path, config.maps)
        if config.conditions:
            source, how = ensure_maps(source, config.cond, size)
            made |= how
        faults = check(source, conds=config.conditions, need_text=not config.trigger, deep=strict, size=size)
        for fault in faults[:FAULTS_SHOWN]:
            progress.note(str(fault))
        if faults:
            rest = f", the first {FAULTS_SHOWN} of them above" if len(faults) > FAULTS_SHOWN else ""
            message = f"{len(faults)} faults in {source.name}{rest}"
            if strict:
                raise SctoolError(f"{message}. Mend them, or leave --strict out to train on the rest.")
            progress.note(f"{message}; going on with the rest. --strict decodes every picture and refuses instead.")
        ready.append(source)
    return ready[0], ready[1] if len(ready) > 1 else None, made
