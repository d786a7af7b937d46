"""One deep look through a set: everything is decoded once, in several processes, and every fault is named at once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from .images import MIN_SIDE, BadImage, decode_map, decode_rgb, picture_size, too_small
from .records import Blob, Fault, Record, Source, without_duplicates

CHUNK = 128
"""Records that a process takes at a time."""

IN_PROCESS = 1024
"""Sets of up to this many records are looked through without starting processes."""

ASPECT = 0.02
"""How much a map's proportions may differ from its picture's; beyond that the two cannot be aligned."""


@dataclass(frozen=True)
class _Look:
    """Some records and what is asked of them; picklable."""

    records: tuple[Record, ...]
    conds: tuple[str, ...]
    need_text: bool
    deep: bool
    size: int | None


def check(
    source: Source,
    *,
    conds: Iterable[str] = (),
    need_text: bool = True,
    deep: bool = True,
    size: int | None = None,
    jobs: int | None = None,
) -> list[Fault]:
    """Every fault of a set, those found while listing first, the others in the set's order.

    conds: conditions that every picture must have a map of. need_text: captions are needed. deep: decode all pixels
    instead of headers only. size: training size in pixels, at which a ready-made square map fits any picture.
    jobs: processes; all cores for large sets when not given.
    """
    faults = list(source.faults)
    without_duplicates(source.records, faults)  # sets made in code; opened ones have been through it
    records = tuple(source.records)
    looks = [_Look(records[i : i + CHUNK], tuple(conds), need_text, deep, size) for i in range(0, len(records), CHUNK)]
    jobs = jobs or (os.cpu_count() or 1 if len(records) > IN_PROCESS else 1)
    if jobs == 1:
        found = map(_look, looks)
        return faults + [fault for some in found for fault in some]
    context = multiprocessing.get_context("spawn")  # forking a process that has used torch's threads may hang
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return faults + [fault for some in pool.map(_look, looks) for fault in some]


def _look(look: _Look) -> list[Fault]:
    faults: list[Fault] = []
    for record in look.records:
        if look.need_text and not (record.text and record.text.strip()):
            faults.append(Fault(record.image.name, "has no caption"))
        shape = _shape(record.image, look.deep, faults, decode_rgb)
        if shape is not None and min(shape) < MIN_SIDE:
            faults.append(Fault(record.image.name, too_small(*shape)))
        for cond in look.conds:
            blob = record.map_for(cond, alone=len(look.conds) == 1)
            if blob is None:
                faults.append(Fault(record.image.name, f"has no {cond} map"))
                continue
            found = _shape(blob, look.deep, faults, decode_map)
            if shape is not None and found is not None and not _fits(found, shape, look.size):
                size = f"{found[1]}x{found[0]} for a picture of {shape[1]}x{shape[0]}"
                faults.append(Fault(blob.name, f"the {cond} map has other proportions than its picture: {size}"))
    return faults


def _shape(blob: Blob, deep: bool, faults: list[Fault], decode: Callable[[Blob], np.ndarray]) -> tuple[int, int] | None:
    """(H,W) of a picture or map, or None and a fault."""
    try:
        if not deep:
            return picture_size(blob)
        pixels = decode(blob)
    except BadImage as error:
        faults.append(Fault(blob.name, error.reason))
        return None
    return pixels.shape[0], pixels.shape[1]


def _fits(map: tuple[int, int], image: tuple[int, int], size: int | None) -> bool:
    """Whether a map (H,W) can be laid over its picture: same proportions up to rounding, or a ready-made square."""
    if size is not None and map == (size, size):
        return True
    scale = (map[0] * map[1] / (image[0] * image[1])) ** 0.5
    off = max(abs(map[0] - image[0] * scale), abs(map[1] - image[1] * scale))
    return off <= 1 or off <= ASPECT * max(map)
