"""Every fault of a set in one pass: each image is decoded once, in several processes for large sets."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from .images import MIN_SIDE, BadImage, decode_map, decode_rgb, picture_size, too_small
from .prompts import Prompt, caption_of
from .records import Blob, Fault, Record, Source, without_duplicates

CHUNK = 128
"""Records that a process takes at a time."""

IN_PROCESS = 1024
"""Sets of up to this many records are checked without starting processes."""

ASPECT = 0.02
"""How much a map's proportions may differ from its image's; beyond that the two cannot be aligned."""


@dataclass(frozen=True)
class _Chunk:
    """Records to check and what to check; picklable."""

    records: tuple[Record, ...]
    conds: tuple[str, ...]
    prompt: Prompt | None
    deep: bool
    size: int | None


def check(
    source: Source,
    *,
    conds: Iterable[str] = (),
    prompt: Prompt | None = caption_of,
    deep: bool = True,
    size: int | None = None,
    jobs: int | None = None,
) -> list[Fault]:
    """Every fault of a set, those found while listing first, the others in the set's order.

    conds: conditions that every image must have a map of. prompt: the prompt of a record, "" being a fault; None if
    prompts are not needed. deep: decode all pixels, not only headers. size: training size in pixels, at which a square
    map fits any image. jobs: processes; by default all cores for large sets.
    """
    faults = list(source.faults)
    without_duplicates(source.records, faults)  # sets built in code; `open_source` has done it already
    records = tuple(source.records)
    chunks = [_Chunk(records[i : i + CHUNK], tuple(conds), prompt, deep, size) for i in range(0, len(records), CHUNK)]
    jobs = jobs or (os.cpu_count() or 1 if len(records) > IN_PROCESS else 1)
    if jobs == 1:
        return faults + [fault for chunk in chunks for fault in _check_chunk(chunk)]
    context = multiprocessing.get_context("spawn")  # forking a process that has used torch's threads may hang
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return faults + [fault for chunk_faults in pool.map(_check_chunk, chunks) for fault in chunk_faults]


def _check_chunk(chunk: _Chunk) -> list[Fault]:
    faults: list[Fault] = []
    for record in chunk.records:
        if chunk.prompt and not chunk.prompt(record).strip():
            faults.append(Fault(record.image.name, "has no caption"))
        shape = _shape(record.image, chunk.deep, faults, decode_rgb)
        if shape is not None and min(shape) < MIN_SIDE:
            faults.append(Fault(record.image.name, too_small(*shape)))
        for cond in chunk.conds:
            blob = record.map_for(cond, only=len(chunk.conds) == 1)
            if blob is None:
                faults.append(Fault(record.image.name, f"has no {cond} map"))
                continue
            map_shape = _shape(blob, chunk.deep, faults, decode_map)
            if shape is not None and map_shape is not None and not _fits(map_shape, shape, chunk.size):
                sizes = f"{map_shape[1]}x{map_shape[0]} for an image of {shape[1]}x{shape[0]}"
                faults.append(Fault(blob.name, f"the {cond} map and its image differ in proportions: {sizes}"))
    return faults


def _shape(blob: Blob, deep: bool, faults: list[Fault], decode: Callable[[Blob], np.ndarray]) -> tuple[int, int] | None:
    """(H,W) of an image or map; None, and a fault, when it cannot be read."""
    try:
        if not deep:
            return picture_size(blob)
        pixels = decode(blob)
    except BadImage as error:
        faults.append(Fault(blob.name, error.reason))
        return None
    return pixels.shape[0], pixels.shape[1]


def _fits(map: tuple[int, int], image: tuple[int, int], size: int | None) -> bool:
    """Whether a map (H,W) can be laid over its image: same proportions up to rounding, or a square of training size."""
    if size is not None and map == (size, size):
        return True
    scale = (map[0] * map[1] / (image[0] * image[1])) ** 0.5
    off = max(abs(map[0] - image[0] * scale), abs(map[1] - image[1] * scale))
    return off <= 1 or off <= ASPECT * max(map)
