"""How a unit's pictures and maps are written: as files of a folder, or as members of a shard."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...core.data.records import Blob, FileBlob, Record, split_name
from ...core.errors import SctoolError
from ...core.files import replacing, write_bytes
from .maps import Made

if TYPE_CHECKING:
    from .jobs import Job


class Writer(Protocol):
    """Takes finished pictures in order; `files` are the sizes of what it wrote, by path; `count` is the caller's."""

    files: dict[str, int]
    count: int

    def __enter__(self) -> Writer: ...
    def __exit__(self, *failure: Any) -> None: ...
    def add(self, record: Record, name: str, data: bytes, made: Made, carried: dict[str, bytes]) -> dict[str, Any]:
        """Writes one picture's files; gives its row of metadata."""
        ...


def _row(record: Record, name: str, made: Made) -> dict[str, Any]:
    """Columns that both layouts keep: the picture's own, then how its maps were made, as one JSON text."""
    kept = {k: v for k, v in record.meta.items() if not k.endswith("_file_name") and k not in record.maps}
    row: dict[str, Any] = {"file_name": name, "text": record.text} | kept | {"file_name": name, "text": record.text}
    if record.split is not None:
        row.setdefault("split", record.split)
    row["conditions"] = json.dumps(_conditions(record, made), sort_keys=True)
    return row


def _conditions(record: Record, made: Made) -> dict[str, Any]:
    """How all maps of the row were made: those made now, and those of an earlier run that are carried over."""
    earlier = record.meta.get("conditions", {})
    if isinstance(earlier, str):
        try:
            earlier = json.loads(earlier)
        except ValueError:
            earlier = {}
    kept = {cond: how for cond, how in earlier.items() if cond in record.maps} if isinstance(earlier, dict) else {}
    return {**kept, **made.conditions}


class FolderWriter:
    """Pictures under their own names (hard links where possible), maps under `conditions/NAME/`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.files: dict[str, int] = {}
        self.count = 0

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(self, *failure: Any) -> None: ...

    def _write(self, name: str, data: bytes) -> None:
        write_bytes(self.job.out / name, data, flush=False)  # the marker holds its size
        self.files[name] = len(data)

    def add(self, record: Record, name: str, data: bytes, made: Made, carried: dict[str, bytes]) -> dict[str, Any]:
        """As in the protocol."""
        base = split_folder(name) if self.job.merged else ""
        maps = {cond: _map_name(base, cond, name) for cond in made.maps}
        for cond, png in made.maps.items():
            self._write(maps[cond], png)
        if not self.job.merged:
            return {"key": record.key, **_row(record, name, made)}
        if made.image is not None:
            name = name if name.endswith(".png") else f"{name.rpartition('.')[0]}.png"
            self._write(name, made.image)
        elif not link(record.image, self.job.out / name):
            self._write(name, data)
        else:
            self.files[name] = len(data)
        for cond, png in carried.items():
            maps[cond] = _map_name(base, cond, name)
            self._write(maps[cond], png)
        row = _row(record, name, made)
        first = self.job.annotators[0].name
        return row | {"conditioning_image_file_name": maps[first]} | {f"{c}_file_name": m for c, m in maps.items()}


def _map_name(base: str, cond: str, name: str) -> str:
    return f"{base}conditions/{cond}/{name.removeprefix(base).rpartition('.')[0]}.png"


def split_folder(name: str) -> str:
    """`train/` where a path begins with a split's folder, which holds its own metadata as `datasets` wants it."""
    first, slash, _ = name.partition("/")
    return f"{first}/" if slash and split_name(first) else ""


class ShardWriter:
    """A shard under its own name: KEY.jpg, .txt, .json and KEY.NAME.png, every field for every sample.

    In the maps layout one shard a condition, `conditions/NAME/00000.tar`. Times and owners are fixed, so the same
    pictures give the same bytes.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.files: dict[str, int] = {}
        self.count = 0
        conds = [annotator.name for annotator in job.annotators]
        self.names = (
            dict.fromkeys(["", *conds], f"{job.unit}.tar")
            if job.merged
            else {cond: f"conditions/{cond}/{job.unit.replace('/', '-')}.tar" for cond in conds}
        )

    def __enter__(self) -> ShardWriter:
        self.stack = contextlib.ExitStack()
        self.tars: dict[str, tarfile.TarFile] = {}
        with contextlib.ExitStack() as opening:
            for name in dict.fromkeys(self.names.values()):
                path = opening.enter_context(replacing(self.job.out / name))
                self.tars[name] = opening.enter_context(tarfile.open(path, "w", format=tarfile.PAX_FORMAT))
            self.stack = opening.pop_all()
        return self

    def __exit__(self, *failure: Any) -> None:
        self.stack.__exit__(*failure)
        if failure[0] is None:
            self.files = {name: os.path.getsize(self.job.out / name) for name in self.tars}

    def _put(self, cond: str, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self.tars[self.names[cond]].addfile(info, io.BytesIO(data))

    def add(self, record: Record, name: str, data: bytes, made: Made, carried: dict[str, bytes]) -> dict[str, Any]:
        """As in the protocol."""
        if self.job.merged:
            # Columns must not change from sample to sample: only a PNG, or a set that is all resized, is written anew.
            resized = self.job.size.kind != "none"
            suffix = ".png" if resized else os.path.splitext(name)[1].lower().replace(".jpeg", ".jpg")
            image = made.image if suffix == ".png" and made.image is not None else data
            self._put("", f"{record.key}{suffix}", image)
            self._put("", f"{record.key}.txt", (record.text or "").encode())
            meta = {**record.meta, "width": made.width, "height": made.height, "conditions": _conditions(record, made)}
            self._put("", f"{record.key}.json", json.dumps(meta, sort_keys=True, ensure_ascii=False).encode())
            for cond, png in carried.items():
                self._put("", f"{record.key}.{cond}.png", png)
        for cond, png in made.maps.items():
            self._put(cond, f"{record.key}.{cond}.png", png)
        return {"key": record.key, "conditions": json.dumps(_conditions(record, made), sort_keys=True)}


def link(source: Blob, target: Path) -> bool:
    """Makes `target` a hard link to the file that `source` is; False where that is not possible."""
    if not isinstance(source, FileBlob):
        return False
    try:
        with replacing(target, flush=False) as temporary:
            os.link(os.path.realpath(source.path), temporary)
    except SctoolError:
        return False
    return True
