"""A prepared folder as a data set: where its items lie, and its records, read one at a time when they are asked for."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from ...errors import SctoolError, UsageError
from ..records import Blob, Record, Source, TarBlob, file_stamp
from .layout import AGAIN, Manifest, read_manifest
from .origin import blob_of
from .reading import Shards, wrong_size

FAULTS_SHOWN = 3

LeftOut = Mapping[int, Sequence[int]]
"""Rows that are not served, by shard."""


class Places:
    """Items 0, 1, … of some parts of a set as (shard, row), in memory that grows with the number of shards only."""

    def __init__(self, starts: Sequence[int], counts: Sequence[int], left_out: LeftOut | None = None) -> None:
        self.starts, self.left_out = starts, {shard: sorted(rows) for shard, rows in (left_out or {}).items()}
        self.groups = [count - len(self.left_out.get(shard, ())) for shard, count in enumerate(counts)]
        """Items of each shard."""
        self._ends = np.cumsum(self.groups).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = bisect_right(self._ends, i)
        row = self.starts[shard] + i - (self._ends[shard - 1] if shard else 0)
        for absent in self.left_out.get(shard, ()):
            row += row >= absent
        return shard, row


class PreparedFolder(Source):
    """A prepared folder. Iterating gives all its records; `records` are those marked validation or test."""

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path).expanduser()
        self.manifest: Manifest = read_manifest(path)
        self._check_files()
        self.shards = Shards(self.folder, self.manifest)
        super().__init__(self.folder.name, "prepared", [], [], self.folder)
        self.records = self.rows("validation", "test")  # pyright: ignore - a sequence that is read when asked

    def _check_files(self) -> None:
        """Raises `SctoolError` naming the first files that are missing or do not have their size."""
        faults = []
        for shard in self.manifest.shards:
            for name, size in ((shard.tar, shard.tar_bytes), (shard.index, shard.index_bytes)):
                try:
                    found = os.stat(self.folder / name).st_size
                except OSError:
                    faults.append(f"{name} is missing")
                    continue
                if found != size:
                    faults.append(f"{name} {wrong_size(found, size)}")
        if faults:
            more = f"; and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
            raise SctoolError(f"'{self.folder}': {'; '.join(faults[:FAULTS_SHOWN])}{more}. {AGAIN}")

    def changed_sources(self) -> int:
        """How many of the shards that it was made from are there and have changed since."""
        stamps = [shard.source_stamp for shard in self.manifest.shards if shard.source_stamp]
        now = [(stamp, file_stamp(stamp.split("|")[0])) for stamp in stamps]
        return sum(found is not None and found != stamp for stamp, found in now)

    def places(self, *parts: str, left_out: LeftOut | None = None) -> Places:
        """Where the items of neighbouring parts lie."""
        shards = self.manifest.shards
        starts = [shard.start(parts[0]) for shard in shards]
        return Places(starts, [sum(shard.rows.get(part, 0) for part in parts) for shard in shards], left_out)

    def rows(self, *parts: str, left_out: LeftOut | None = None) -> Rows:
        """The records of neighbouring parts."""
        return Rows(self, self.places(*parts, left_out=left_out))

    @property
    def everything(self) -> Rows:
        """All records, mirror images not counted again."""
        return self.rows("train", "validation", "test")

    def __len__(self) -> int:
        return len(self.everything)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.everything)

    def conditions(self) -> list[str]:
        """The conditions that it was prepared for."""
        return sorted(self.manifest.conditions)

    @property
    def origins(self) -> Path | None:
        """The folder that the original images are in."""
        return Path(self.manifest.root) if self.manifest.root else None

    def record(self, shard: int, row: int) -> Record:
        """The record of a row: the original image where it still is, and the maps of the prepared shard."""
        reader = self.shards[shard]
        entry = reader.entry(row)
        meta = reader.meta(entry)
        tar = str(self.folder / reader.info.tar)
        maps: dict[str, Blob] = {
            cond: TarBlob(tar, f"{meta['key']}.{cond}.png", *reader.map_place(entry, cond)) for cond in reader.conds
        }
        image = blob_of(meta["origin"], self.origins, meta["key"])
        return Record(meta["key"], image, meta["text"], maps, meta["split"], meta["label"])

    def check_fits(
        self, *, size: int, conds: Sequence[str], flip: bool, trigger: str, caption: str, maps: str | None
    ) -> None:  # fmt: skip
        """Raises `UsageError` where a run wants what the folder was not prepared for."""
        made = self.manifest
        wanted: list[tuple[str, Any, Any]] = [("size", size, made.size), ("trigger", trigger, made.trigger)]
        if not made.by_class:
            wanted.append(("caption", caption, made.caption))
        for name, now, then in wanted:
            if now != then:
                raise UsageError(
                    f"'{self.folder}' was prepared with {name}={then}, and this run has {name}={now}. "
                    f"Train with {name}={then}, or prepare {made.source} again into another --out."
                )
        if flip and not made.flip:
            raise UsageError(f"'{self.folder}' has no mirror images: train with flip=false, or prepare it with --flip.")
        if missing := [cond for cond in conds if cond not in made.conditions]:
            have = f"for {', '.join(made.conditions)}" if made.conditions else "without conditions"
            raise UsageError(
                f"'{self.folder}' was prepared {have}, and has no {missing[0]} maps. Prepare it again: sctool prepare "
                f"{made.source} --cond {','.join([*made.conditions, *missing])} --out ANOTHER"
            )
        if maps is not None:
            raise UsageError(f"--maps does not fit '{self.folder}': maps are part of what was prepared. Leave it out.")

    def check_base(self, name: str, autoencoder: str, conditioner: Sequence[str], by_class: bool) -> None:
        """Raises `UsageError` when another autoencoder or conditioning encoder made the shards.

        `conditioner` is not compared for bases that are conditioned on class labels (`by_class`).
        """
        made = self.manifest
        other = "autoencoder" if autoencoder != made.autoencoder else ""
        if by_class != made.by_class or (not by_class and tuple(conditioner) != made.conditioner):
            other = other or "conditioning encoder"
        if other:
            raise UsageError(
                f"'{self.folder}' was prepared for --base {made.base}, and --base {name} has another {other}. Prepare "
                f"it for this base: sctool prepare {made.source} --base {name} --out ANOTHER"
            )


class Rows(Sequence[Record]):
    """Records of a prepared folder, read when asked for; `places` says where they lie."""

    def __init__(self, folder: PreparedFolder, places: Places | Sequence[tuple[int, int]]) -> None:
        self.folder, self.places = folder, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> Rows: ...
    def __getitem__(self, i: int | slice) -> Record | Rows:
        if isinstance(i, slice):
            return Rows(self.folder, [self.places[n] for n in range(*i.indices(len(self)))])
        return self.folder.record(*self.places[i])

    def first(self, count: int) -> Rows:
        """The first records."""
        return self[: min(count, len(self))]

    def mirrored(self) -> Rows:
        """These records and, of those that are trained on, their mirror images."""
        places = self.places
        if not isinstance(places, Places):
            raise SctoolError("mirror images of single rows are not served.")
        infos = self.folder.manifest.shards
        # the mirror image of train row r is row r of the part before it
        counts = [group + len(places.left_out.get(s, ())) + infos[s].rows.get("mirrored", 0)
                  for s, group in enumerate(places.groups)]  # fmt: skip
        out = {
            shard: [*rows, *(row - infos[shard].start("train") for row in rows)]
            for shard, rows in places.left_out.items()
        }
        return Rows(self.folder, Places([0] * len(counts), counts, out))


def first_records(records: Sequence[Record], count: int) -> Sequence[Record]:
    """The first `count` records, of a prepared folder without reading them."""
    return records.first(count) if isinstance(records, Rows) else list(islice(records, count))
