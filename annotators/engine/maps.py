"""Pictures to all their maps as files: decoded once, resized once, each map stored losslessly and small."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ...core.data.conditions import condition
from ...core.data.images import MIN_SIDE, BadImage, Geometry, decode_rgb
from ...core.errors import UsageError
from ..base import Annotator
from ..color import enlarge

ORIENTATION = 0x0112


@dataclass(frozen=True)
class Size:
    """`none`, `short:N` (shorter side to N) or `crop:N` (the trainer's own geometry: N x N centre crop)."""

    kind: str = "none"
    pixels: int = 0

    @classmethod
    def parse(cls, text: str) -> Size:
        """Reads the flag. Raises `UsageError` naming the three forms."""
        match = re.fullmatch(r"(short|crop):(\d+)", text)
        if text == "none":
            return cls()
        if match is None or int(match[2]) < 2:
            raise UsageError(f"--size '{text}' is no size. Write none, short:512, crop:512, or crop:BASE.")
        return cls(match[1], int(match[2]))

    def apply(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) to the size written: area average down, cubic up."""
        if self.kind == "none":
            return image
        if self.kind == "crop":
            return Geometry(self.pixels).apply(image)
        height, width = image.shape[:2]
        scale = self.pixels / min(height, width)
        if scale == 1:
            return image
        target = max(1, round(width * scale)), max(1, round(height * scale))
        return cv2.resize(image, target, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


@dataclass(frozen=True)
class Made:
    """What one picture gave."""

    maps: dict[str, bytes]
    """PNG file of each condition."""
    conditions: dict[str, Any]
    """How each map was made, and `source_sha256`; one JSON value."""
    image: bytes | None
    """PNG of the picture, where the source file does not show a plain reader these pixels."""
    width: int
    height: int


@dataclass(frozen=True)
class Opened:
    """A picture that was read: the bytes of its file, and the pixels that maps are made of, uint8 (H, W, 3) RGB."""

    key: str
    data: bytes
    pixels: np.ndarray


def read(data: bytes, key: str, size: Size) -> Opened:
    """Decodes a picture file and brings it to its size. Raises `BadImage`."""
    pixels = decode_rgb(data)
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise BadImage(f"is {width}x{height}; sides under {MIN_SIDE} pixels show nothing to make a map of")
    return Opened(key, data, size.apply(pixels))


def make(
    pictures: Sequence[Opened], annotators: Iterable[Annotator], size: Size, *, render: bool, image: bool
) -> Iterator[Made]:
    """Maps of a batch of pictures, in order, computed on exactly the pixels that are written or trained on.

    image: also give the picture where it must be written anew.
    """
    batches = [(a, a([p.pixels for p in pictures], [p.key for p in pictures])) for a in annotators]
    for i, picture in enumerate(pictures):
        maps: dict[str, bytes] = {}
        conditions: dict[str, Any] = {}
        for annotator, made in batches:
            map, params = made[i]
            params = {**params, "version": annotator.version, "opencv": cv2.__version__}
            if render:
                map, params = rendered(annotator.name, map, picture.pixels), {**params, "rendered": True}
            maps[annotator.name] = encode_png(map, bilevel=annotator.bilevel and not render)
            conditions[annotator.name] = params
        conditions["source_sha256"] = hashlib.sha256(picture.data).hexdigest()
        written = _rewritten(picture.data, picture.pixels, size.kind != "none") if image else None
        height, width = picture.pixels.shape[:2]
        yield Made(maps, conditions, written, width, height)


def rendered(cond: str, made: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The map as the RGB hint at the picture's size, uint8 (H, W, 3)."""
    height, width = pixels.shape[:2]
    if made.shape[:2] != (height, width):
        made = enlarge(made, width, height)
    return condition(cond).render(made, pixels)


def encode_png(made: np.ndarray, *, bilevel: bool = False) -> bytes:
    """A uint8 map, (H, W) or (H, W, 3) RGB, as a PNG file; 1 bit a pixel for maps of 0 and 255."""
    if bilevel:
        return _one_bit(made)
    ok, buffer = cv2.imencode(".png", made if made.ndim == 2 else made[:, :, ::-1])
    assert ok, "OpenCV could not write a PNG"
    return buffer.tobytes()


def _one_bit(made: np.ndarray) -> bytes:
    """A 1-bit grey PNG, rows unfiltered, runs of equal bytes coded.

    For edges and masks this is smaller and three times as fast as what libpng chooses for all pictures alike.
    """
    height, width = made.shape
    packed = np.packbits(made, axis=1)
    rows = np.zeros((height, packed.shape[1] + 1), np.uint8)  # each begins with the number of its filter, 0
    rows[:, 1:] = packed
    coder = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", coder.compress(rows) + coder.flush()),
        (b"IEND", b""),
    )
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _rewritten(data: bytes, pixels: np.ndarray, resized: bool) -> bytes | None:
    """The picture written anew without loss, or None where the source file can be kept byte for byte.

    It cannot where plain readers (PIL's `convert("RGB")`) see other pixels than the map was made from: 16 bits,
    transparency, rotation by EXIF, CMYK. Then a PNG is written.
    """
    if not resized:
        with Image.open(io.BytesIO(data)) as header:
            plain = header.mode in ("RGB", "L", "1") and "transparency" not in header.info
            if plain and header.getexif().get(ORIENTATION, 1) == 1:
                return None
    return encode_png(pixels)
