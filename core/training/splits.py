"""Which images a run trains on, and which it holds out."""

from __future__ import annotations

import torch

from ..config import TrainConfig
from ..data.records import Record, Source
from .seeds import generator

HELD_OUT = ("validation", "val", "test")
HELD_OUT_SHARE = 10
"""One in so many images is held out where the data mark none."""


def split_records(source: Source, held_out: Source | None, config: TrainConfig) -> tuple[list[Record], list[Record]]:
    """Training and held-out records, which never overlap.

    Held out are: a set of its own, else the records marked so in the data, else a seeded sample of at most a tenth.
    """
    if held_out is not None:
        return list(source.records), list(held_out.records)[: config.val_count]
    marked = [name for name in HELD_OUT if any(record.split == name for record in source.records)]
    if marked:
        training = [record for record in source.records if record.split not in HELD_OUT]
        return training, [record for record in source.records if record.split == marked[0]][: config.val_count]
    count = min(config.val_count, len(source.records) // HELD_OUT_SHARE)
    order = torch.randperm(len(source.records), generator=generator(config.seed, "held out")).tolist()
    chosen = set(order[:count])
    training = [record for i, record in enumerate(source.records) if i not in chosen]
    return training, [source.records[i] for i in sorted(chosen)]
