"""Where a prepared row's image came from, as JSON, so that evaluation can read the original pixels again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..photos import CropBlob
from ..records import Blob, BytesBlob, FileBlob, TarBlob


def origin(blob: Blob, root: Path | None) -> dict[str, Any] | None:
    """The place of an image file, its path below `root` where it is there; None for bytes that are in no file."""
    match blob:
        case TarBlob():
            place = {"member": blob.member, "offset": blob.offset, "size": blob.size}
            return {"tar": _below(blob.tar, root), **place}
        case CropBlob():
            return {"crop": _below(blob.path, root), "box": list(blob.box)}
        case FileBlob():
            return {"file": _below(blob.path, root), "label": blob.label}
        case _:
            return None


def blob_of(place: dict[str, Any] | None, root: Path | None, key: str) -> Blob:
    """The image of `origin`; reading it raises `OSError` when it is gone."""
    match place:
        case {"tar": tar, "member": member, "offset": offset, "size": size}:
            return TarBlob(_full(tar, root), member, offset, size)
        case {"crop": path, "box": box}:
            return CropBlob(_full(path, root), tuple(box))
        case {"file": path, "label": label}:
            return FileBlob(_full(path, root), label)
        case _:
            return BytesBlob(b"", key)


def _below(path: str | Path, root: Path | None) -> str:
    full = os.path.abspath(path)
    return os.path.relpath(full, root) if root is not None and Path(full).is_relative_to(root) else full


def _full(path: str, root: Path | None) -> str:
    return path if root is None else str(root / path)
