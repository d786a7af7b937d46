"""Decoding, and the resize and crop that an image and its maps share."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from .records import Blob

MAX_PIXELS = 178_956_970
"""Images whose header gives more pixels than this are refused without decoding (twice Pillow's warning limit)."""

MIN_SIDE = 8
"""Images whose shorter side has fewer pixels than this are refused."""


class BadImage(Exception):
    """These bytes cannot be decoded: `reason` says why; the message also names the file, if known."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"{name} {reason}" if name else reason)
        self.reason = reason


def decode_rgb(source: Blob | bytes, name: str = "") -> np.ndarray:
    """An image as uint8 RGB (H,W,3), turned upright by its EXIF orientation.

    OpenCV decodes 8-bit RGB and greyscale JPEG and PNG: the same pixels as Pillow's in less time. Pillow decodes CMYK,
    16-bit (scaled to 8), palettes and transparency (composited on white).
    Raises `BadImage` for bytes that are not an image, are cut off, or have more than `MAX_PIXELS` pixels.
    """
    with _named(source, name):
        data = _read(source)
        image = _open(data)
        if _plain(image, data):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
            if pixels is not None:
                return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        pixels = _pixels(image)
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels


def decode_map(source: Blob | bytes, name: str = "") -> np.ndarray:
    """A condition map as uint8 (H,W), or (H,W,3) for colour; 1-bit maps become 0 and 255, 16-bit ones 8-bit.

    Raises `BadImage` as `decode_rgb` does.
    """
    with _named(source, name):
        data = _read(source)
        image = _open(data)
        if image.mode in ("1", "L") and _plain(image, data):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
            if pixels is not None:
                return pixels
        return _pixels(image)


def picture_size(source: Blob | bytes, name: str = "") -> tuple[int, int]:
    """(height, width) in pixels from the header alone, upright. Raises `BadImage`."""
    with _named(source, name):
        image = _open(_read(source))
    width, height = image.size
    return (width, height) if _orientation(image) >= 5 else (height, width)


def too_small(height: int, width: int) -> str:
    """The reason for refusing an image with too few pixels."""
    return f"is {width}x{height} pixels, smaller than {MIN_SIDE} on a side"


@contextmanager
def _named(source: Blob | bytes, name: str) -> Iterator[None]:
    try:
        yield
    except BadImage as error:
        raise BadImage(error.reason, name or (source.name if isinstance(source, Blob) else "")) from error


def _read(source: Blob | bytes) -> bytes:
    if isinstance(source, bytes):
        data = source
    else:
        try:
            data = source.read()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error
    if not data:
        raise BadImage("is empty (0 bytes)")
    return data


def _open(data: bytes) -> Image.Image:
    """The header only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise BadImage("is not an image, whatever its name says") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"has more than {MAX_PIXELS:,} pixels; scale it down first") from error
    except Exception as error:  # Pillow's header parsers raise many kinds on damaged bytes
        raise BadImage(f"has a damaged header: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"is {width}x{height}, more than {MAX_PIXELS:,} pixels; scale it down first")
    return image


def _plain(image: Image.Image, data: bytes) -> bool:
    """Whether OpenCV decodes exactly Pillow's pixels, and the file is not cut off."""
    if image.format == "JPEG":
        # OpenCV fills a cut-off JPEG with grey; one that ends in its end marker is complete.
        return image.mode in ("RGB", "L") and data.endswith(b"\xff\xd9") and _orientation(image) == 1
    if image.format == "PNG":
        complete = data.rfind(b"IEND", -64) > 0 and data[24] <= 8  # bit depth
        special = "transparency" in image.info or b"eXIf" in data
        return complete and not special and image.mode in ("RGB", "L", "1")
    return False


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) when there is none."""
    try:
        return int(image.getexif().get(0x0112, 1)) if image.format != "PNG" or "exif" in image.info else 1
    except Exception:  # an image with damaged EXIF is still usable
        return 1


def _pixels(image: Image.Image) -> np.ndarray:
    """Upright uint8 (H,W) or (H,W,3) through Pillow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()  # raises on cut-off data; PNG orientation is known only after it
            return _eight_bit(_upright(image))
    except BadImage:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error …
        raise BadImage(f"is cut off or damaged: {error}") from error


_TURNS: dict[int, Any] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _eight_bit(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit greyscale, stored in 16 or 32 bits per pixel
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("has integers beyond 16 bits; save it as an 8- or 16-bit image")
        return ((values * 255 + 32767) // 65535).astype(np.uint8)
    if image.mode == "F":
        raise BadImage("has floating-point values, whose range is unknown; save it as an 8- or 16-bit image")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA")).astype(np.float32)
        alpha = rgba[..., 3:] / 255
        return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))


@dataclass(frozen=True)
class Geometry:
    """Resize the shorter side to `size` pixels (area down, cubic up), then crop the centre `size` x `size`."""

    size: int

    @property
    def id(self) -> str:
        """Identity of the transform in cache keys; another rule needs another id."""
        return f"short-centre-area-cubic-{self.size}"

    def apply(self, image: np.ndarray, flip: bool = False) -> np.ndarray:
        """(H,W,3) uint8 to (size,size,3)."""
        return self._fit(image, cv2.INTER_CUBIC, flip)

    def apply_map(
        self, map: np.ndarray, image_shape: tuple[int, ...], flip: bool = False, *, names: bool = False
    ) -> np.ndarray:
        """The map of an image of `image_shape` (H,W,…) as (size,size) or (size,size,3), aligned with `apply`.

        A map of the training size is returned unchanged. One that differs in size from its image is first resized to
        it: a smaller one (the 1/64 colour map) by nearest neighbour, a larger one by area. `names`: the values are
        class ids, which cannot be averaged: nearest neighbour throughout.
        """
        height, width = image_shape[:2]
        if map.shape[:2] == (self.size, self.size):
            return np.ascontiguousarray(map[:, ::-1]) if flip else map
        if map.shape[:2] != (height, width):
            smaller = map.shape[0] <= height and map.shape[1] <= width
            map = cv2.resize(
                map, (width, height), interpolation=cv2.INTER_NEAREST if smaller or names else cv2.INTER_AREA
            )
        return self._fit(map, cv2.INTER_NEAREST, flip, cv2.INTER_NEAREST if names else cv2.INTER_AREA)

    def _fit(self, pixels: np.ndarray, enlarge: int, flip: bool, shrink: int = cv2.INTER_AREA) -> np.ndarray:
        height, width = pixels.shape[:2]
        short = min(height, width)
        if short != self.size:
            scale = self.size / short
            height, width = max(self.size, round(height * scale)), max(self.size, round(width * scale))
            pixels = cv2.resize(pixels, (width, height), interpolation=shrink if scale < 1 else enlarge)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        pixels = pixels[top : top + self.size, left : left + self.size]
        return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)
