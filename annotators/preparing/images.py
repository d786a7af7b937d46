"""What is made of an image before the autoencoder sees it: training pixels, and the maps that the data have."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ...core.data.conditions import condition
from ...core.data.images import MIN_SIDE, BadImage, Geometry, decode_map, decode_rgb, too_small
from ...core.data.records import Fault, Record
from ..base import Annotator
from ..color import enlarge
from ..engine.maps import encode_png

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Loaded:
    """An image at the training size, uint8 (size, size, 3), and its maps of the same sides."""

    record: Record
    pixels: np.ndarray
    maps: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def part(self) -> str:
        """The part of the shard that it belongs to."""
        return self.record.split if self.record.split in ("validation", "test") else "train"


def load(record: Record, size: int, conds: Sequence[str]) -> Loaded | Fault:
    """The image and those of its maps that the data have, or why it cannot be used."""
    geometry = Geometry(size)
    try:
        image = decode_rgb(record.image)
    except BadImage as error:
        return Fault(record.image.name, error.reason)
    if min(image.shape[:2]) < MIN_SIDE:
        return Fault(record.image.name, too_small(*image.shape[:2]))
    loaded = Loaded(record, geometry.apply(image))
    for cond in conds:
        blob = record.map_for(cond, only=len(conds) == 1)
        if blob is None:
            continue
        try:
            map = decode_map(blob)
        except BadImage as error:
            return Fault(record.image.name, f"its {cond} map {blob.name} {error.reason}")
        loaded.maps[cond] = geometry.apply_map(map, image.shape, names=condition(cond).categorical)
    return loaded


def add_missing_maps(batch: Sequence[Loaded], annotators: Iterable[Annotator]) -> None:
    """Makes the maps that images of the batch lack, on exactly their training pixels."""
    for annotator in annotators:
        lacking = [item for item in batch if annotator.name not in item.maps]
        if not lacking:
            continue
        made = annotator([item.pixels for item in lacking], [item.record.key for item in lacking])
        for item, (map, _) in zip(lacking, made, strict=True):
            side = len(item.pixels)
            item.maps[annotator.name] = map if map.shape[:2] == (side, side) else enlarge(map, side, side)


def map_files(item: Loaded, flip: bool) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The maps as PNG files, and the hints of those conditions whose hint needs the image; mirrored if `flip`."""
    maps, hints = {}, {}
    for cond, map in item.maps.items():
        kind = condition(cond)
        maps[cond] = png(map, flip)
        if kind.needs_image:
            hints[cond] = png(kind.render(map, item.pixels), flip)
    return maps, hints


def png(map: np.ndarray, flip: bool = False) -> bytes:
    """A map as a PNG file; 1 bit per pixel where it holds 0 and 255 only."""
    map = np.ascontiguousarray(map[:, ::-1]) if flip else map
    return encode_png(map, bilevel=map.ndim == 2 and bool(((map == 0) | (map == 255)).all()))


def ordered(
    function: Callable[[Item], Result], items: Iterable[Item], pool: Executor | None, ahead: int
) -> Iterator[Result]:
    """`map`, by the threads of `pool` at most `ahead` items ahead; without a pool in this thread."""
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
