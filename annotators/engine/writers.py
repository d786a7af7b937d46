"""How the images and maps of a job are written: as files of a folder, or as members of a shard."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any, Protocol

from ...core.data.records import Blob, FileBlob, Record, split_name
from ...core.errors import SctoolError
from ...core.files import replacing, write_bytes
from .job import Job
from .maps import ImageMaps


class Writer(Protocol):
    """Writes finished images in order. `files` are the paths and sizes of the written files, complete after exit."""

    files: dict[str, int]

    def __enter__(self) -> Writer: ...
    def __exit__(self, *failure: Any) -> None: ...
    def add(
        self, record: Record, path: str, data: bytes, output: ImageMaps, earlier_maps: dict[str, bytes]
    ) -> dict[str, Any]:
        """Writes one image and its maps. Returns its row of metadata.

        data: the source image file. earlier_maps: PNG files of maps that the set already has.
        """
        ...


def _metadata_row(record: Record, name: str, output: ImageMaps) -> dict[str, Any]:
    """Columns of both layouts: the record's own columns, then how its maps were made, as JSON text."""
    columns = {k: v for k, v in record.meta.items() if not k.endswith("_file_name") and k not in record.maps}
    own = {"file_name": name, "text": record.text}
    row: dict[str, Any] = own | _label(record) | columns | own
    if record.split is not None:
        row.setdefault("split", record.split)
    row["conditions"] = json.dumps(_conditions(record, output), sort_keys=True)
    return row


def _label(record: Record) -> dict[str, str]:
    """The class of an image in a class folder, which the written set would lose: training may caption by it."""
    return {} if record.label is None or {"class", "label"} & record.meta.keys() else {"label": record.label}


def _conditions(record: Record, output: ImageMaps) -> dict[str, Any]:
    """How all maps of the image were made: the new ones, and those that an earlier run made."""
    noted = record.meta.get("conditions", {})
    if isinstance(noted, str):
        try:
            noted = json.loads(noted)
        except ValueError:
            noted = {}
    earlier = {cond: params for cond, params in noted.items() if cond in record.maps} if isinstance(noted, dict) else {}
    return {**earlier, **output.conditions}


class FolderWriter:
    """Images under their own names (hard links where possible), maps under `conditions/NAME/`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.files: dict[str, int] = {}

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(self, *failure: Any) -> None: ...

    def _write(self, name: str, data: bytes) -> None:
        write_bytes(self.job.out / name, data, flush=False)  # the marker holds its size
        self.files[name] = len(data)

    def add(
        self, record: Record, path: str, data: bytes, output: ImageMaps, earlier_maps: dict[str, bytes]
    ) -> dict[str, Any]:
        """As in the protocol."""
        base = split_folder(path) if self.job.merged else ""
        map_paths = {cond: _map_path(base, cond, path) for cond in output.maps}
        for cond, png in output.maps.items():
            self._write(map_paths[cond], png)
        if not self.job.merged:
            return {"key": record.key, **_metadata_row(record, path, output)}
        if output.image is not None:
            path = path if path.endswith(".png") else f"{path.rpartition('.')[0]}.png"
            self._write(path, output.image)
        elif not hard_link(record.image, self.job.out / path):
            self._write(path, data)
        else:
            self.files[path] = len(data)
        for cond, png in earlier_maps.items():
            map_paths[cond] = _map_path(base, cond, path)
            self._write(map_paths[cond], png)
        first = self.job.annotators[0].name
        columns = {f"{cond}_file_name": map_path for cond, map_path in map_paths.items()}
        return _metadata_row(record, path, output) | {"conditioning_image_file_name": map_paths[first]} | columns


def _map_path(base: str, cond: str, path: str) -> str:
    return f"{base}conditions/{cond}/{path.removeprefix(base).rpartition('.')[0]}.png"


def split_folder(path: str) -> str:
    """`train/` for a path inside a split's folder, which has its own metadata.jsonl as `datasets` expects; else ""."""
    first, slash, _ = path.partition("/")
    return f"{first}/" if slash and split_name(first) else ""


class ShardWriter:
    """A shard under its own name: KEY.jpg, .txt, .json and KEY.NAME.png, every field for every sample.

    In the maps layout one shard per condition, `conditions/NAME/00000.tar`. Times and owners are fixed, so that the
    same images give the same bytes.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.files: dict[str, int] = {}
        conds = [annotator.name for annotator in job.annotators]
        self.tar_names = (
            dict.fromkeys(["", *conds], f"{job.name}.tar")
            if job.merged
            else {cond: f"conditions/{cond}/{job.name.replace('/', '-')}.tar" for cond in conds}
        )
        """The tar of each condition; "" stands for the image, its caption and its metadata."""

    def __enter__(self) -> ShardWriter:
        self.stack = contextlib.ExitStack()
        self.tars: dict[str, tarfile.TarFile] = {}
        with contextlib.ExitStack() as opening:
            for name in dict.fromkeys(self.tar_names.values()):
                path = opening.enter_context(replacing(self.job.out / name))
                self.tars[name] = opening.enter_context(tarfile.open(path, "w", format=tarfile.PAX_FORMAT))
            self.stack = opening.pop_all()
        return self

    def __exit__(self, *failure: Any) -> None:
        self.stack.__exit__(*failure)
        if failure[0] is None:
            self.files = {name: os.path.getsize(self.job.out / name) for name in self.tars}

    def _add_member(self, cond: str, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self.tars[self.tar_names[cond]].addfile(info, io.BytesIO(data))

    def add(
        self, record: Record, path: str, data: bytes, output: ImageMaps, earlier_maps: dict[str, bytes]
    ) -> dict[str, Any]:
        """As in the protocol."""
        conditions = _conditions(record, output)
        if self.job.merged:
            # Field names must be the same in all samples, so only PNG members and resized sets get a new image file.
            resized = self.job.size.kind != "none"
            suffix = ".png" if resized else os.path.splitext(path)[1].lower().replace(".jpeg", ".jpg")
            image = output.image if suffix == ".png" and output.image is not None else data
            self._add_member("", f"{record.key}{suffix}", image)
            self._add_member("", f"{record.key}.txt", (record.text or "").encode())
            meta = {**record.meta, "width": output.width, "height": output.height, "conditions": conditions}
            self._add_member("", f"{record.key}.json", json.dumps(meta, sort_keys=True, ensure_ascii=False).encode())
            for cond, png in earlier_maps.items():
                self._add_member("", f"{record.key}.{cond}.png", png)
        for cond, png in output.maps.items():
            self._add_member(cond, f"{record.key}.{cond}.png", png)
        return {"key": record.key, "conditions": json.dumps(conditions, sort_keys=True)}


def hard_link(source: Blob, target: Path) -> bool:
    """Makes `target` a hard link to the file of `source`. Returns False if that is not possible."""
    if not isinstance(source, FileBlob):
        return False
    try:
        with replacing(target, flush=False) as temporary:
            os.link(os.path.realpath(source.path), temporary)
    except SctoolError:
        return False
    return True
