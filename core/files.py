"""Atomic writing: every file is written under a temporary name beside its own and renamed when complete."""

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

    Without `flush` there is no fsync, which for many small files takes longer than computing them; a power failure may
    then lose the file or leave it empty.
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
            temporary.unlink()  # renaming onto a hard link of the same file leaves both names


def _unwritable(path: Path, error: OSError) -> SctoolError:
    place = error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS)
    remedy = "choose another folder" if place else "free some space or choose another folder"
    return SctoolError(
        f"cannot write {path}: {error.strerror or error}. No partial file was left; {remedy}, then run the same "
        "command again."
    )


def write_bytes(path: str | Path, data: bytes, flush: bool = True) -> None:
    """Writes `data` to `path` atomically; see `replacing`."""
    with replacing(path, flush) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file; equal tensors and metadata give equal bytes. Not atomic: see `replacing`.

    Raises `OSError` when it cannot be written; safetensors raises an error of its own for a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    if metadata and len(metadata) > 1:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata in a safetensors header, in place; safetensors writes them in random order.

    The header is its length (8 bytes, little-endian), then JSON padded with spaces to a multiple of 8 bytes.
    """
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise OSError(f"the header of {path.name} has {length} bytes, sorted {len(text)}")
        file.seek(8)
        file.write(text.ljust(length))


def require_space(folder: str | Path, needed: int, what: str, remedy: str) -> None:
    """Raises `SctoolError` if the disk of `folder`, which may not exist yet, has less than `needed` bytes free."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise SctoolError(f"{what} needs {human(needed)} in {folder}, and {human(free)} are free there. {remedy}")


def human(size: float) -> str:
    """A number of bytes for people: 123.4 MB, 1.53 TB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size / 1e6:.1f} MB"


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling folder of `path`; on success it replaces `path`."""
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
