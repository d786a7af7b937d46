"""What a prepared folder consists of: names, the manifest, and the order of a shard's rows. Imports no torch.

    prepared.json          the manifest: what the shards were made with, and how many rows each has
    NAME.tar               a webdataset shard: N.latents.npy, N.COND.png, N.json for every row
    NAME.index.safetensors where every row lies in the tar, and the conditioning rows of its distinct captions
    NAME_stats.json        what the shard was made from, and what could not be read

A shard's rows are in the order mirrored, train, validation, test, so that every part of a set is one range of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import SctoolError, UsageError
from ...files import write_json

FORMAT = "sctool-prepared-1"
MANIFEST = "prepared.json"
SETTINGS = ".sctool/settings.json"
PARTS = ("mirrored", "train", "validation", "test")
"""The parts of a shard, in the order of its rows."""
FIXED = 4
"""Columns of the index before those of the conditions: latents' offset, JSON's offset and size, caption number."""
PER_CONDITION = 4
"""Columns of a condition: offset and size of its map, and of the hint that is made of it."""
AGAIN = "Run the same sctool prepare again: what is whole is kept."


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its rows by part, and the bytes of its tar and its index."""

    name: str
    rows: dict[str, int]
    tar_bytes: int
    index_bytes: int
    made_from: str = ""
    """Hash of what it was made from."""
    source_stamp: str | None = None
    """Path, size and time of the shard that it was made from; None for images of a folder."""

    @property
    def tar(self) -> str:
        """The name of the tar in the folder."""
        return f"{self.name}.tar"

    @property
    def index(self) -> str:
        """The name of the index in the folder."""
        return index_name(self.name)

    def start(self, part: str) -> int:
        """The first row of a part."""
        return sum(self.rows.get(earlier, 0) for earlier in PARTS[: PARTS.index(part)])


@dataclass(frozen=True)
class Manifest:
    """What the shards were made with, and how many rows each has; its size grows with the number of shards only."""

    source: str
    root: str | None
    """The folder that the rows' origins are in."""
    base: str
    autoencoder: str
    """Hash of the autoencoder's weights."""
    conditioner: tuple[str, ...]
    """Hash of the conditioning encoder, and of what else decides its rows."""
    precisions: dict[str, str]
    """Precision in which the two encoders ran."""
    size: int
    latent: tuple[int, int, int]
    dtype: str
    """fp32, bf16 or fp16: the precision of stored latents and text rows."""
    flip: bool
    by_class: bool
    trigger: str
    caption: str
    conditions: dict[str, dict[str, Any]]
    """How the maps of each condition were made, as far as it is known."""
    labels: tuple[str, ...] = ()
    """All class labels, for bases that are conditioned on them."""
    error_db: dict[str, float] = field(default_factory=dict)
    """Error of the stored precision in dB below the signal, of latents and text; empty for fp32."""
    shards: tuple[ShardInfo, ...] = ()

    def count(self, *parts: str) -> int:
        """Rows of the named parts, in all shards."""
        return sum(shard.rows.get(part, 0) for shard in self.shards for part in parts)

    @property
    def bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(shard.tar_bytes + shard.index_bytes for shard in self.shards)

    @property
    def version(self) -> str:
        """Hash of all that the manifest says: it differs when anything was prepared anew."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the manifest, atomically: from now on the folder can be trained on."""
        write_json(folder / MANIFEST, {"format": FORMAT, **asdict(self)})


def index_name(shard: str) -> str:
    """The name of a shard's index."""
    return f"{shard}.index.safetensors"


def is_prepared(path: str | Path) -> bool:
    """Whether `path` is a prepared folder, finished or not."""
    folder = Path(path).expanduser()
    return (folder / MANIFEST).is_file() or _settings(folder).get("kind") == "prepared"


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a prepared folder. Raises `UsageError` where it is not finished, `SctoolError` if damaged."""
    folder = Path(path).expanduser()
    if not (folder / MANIFEST).is_file():
        done = sum(1 for _ in folder.rglob("*_stats.json"))
        raise UsageError(f"'{path}' is not finished: {done} shards are prepared and the manifest is missing. {AGAIN}")
    try:
        values = json.loads((folder / MANIFEST).read_text())
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        shards = tuple(ShardInfo(**shard) for shard in values.pop("shards"))
        return Manifest(**_tuples(values), shards=shards)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SctoolError(f"'{folder / MANIFEST}' cannot be read as {FORMAT} ({error}). {AGAIN}") from error


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _settings(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
