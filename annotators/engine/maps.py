"""All maps of an image as files: the image is decoded and resized once, each map is stored losslessly and small."""

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

EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Size:
    """`none`, `short:N` (shorter side to N) or `crop:N` (as the trainer crops: shorter side to N, then centre)."""

    kind: str = "none"
    pixels: int = 0

    @classmethod
    def parse(cls, text: str) -> Size:
        """Reads the flag. Raises `UsageError` naming the three forms."""
        match = re.fullmatch(r"(short|crop):(\d+)", text)
        if text == "none":
            return cls()
        if match is None or int(match[2]) < 2:
            raise UsageError(f"--size '{text}' is not a size. Write none, short:512, crop:512, or crop:BASE.")
        return cls(match[1], int(match[2]))

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Resizes uint8 (H, W, 3): area average when shrinking, cubic when enlarging."""
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
class LoadedImage:
    """An image that was read: the bytes of its file, and the pixels to annotate, uint8 (H, W, 3) RGB."""

    key: str
    data: bytes
    pixels: np.ndarray


@dataclass(frozen=True)
class ImageMaps:
    """The maps of one image."""

    maps: dict[str, bytes]
    """PNG file of each condition."""
    conditions: dict[str, Any]
    """How each map was made, and `source_sha256`; the `conditions` column."""
    image: bytes | None
    """The image as PNG, if other programs would see other pixels in the source file."""
    width: int
    height: int


def load_image(data: bytes, key: str, size: Size) -> LoadedImage:
    """Decodes an image file and resizes it. Raises `BadImage`."""
    pixels = decode_rgb(data)
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise BadImage(f"is {width}x{height}; an image needs at least {MIN_SIDE} pixels on each side")
    return LoadedImage(key, data, size.apply(pixels))


def make_maps(
    images: Sequence[LoadedImage], annotators: Iterable[Annotator], size: Size, *, render: bool, with_image: bool
) -> Iterator[ImageMaps]:
    """The maps of a batch of images, in order, computed on exactly the pixels that are written or trained on.

    render: maps as RGB hints. with_image: also return the image as PNG where the source file cannot be used as it is.
    """
    keys, pixels = [image.key for image in images], [image.pixels for image in images]
    outputs = [(annotator, annotator(pixels, keys)) for annotator in annotators]
    for i, image in enumerate(images):
        maps: dict[str, bytes] = {}
        conditions: dict[str, Any] = {}
        for annotator, results in outputs:
            map, params = results[i]
            params = {**params, "version": annotator.version, "opencv": cv2.__version__}
            if render:
                map, params = render_map(annotator.name, map, image.pixels), {**params, "rendered": True}
            maps[annotator.name] = encode_png(map, bilevel=annotator.bilevel and not render)
            conditions[annotator.name] = params
        conditions["source_sha256"] = hashlib.sha256(image.data).hexdigest()
        png = _png_if_needed(image.data, image.pixels, size.kind != "none") if with_image else None
        height, width = image.pixels.shape[:2]
        yield ImageMaps(maps, conditions, png, width, height)


def render_map(cond: str, map: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The map as the RGB hint at the image's size, uint8 (H, W, 3)."""
    height, width = pixels.shape[:2]
    if map.shape[:2] != (height, width):
        map = enlarge(map, width, height)
    return condition(cond).render(map, pixels)


def encode_png(map: np.ndarray, *, bilevel: bool = False) -> bytes:
    """A uint8 map, (H, W) or (H, W, 3) RGB, as a PNG file; 1 bit per pixel for maps of 0 and 255."""
    if bilevel:
        return _encode_one_bit(map)
    ok, buffer = cv2.imencode(".png", map if map.ndim == 2 else map[:, :, ::-1])
    assert ok, "OpenCV could not write a PNG"
    return buffer.tobytes()


def _encode_one_bit(map: np.ndarray) -> bytes:
    """A 1-bit grey PNG with unfiltered rows and run-length coding.

    For edges and masks this is smaller than libpng's default settings and three times as fast.
    """
    height, width = map.shape
    packed = np.packbits(map, axis=1)
    rows = np.zeros((height, packed.shape[1] + 1), np.uint8)  # each row begins with its filter type, 0
    rows[:, 1:] = packed
    compressor = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", compressor.compress(rows) + compressor.flush()),
        (b"IEND", b""),
    )
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _png_if_needed(data: bytes, pixels: np.ndarray, resized: bool) -> bytes | None:
    """The image as PNG, or None if the source file can be kept byte for byte.

    It cannot if other programs (PIL's `convert("RGB")`) see other pixels than the map was made from: 16 bits,
    transparency, rotation by EXIF, CMYK.
    """
    if not resized:
        with Image.open(io.BytesIO(data)) as header:
            plain = header.mode in ("RGB", "L", "1") and "transparency" not in header.info
            if plain and header.getexif().get(EXIF_ORIENTATION, 1) == 1:
                return None
    return encode_png(pixels)
