"""Reads single rows of prepared shards at their offsets. Nothing of a shard is kept in memory but its header."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from ...devices import torch_dtype
from ...errors import SctoolError
from .layout import AGAIN, FIXED, FORMAT, PER_CONDITION, Manifest, ShardInfo

OPEN_SHARDS = 64
"""Shards whose files a process keeps open."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}


class ShardReader:
    """One shard, open. Raises `SctoolError` where its files are missing, cut off or of another preparation."""

    def __init__(self, folder: Path, info: ShardInfo, manifest: Manifest) -> None:
        self.info, self.conds = info, tuple(manifest.conditions)
        self.latent, self.dtype = manifest.latent, torch_dtype(manifest.dtype)
        self._tar = _Opened(folder / info.tar, info.tar_bytes)
        self._index = _Opened(folder / info.index, info.index_bytes)
        self._start, header = self._header()
        metadata = header.pop("__metadata__", {})
        rows, width = self._shape(header)
        matching = metadata.get("format") == FORMAT and metadata.get("tar_bytes") == str(info.tar_bytes)
        if not matching or rows != sum(info.rows.values()) or width != FIXED + PER_CONDITION * len(self.conds):
            raise self._index.fault("does not belong to its tar")
        self._entry = width * 8
        self.labels: list[str] = json.loads(metadata.get("labels", "[]"))
        self._text = {name: _rows_of(entry) for name, entry in header.items() if name != "index"}

    def _header(self) -> tuple[int, dict[str, Any]]:
        length = int.from_bytes(self._index.read(0, 8), "little")
        if length > self.info.index_bytes:
            raise self._index.fault("has a damaged header")
        try:
            return 8 + length, json.loads(self._index.read(8, length))
        except ValueError as error:
            raise self._index.fault("has a damaged header") from error

    def _shape(self, header: dict[str, Any]) -> tuple[int, int]:
        try:
            rows, width = header["index"]["shape"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._index.fault("has a damaged header") from error
        return rows, width

    def entry(self, row: int) -> tuple[int, ...]:
        """The numbers of the index for a row: see `FIXED` and `PER_CONDITION`."""
        return struct.unpack(f"<{self._entry // 8}q", self._index.read(self._start + row * self._entry, self._entry))

    def latents(self, entry: tuple[int, ...]) -> Tensor:
        """Mean and standard deviation, (2, C, h, w) in the stored precision."""
        count = 2 * int(np.prod(self.latent))
        data = self._tar.read(entry[0], count * self.dtype.itemsize)
        return torch.frombuffer(data, dtype=self.dtype).view(2, *self.latent)

    def meta(self, entry: tuple[int, ...]) -> dict[str, Any]:
        """Key, caption, label and origin of a row."""
        try:
            return json.loads(self._tar.read(entry[1], entry[2]))
        except ValueError as error:
            raise self._tar.fault("was changed after it was prepared") from error

    def text(self, entry: tuple[int, ...]) -> dict[str, Tensor]:
        """The conditioning rows of a row's caption, in the stored precision; {} where only labels are stored."""
        rows = {}
        for name, (begin, shape, dtype, size) in self._text.items():
            data = self._index.read(self._start + begin + entry[3] * size, size)
            rows[name] = torch.frombuffer(data, dtype=dtype).view(shape)
        return rows

    def map_place(self, entry: tuple[int, ...], cond: str, hint: bool = False) -> tuple[int, int]:
        """Offset and size in the tar of the map of a condition, or of its hint."""
        column = FIXED + PER_CONDITION * self.conds.index(cond) + (2 if hint else 0)
        return entry[column], entry[column + 1]

    def hint(self, entry: tuple[int, ...], cond: str) -> np.ndarray:
        """The hint, or the map that it is rendered from, as uint8 (H, W) or (H, W, 3) RGB."""
        data = self._tar.read(*self.map_place(entry, cond, hint=True))
        pixels = one_bit(data)
        if pixels is None:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise self._tar.fault("was changed after it was prepared")
        return pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., ::-1])

    def close(self) -> None:
        """Closes both files."""
        self._tar.close()
        self._index.close()


class Shards:
    """The shards of a prepared folder by number, of which the last used are open. Picklable, and safe after a fork."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def __getitem__(self, number: int) -> ShardReader:
        reader = self._open.get(number)
        if reader is None:
            reader = self._open[number] = ShardReader(self.folder, self.manifest.shards[number], self.manifest)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        else:
            self._open.move_to_end(number)
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


class _Opened:
    """A file that is read at offsets."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self.fault(f"cannot be read ({error.strerror})") from error
        if (found := os.fstat(self._file).st_size) != size:
            self.close()
            raise self.fault(wrong_size(found, size))

    def read(self, offset: int, size: int) -> bytearray:
        """Exactly `size` bytes."""
        data = bytearray(size)
        try:
            count = os.preadv(self._file, [data], offset)
        except OSError as error:
            raise self.fault(f"cannot be read ({error.strerror})") from error
        if count != size:
            raise self.fault("was cut off while it was read")
        return data

    def fault(self, what: str) -> SctoolError:
        """The error that this file is faulty."""
        return SctoolError(f"{self.path} {what}. {AGAIN}")

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def one_bit(png: bytearray) -> np.ndarray | None:
    """The pixels (H, W), 0 or 255, of a PNG as `encode_png` writes those of 1 bit: three times as fast as OpenCV.

    None for any other PNG: one of more bits, of several data chunks, or with filtered rows.
    """
    if png[12:16] != b"IHDR" or png[24:29] != b"\1\0\0\0\0" or png[37:41] != b"IDAT":
        return None
    width, height, length = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20, 33))
    if png[45 + length + 4 : 45 + length + 8] != b"IEND":
        return None
    try:
        rows = np.frombuffer(zlib.decompress(memoryview(png)[41 : 41 + length]), np.uint8)
    except zlib.error:
        return None
    if rows.size != height * (1 + -(-width // 8)) or (rows := rows.reshape(height, -1))[:, 0].any():
        return None
    return np.unpackbits(rows[:, 1:], axis=1, count=width) * np.uint8(255)


def wrong_size(found: int, expected: int) -> str:
    """What is wrong with a file of another size than the manifest says."""
    word = "is cut off" if found < expected else "was changed after it was prepared"
    return f"{word}: it has {found:,} bytes, not {expected:,}"


def _rows_of(entry: Mapping[str, Any]) -> tuple[int, tuple[int, ...], torch.dtype, int]:
    """Where the rows of a tensor begin, their shape, precision and size in bytes."""
    shape, dtype = tuple(entry["shape"][1:]), DTYPES[entry["dtype"]]
    return entry["data_offsets"][0], shape, dtype, int(np.prod(shape)) * dtype.itemsize
