"""Many small files: each appears whole or not at all, without waiting for the disk each time.

`core.files.write_bytes` flushes every file to the disk, which at 10 ms a file takes longer than making the map. What a
power failure may lose here is found again by its size, which the unit's marker holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.data.records import Blob, FileBlob
from ..core.errors import SctoolError


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling; renames it onto `path` on success, removes it on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # also: renaming onto a link to the same file leaves both


def write_small(path: Path, data: bytes) -> None:
    """Writes a small file. Raises `SctoolError` when the disk is full or the folder cannot be written."""
    try:
        with _appearing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise SctoolError(
            f"cannot write {path}: {error.strerror or error}. What is finished is kept; "
            "free some space or choose another folder, then run the same command again."
        ) from error


def link(source: Blob, target: Path) -> bool:
    """Makes `target` a hard link to the file that `source` is; False where that is not possible."""
    if not isinstance(source, FileBlob):
        return False
    try:
        with _appearing(target) as temporary:
            os.link(os.path.realpath(source.path), temporary)
    except OSError:
        return False
    return True
