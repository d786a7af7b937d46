"""The order of an epoch: a function of the seed and the epoch, whatever the number of processes and workers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch

from .seeds import generator

WINDOW = 1 << 16
"""Items that are shuffled among each other at least, where shards are read one group after another."""


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0 to count - 1."""
    return torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()


class BlockOrder:
    """A permutation of a set in shards, one position at a time, in memory that does not grow with the set.

    The shards are permuted, consecutive ones are joined to blocks of at least `window` items, and the items of a block
    are permuted. So every item comes once an epoch, and only a few shards are read at a time. A set of one block has
    a permutation of all its items. `groups` are the numbers of items of the shards.
    """

    def __init__(self, groups: Sequence[int], seed: int, epoch: int, window: int = WINDOW) -> None:
        self._key = (seed, "block", epoch)
        sizes = np.asarray(groups, dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(sizes)])  # the first item of each shard
        shards = torch.randperm(len(sizes), generator=generator(seed, "shards", epoch)).numpy()
        self._blocks: list[np.ndarray] = []
        start = held = 0
        for place, shard in enumerate(shards):
            held += int(sizes[shard])
            if held >= window or place == len(shards) - 1:
                self._blocks.append(shards[start : place + 1])
                start, held = place + 1, 0
        if len(self._blocks) > 1 and sizes[self._blocks[-1]].sum() < window:  # a small rest would be shuffled alone
            last = self._blocks.pop()
            self._blocks[-1] = np.concatenate([self._blocks[-1], last])
        self._ends = np.cumsum([int(sizes[block].sum()) for block in self._blocks]).tolist()
        self._sizes, self._current, self._items = sizes, -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, position: int) -> int:
        block = bisect_right(self._ends, position)
        if block != self._current:
            self._current, self._items = block, self._permuted(block)
        return int(self._items[position - (self._ends[block - 1] if block else 0)])

    def _permuted(self, block: int) -> np.ndarray:
        """The items of a block in their order."""
        items = np.concatenate([np.arange(self._sizes[s]) + self._first[s] for s in self._blocks[block]])
        return items[torch.randperm(len(items), generator=generator(*self._key, block)).numpy()]
