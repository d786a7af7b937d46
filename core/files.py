"""Writing that is never half done: everything goes to a sibling file first and is renamed when complete."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SctoolError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: str | Path, flush: bool = True) -> Iterator[Path]:
    """Yields a temporary sibling of `path`; renames it onto `path` on success, removes it on failure.

    Without `flush` the disk is not waited for, which for many small files takes longer than making them; what a power
    failure may then lose must be found again by other means.
    Raises `SctoolError` when the disk is full or the folder cannot be written; `path` is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if flush:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()  # also: renaming onto a link to the same file leaves both


def _unwritable(path: Path, error: OSError) -> SctoolError:
    place = error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS)
    remedy = "choose another place" if place else "free some space or choose another folder"
    return SctoolError(
        f"cannot write {path}: {error.strerror or error}. Nothing was half-written; {remedy}, then run the same "
        "command again."
    )


def write_bytes(path: str | Path, data: bytes, flush: bool = True) -> None:
    """Writes `data` to `path` as a whole or not at all; see `replacing`."""
    with replacing(path, flush) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 `text` to `path` as a whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON to `path` as a whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' `save_file`, with its own error for a full disk as the `OSError` that is explained here."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling folder of `path`; on success it replaces `path` as a whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        previous = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
