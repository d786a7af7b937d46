"""Writes one prepared shard: rows in the source's order into the tar, then the index that sorts them by part.

Times and owners are fixed and names follow from the row's number, so that the same rows give the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...devices import torch_dtype
from ...errors import SctoolError
from ...files import replacing
from .layout import FORMAT, PARTS, PER_CONDITION, index_name

SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}

Images = dict[str, bytes]
"""PNG files by condition."""


class ShardWriter:
    """Context manager: both files appear when it is left without an error, and nothing of them otherwise.

    `files` are their sizes then, `rows` the number of rows by part.
    """

    def __init__(self, folder: Path, name: str, conds: Sequence[str], dtype: str) -> None:
        self.folder, self.name, self.conds, self.dtype = folder, name, tuple(conds), torch_dtype(dtype)
        self.files: dict[str, int] = {}
        self._rows: list[tuple[int, list[int]]] = []
        self._stem = name.replace("/", "-").replace(".", "-")

    def __enter__(self) -> ShardWriter:
        with ExitStack() as stack:
            self._index = stack.enter_context(replacing(self.folder / index_name(self.name)))
            path = stack.enter_context(replacing(self.folder / f"{self.name}.tar"))
            self._tar = stack.enter_context(tarfile.open(path, "w", format=tarfile.PAX_FORMAT))
            self._stack = stack.pop_all()
        return self

    @property
    def rows(self) -> dict[str, int]:
        """Rows by part; parts without rows are left out."""
        counts = {part: sum(number == PARTS.index(part) for number, _ in self._rows) for part in PARTS}
        return {part: count for part, count in counts.items() if count}

    def add(
        self, part: str, meta: dict[str, Any], latents: Tensor, maps: Images, hints: Images, caption: int
    ) -> None:  # fmt: skip
        """One row: `latents` (2, C, h, w) are mean and standard deviation in the shard's precision, `caption` the
        number of its conditioning row; `hints` has only the conditions whose hint is not their map.
        """
        key = f"{self._stem}-{len(self._rows):06d}"
        header, values = _npy(latents)
        columns = [self._member(f"{key}.latents.npy", header + values) + len(header)]
        places = []
        for cond in self.conds:
            place = [self._member(f"{key}.{cond}.png", maps[cond]), len(maps[cond])]
            hint = hints.get(cond)
            places += place
            places += place if hint is None else [self._member(f"{key}.{cond}.hint.png", hint), len(hint)]
        text = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
        columns += [self._member(f"{key}.json", text), len(text), caption, *places]
        self._rows.append((PARTS.index(part), columns))

    def _member(self, name: str, data: bytes) -> int:
        """Appends a file; returns the offset of its bytes in the tar."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        return self._tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def finish(
        self, text: dict[str, tuple[int, ...]], batches: Iterable[dict[str, Tensor]], captions: int,
        labels: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Ends the tar and writes the index. Call once, last.

        text: the shape of each of the conditioning rows; batches: `captions` such rows, in batches. labels: what the
        caption numbers stand for, where no rows are stored.
        """
        self._tar.close()
        places = [columns for _, columns in sorted(self._rows, key=lambda row: row[0])]
        width = len(places[0]) if places else 4 + PER_CONDITION * len(self.conds)
        index = torch.tensor(places, dtype=torch.int64).reshape(len(places), width)
        metadata = {
            "format": FORMAT,
            "labels": json.dumps(list(labels), ensure_ascii=False),
            "rows": json.dumps(self.rows),
            "tar_bytes": str(os.path.getsize(self._tar.name)),  # pyright: ignore
        }
        shapes = {name: (captions, *shape) for name, shape in text.items()}
        _save_streamed(self._index, metadata, index, shapes, self.dtype, batches)

    def __exit__(self, *failure: Any) -> None:
        self._stack.__exit__(*failure)
        if failure[0] is None:
            names = (f"{self.name}.tar", index_name(self.name))
            self.files = {name: os.path.getsize(self.folder / name) for name in names}


def stored(values: Tensor, dtype: str, what: str) -> Tensor:
    """`values` in a stored precision. Raises `SctoolError` for numbers that it cannot hold."""
    result = values.to(torch_dtype(dtype))
    if not torch.isfinite(result).all():
        fault = f"do not fit into {dtype}; use --dtype bf16" if torch.isfinite(values).all() else "are not finite"
        raise SctoolError(f"{what} {fault}.")
    return result


def _npy(values: Tensor) -> tuple[bytes, bytes]:
    """Header and bytes of an .npy file. numpy has no bfloat16: its bits are written as uint16."""
    array = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).contiguous().numpy()
    buffer = io.BytesIO()
    fields = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue(), array.tobytes()


def _save_streamed(
    path: Path, metadata: dict[str, str], index: Tensor, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype,
    batches: Iterable[dict[str, Tensor]],
) -> None:  # fmt: skip
    """A safetensors file whose text rows are never all in memory.

    Such a file is the length of its header (8 bytes, little-endian), the header as JSON padded with spaces to a
    multiple of 8 bytes, then the tensors (github.com/huggingface/safetensors, "Format").
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape, kind in [("index", tuple(index.shape), torch.int64), *((n, s, dtype) for n, s in shapes.items())]:
        begin, end = end, end + int(np.prod(shape)) * kind.itemsize
        header[name] = {"dtype": SAFETENSORS[kind], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + index.numpy().tobytes())
        start = 8 + len(text)
        written = dict.fromkeys(shapes, 0)
        for batch in batches:
            for name in shapes:
                rows = batch[name].to(dtype).contiguous()
                file.seek(start + header[name]["data_offsets"][0] + written[name])
                data = rows.view(torch.uint8).numpy().tobytes()
                file.write(data)
                written[name] += len(data)
        if any(count != header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
               for name, count in written.items()):  # fmt: skip
            raise AssertionError(f"{path.name}: the rows of its text do not match its header")
