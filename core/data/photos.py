"""The set `photos`: captioned square crops of photographs that are part of scikit-image, so nothing is downloaded.

Every photograph has a held-out region. Crops inside it are the split "validation"; no training crop touches it.
Of the stereo pair only `motorcycle_left` is used: the right view would show the held-out region again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from ..errors import SctoolError
from .images import decode_rgb
from .records import Blob, Record, Source, file_stamp

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are exclusive."""

SIDES = (128, 160, 208, 288)
"""Sides of the crops in pixels; neighbours overlap by about a fifth."""


@dataclass(frozen=True)
class Photo:
    """A photograph, the captions of its crops, and the region held out from training.

    A crop has the caption of the region that covers most of it, if that covers two fifths of the crop or is itself
    mostly visible; else `caption`.
    """

    file: str
    label: str
    caption: str
    held_out: Box
    regions: tuple[tuple[str, Box], ...] = ()
    area: Box | None = None
    sides: tuple[int, ...] = SIDES


PHOTOS = (
    Photo(
        "astronaut.png",
        "astronaut",
        "a photo of an astronaut in an orange space suit",
        (344, 0, 512, 290),
        (
            ("a photo of a smiling woman", (145, 10, 315, 180)),
            ("a photo of a flag with stars and stripes", (0, 0, 95, 300)),
            ("a photo of a white space helmet", (275, 340, 512, 512)),
            ("a photo of a model of the space shuttle", (350, 0, 470, 280)),
            ("a photo of an orange space suit", (20, 250, 270, 512)),
        ),
    ),
    Photo(
        "chelsea.png",
        "cat",
        "a photo of a ginger tabby cat",
        (284, 0, 451, 300),
        (
            ("a photo of the eye of a cat", (130, 75, 215, 165)),
            ("a photo of the eye of a cat", (285, 105, 345, 170)),
            ("a photo of the nose of a cat", (210, 190, 300, 275)),
            ("a photo of the ear of a cat", (355, 0, 451, 90)),
        ),
    ),
    Photo(
        "coffee.png",
        "coffee",
        "a photo of a cup of coffee on a red saucer",
        (300, 190, 490, 400),
        (
            ("a photo of coffee in a white cup", (175, 20, 410, 200)),
            ("a photo of a spoon on a red saucer", (325, 215, 400, 330)),
            ("a photo of a wooden table", (480, 0, 600, 400)),
            ("a photo of a wooden table", (0, 200, 80, 400)),
            ("a photo of a wooden table", (0, 0, 150, 80)),
        ),
    ),
    Photo(
        "rocket.jpg",
        "rocket",
        "a photo of a launch pad in the evening",
        (384, 96, 640, 427),
        (
            ("a photo of a rocket on its launch pad", (300, 125, 345, 420)),
            ("a photo of a steel tower", (0, 0, 105, 370)),
            ("a photo of a steel tower", (165, 125, 225, 390)),
            ("a photo of a steel tower", (425, 110, 495, 400)),
            ("a photo of the evening sky", (90, 0, 560, 110)),
        ),
    ),
    Photo(
        "motorcycle_left.png",
        "motorcycle",
        "a photo of a red motorcycle in a garage",
        (520, 220, 741, 500),
        (
            ("a photo of the front wheel of a red motorcycle", (520, 250, 690, 455)),
            ("a photo of the rear wheel of a red motorcycle", (110, 230, 270, 415)),
            ("a photo of the engine of a motorcycle", (290, 220, 470, 390)),
            ("a photo of shelves with boxes", (380, 0, 741, 110)),
            ("a photo of a wooden bench", (0, 80, 150, 250)),
            ("a photo of a concrete floor", (0, 400, 741, 500)),
            ("a photo of the wall of a garage", (0, 0, 350, 120)),
        ),
    ),
    Photo(
        "camera.png",
        "cameraman",
        "a black and white photo of a man with a camera",
        (344, 90, 512, 300),
        (
            ("a black and white photo of the face of a man", (160, 60, 275, 190)),
            ("a black and white photo of a tripod on grass", (210, 250, 380, 512)),
            ("a black and white photo of buildings behind a field", (345, 110, 512, 240)),
            ("a black and white photo of a man in a dark coat", (0, 120, 200, 512)),
            ("a black and white photo of the sky", (280, 0, 512, 100)),
            ("a black and white photo of the sky", (0, 0, 160, 110)),
            ("a black and white photo of grass", (380, 300, 512, 512)),
        ),
    ),
    Photo("coins.png", "coins", "a black and white photo of old coins", (230, 150, 384, 303), sides=(128, 160)),
    Photo(
        "hubble_deep_field.jpg",
        "galaxies",
        "a photo of galaxies in the night sky",
        (660, 560, 1000, 872),
        sides=(256, 320),
    ),
    Photo(
        "retina.jpg",
        "retina",
        "a photo of the retina of an eye",
        (780, 760, 1220, 1160),
        (("a photo of the optic disc of an eye", (100, 520, 330, 760)),),
        area=(100, 200, 1240, 1200),
        sides=(320, 384),
    ),
    Photo("brick.png", "bricks", "a black and white photo of a brick wall", (320, 300, 512, 512), sides=(192, 256)),
    Photo("gravel.png", "gravel", "a black and white photo of gravel", (340, 340, 512, 512), sides=(160,)),
    Photo("grass.png", "grass", "a black and white photo of grass", (340, 340, 512, 512), sides=(160,)),
)


@dataclass(frozen=True)
class CropBlob(Blob):
    """A rectangle of an image file as PNG bytes, cropped when it is read."""

    path: str
    box: Box

    @property
    def name(self) -> str:
        """`FILE[left,top,right,bottom]`."""
        return f"{Path(self.path).name}[{','.join(map(str, self.box))}]"

    def read(self) -> bytes:
        """PNG bytes of the crop."""
        left, top, right, bottom = self.box
        pixels = np.ascontiguousarray(_photo(self.path)[top:bottom, left:right, ::-1])
        return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()

    def stamp(self) -> str | None:
        """The file's stamp and the box."""
        stamp = file_stamp(self.path)
        return stamp and f"{stamp}|{self.box}"


@lru_cache(maxsize=16)
def _photo(path: str) -> np.ndarray:
    return decode_rgb(Path(path).read_bytes())


def folder() -> Path:
    """scikit-image's data folder, found without importing it (its import could ask for downloads)."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise SctoolError("the set 'photos' is part of scikit-image, which is not installed: pip install scikit-image")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def photos() -> Source:
    """The built-in set: crops in a fixed order; those of held-out regions have the split "validation"."""
    records = [record for photo in PHOTOS for record in _crops(photo)]
    if not records:
        raise SctoolError(f"scikit-image has none of its photographs in {folder()}; reinstall scikit-image")
    return Source("photos", "photos", records)


def _crops(photo: Photo) -> Iterator[Record]:
    path = folder() / photo.file
    if not path.is_file():
        return
    height, width = _photo(str(path)).shape[:2]
    area = photo.area or (0, 0, width, height)
    for region, split in ((area, "train"), (photo.held_out, "validation")):
        for side in photo.sides:
            for box in _grid(region, side):
                if split == "train" and _shared(box, photo.held_out):
                    continue
                key = f"{path.stem}-{box[0]:04d}-{box[1]:04d}-{side}"
                meta = {"file": photo.file, "box": list(box)}
                yield Record(key, CropBlob(str(path), box), _caption(photo, box), {}, split, photo.label, meta)


def _grid(area: Box, side: int) -> list[Box]:
    """Squares that cover `area` evenly, row by row, neighbours about four fifths of a side apart."""
    left, top, right, bottom = area
    return [(x, y, x + side, y + side) for y in _starts(top, bottom, side) for x in _starts(left, right, side)]


def _starts(low: int, high: int, side: int) -> list[int]:
    room = high - low - side
    if room < 0:
        return []
    steps = round(room / (0.8 * side))
    return [low + room * i // steps for i in range(steps + 1)] if steps else [low]


def _caption(photo: Photo, box: Box) -> str:
    shown = [(_shared(box, region), region, caption) for caption, region in photo.regions]
    shown = [
        (shared, caption)
        for shared, region, caption in shown
        if shared >= 0.4 * _size(box) or (shared >= 0.7 * _size(region) and shared >= 0.12 * _size(box))
    ]
    return max(shown)[1] if shown else photo.caption


def _size(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shared(a: Box, b: Box) -> int:
    """Pixels that two boxes share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
