"""A prepared folder as training reads it: the same items as `PreparedSet`, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...backbones.families.base import Rows as TextRows
from ...devices import torch_dtype
from ..conditions import condition
from ..prompts import Prompt
from ..records import BytesBlob, Fault, Record
from .folder import Places, Rows


class StreamedSet(Dataset):
    """Items of a prepared folder. `groups` are the numbers of items that lie together, shard by shard.

    table: the conditioning rows by label, for bases that are conditioned on labels; None where the shards have rows.
    """

    def __init__(
        self, rows: Rows, conds: Sequence[str], prompt: Prompt, null_rows: Mapping[str, Tensor],
        table: Mapping[str, TextRows] | None = None,
    ) -> None:  # fmt: skip
        self.records, self.places, self.shards = rows, rows.places, rows.folder.shards
        self.conds, self.prompt, self.table = tuple(conds), prompt, table
        dtype = torch_dtype(rows.folder.manifest.dtype)  # one row is as precise as the others
        self.null_rows = {n: row.to(dtype) if row.is_floating_point() else row for n, row in null_rows.items()}
        self.faults: list[Fault] = []
        self.bytes_on_disk, self.version = rows.folder.manifest.bytes, rows.folder.manifest.version

    @property
    def groups(self) -> list[int]:
        """Items of each shard, in the order of the items."""
        return self.places.groups if isinstance(self.places, Places) else [len(self.places)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """As `PreparedSet` serves it, in the stored precision; training converts it on its device.

        A mirror image has its record's key. Raises `SctoolError` for damaged shards.
        """
        shard, row = self.places[i]
        reader = self.shards[shard]
        entry = reader.entry(row)
        meta = reader.meta(entry)
        mean, std = reader.latents(entry)
        text = reader.text(entry) if self.table is None else self.table[reader.labels[entry[3]]]
        return {
            "key": meta["key"],
            "caption": self.prompt(_record(meta)),
            "mean": mean,
            "std": std,
            "text": dict(text),
            "hints": {cond: self._hint(reader.hint(entry, cond), cond) for cond in self.conds},
        }

    def _hint(self, map: np.ndarray, cond: str) -> Tensor:
        """(3, H, W) uint8."""
        kind = condition(cond)
        if kind.categorical:
            map = kind.render(map, map)
        pixels = torch.from_numpy(map)
        return pixels[None].expand(3, -1, -1) if map.ndim == 2 else pixels.permute(2, 0, 1)


def _record(meta: Mapping[str, Any]) -> Record:
    """What a prompt is made from."""
    return Record(meta["key"], BytesBlob(b""), meta["text"], {}, None, meta["label"])
