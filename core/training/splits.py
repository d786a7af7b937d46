"""Which images a run trains on, and which it holds out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import TrainConfig
from ..data.records import Record, Source
from ..data.streaming.folder import PreparedFolder, Rows, first_records
from .seeds import generator

HELD_OUT = ("validation", "val", "test")
HELD_OUT_SHARE = 10
"""One in so many images is held out where the data mark none."""


def split_records(
    source: Source, held_out: Source | None, config: TrainConfig
) -> tuple[Sequence[Record], Sequence[Record]]:
    """Training and held-out records, which never overlap; of a prepared folder as `Rows`, which are read when asked.

    Held out are: a set of its own, else the records marked so in the data, else a seeded sample of at most a tenth.
    """
    if held_out is not None:
        return _all(source), first_records(_all(held_out), config.val_count)
    if isinstance(source, PreparedFolder):
        return _split_prepared(source, config)
    marked = [name for name in HELD_OUT if any(record.split == name for record in source.records)]
    if marked:
        training = [record for record in source.records if record.split not in HELD_OUT]
        return training, [record for record in source.records if record.split == marked[0]][: config.val_count]
    count = min(config.val_count, len(source.records) // HELD_OUT_SHARE)
    order = torch.randperm(len(source.records), generator=generator(config.seed, "held out")).tolist()
    chosen = set(order[:count])
    training = [record for i, record in enumerate(source.records) if i not in chosen]
    return training, [source.records[i] for i in sorted(chosen)]


def _all(source: Source) -> Sequence[Record]:
    return source.everything if isinstance(source, PreparedFolder) else list(source.records)


def _split_prepared(folder: PreparedFolder, config: TrainConfig) -> tuple[Rows, Rows]:
    """As above, in memory that does not grow with the set: the sample is drawn image by image."""
    for part in ("validation", "test"):
        if folder.manifest.count(part):
            return folder.rows("train"), folder.rows(part).first(config.val_count)
    every = folder.rows("train")
    chosen: set[int] = set()
    draws = generator(config.seed, "held out")
    while len(chosen) < min(config.val_count, len(every) // HELD_OUT_SHARE):
        chosen.add(int(torch.randint(len(every), (), generator=draws)))
    places = [every.places[i] for i in sorted(chosen)]
    left_out: dict[int, list[int]] = {}
    for shard, row in places:
        left_out.setdefault(shard, []).append(row)
    return folder.rows("train", left_out=left_out), Rows(folder, places)
