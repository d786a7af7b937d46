"""Tensors on disk, keyed by the content that they were computed from: written in chunks, read row by row."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..files import replacing, save_tensors, write_text
from .images import BadImage
from .records import Blob

CHUNK = 256
"""Maximum number of rows in a file. A killed run loses at most one chunk of work."""

FORMAT = "sctool-rows-1"


def cache_folder(cache: str | Path | None = None) -> Path:
    """`cache` if given, else $SCTOOL_CACHE, else ~/.cache/sctool."""
    return Path(cache or os.environ.get("SCTOOL_CACHE") or Path.home() / ".cache" / "sctool").expanduser()


def content_key(*parts: object) -> str:
    """SHA-256 over the parts, in hex."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


class TensorCache:
    """Rows of named tensors by key, in safetensors files of up to `CHUNK` rows whose metadata lists the keys.

    A file is named after its keys and renamed into place when complete, so several processes may write the same rows.
    A file that is cut off, or whose rows do not match its keys, counts as absent and is written again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, dict[str, torch.Tensor]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Lists the folder again."""
        for path in sorted(self.folder.glob("*.safetensors")):
            for row, key in enumerate(_keys(path)):
                self.places.setdefault(key, (path, row))

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without a row, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self.places]

    def write(self, keys: Sequence[str], tensors: dict[str, torch.Tensor]) -> None:
        """Stores tensors whose first dimension is over `keys`. Raises `SctoolError` when the disk is full."""
        path = self.folder / f"{content_key(*keys)[:40]}.safetensors"
        metadata = {"format": FORMAT, "keys": json.dumps(list(keys))}
        with replacing(path) as temporary:
            save_tensors({name: value.cpu() for name, value in tensors.items()}, temporary, metadata)
        self._open.pop(path, None)
        self.places.update({key: (path, row) for row, key in enumerate(keys)})

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The row of a key: views of a memory-mapped file."""
        path, row = self.places[key]
        chunk = self._open.get(path)
        if chunk is None:
            chunk = self._open[path] = load_file(path)
        return {name: value[row] for name, value in chunk.items()}

    def bytes(self, keys: Iterable[str]) -> int:
        """Size in bytes of the files that hold these keys."""
        return sum(path.stat().st_size for path in {self.places[key][0] for key in keys if key in self.places})

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}  # a worker process maps the files itself


def _keys(path: Path) -> list[str]:
    """The keys of a file's rows; none when it is damaged or not a cache file."""
    try:
        with safe_open(path, framework="pt") as file:  # checks the header against the file's length
            metadata = file.metadata() or {}
            names = list(file.keys())
            keys = json.loads(metadata.get("keys", "[]"))
            rows = {file.get_slice(name).get_shape()[0] for name in names}
    except (SafetensorError, OSError, ValueError, IndexError):
        return []
    return keys if metadata.get("format") == FORMAT and rows == {len(keys)} else []


class Memo:
    """Facts about files that have not changed since (path, size, time): digests, and whether maps decode."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = _read_json(path)
        self.new: dict[str, str] = {}

    def digest(self, blob: Blob) -> str:
        """SHA-256 of the blob's bytes. Raises `BadImage` when they cannot be read."""

        def read() -> str:
            try:
                return hashlib.sha256(blob.read()).hexdigest()
            except OSError as error:
                raise BadImage(f"cannot be read: {error.strerror or error}", blob.name) from error

        return self.recall("digest", blob, read)

    def recall(self, what: str, blob: Blob, compute: Callable[[], str]) -> str:
        """What `compute()` returned for this blob; called again only when the blob may have changed."""
        stamp = blob.stamp()
        if stamp is None:
            return compute()
        key = content_key(what, stamp)[:32]
        value = self.known.get(key) or self.new.get(key)
        if value is None:
            value = self.new[key] = compute()
        return value

    def save(self) -> None:
        """Adds the new facts to the file, without losing those of other processes."""
        if self.new:
            self.known = {**_read_json(self.path), **self.known, **self.new}
            self.new = {}
            write_text(self.path, json.dumps(self.known))


def _read_json(path: Path) -> dict[str, str]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
