"""Bytes to pixels, and the one geometry that image and map go through together."""

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
"""Pictures with more pixels than this in their header are refused undecoded (twice Pillow's warning limit)."""

MIN_SIDE = 8
"""Shorter side in pixels below which a picture holds nothing to learn from."""


class BadImage(Exception):
    """These bytes cannot become pixels: `reason` says why, the message also where, if that is known."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(f"{name} {reason}" if name else reason)
        self.reason = reason


def decode_rgb(source: Blob | bytes, name: str = "") -> np.ndarray:
    """A picture as uint8 RGB (H,W,3), turned upright by its EXIF orientation.

    8-bit RGB and greyscale JPEG and PNG go through OpenCV, which gives the same pixels as Pillow in less time; CMYK,
    16-bit (scaled to 8), palette and transparency (composited on white) go through Pillow.
    Raises `BadImage` for what is no picture, cut off, or has more than `MAX_PIXELS` pixels.
    """
    with _named(source, name):
        data = _read(source)
        picture = _open(data)
        if _plain(picture, data):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
            if pixels is not None:
                return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        pixels = _pixels(picture)
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels


def decode_map(source: Blob | bytes, name: str = "") -> np.ndarray:
    """A condition map as uint8 (H,W), or (H,W,3) for colour; 1-bit maps become 0 and 255, 16-bit ones 8-bit.

    Raises `BadImage` as `decode_rgb` does.
    """
    with _named(source, name):
        data = _read(source)
        picture = _open(data)
        if picture.mode in ("1", "L") and _plain(picture, data):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
            if pixels is not None:
                return pixels
        return _pixels(picture)


def picture_size(source: Blob | bytes, name: str = "") -> tuple[int, int]:
    """(height, width) in pixels from the header alone, upright. Raises `BadImage`."""
    with _named(source, name):
        picture = _open(_read(source))
    width, height = picture.size
    return (width, height) if _orientation(picture) >= 5 else (height, width)


def too_small(height: int, width: int) -> str:
    """The reason against a picture with too few pixels."""
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
            picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise BadImage("is no picture, whatever its name says") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"has more than {MAX_PIXELS:,} pixels; scale it down first") from error
    except Exception as error:  # Pillow's header parsers raise many kinds on damaged bytes
        raise BadImage(f"has a damaged header: {error}") from error
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"is {width}x{height}, more than {MAX_PIXELS:,} pixels; scale it down first")
    return picture


def _plain(picture: Image.Image, data: bytes) -> bool:
    """Whether OpenCV gives exactly Pillow's pixels and would notice a cut-off file."""
    if picture.format == "JPEG":
        # OpenCV fills a cut-off JPEG with grey; one that ends in its end marker is whole.
        return picture.mode in ("RGB", "L") and data.endswith(b"\xff\xd9") and _orientation(picture) == 1
    if picture.format == "PNG":
        whole = data.rfind(b"IEND", -64) > 0 and data[24] <= 8  # bit depth
        special = "transparency" in picture.info or b"eXIf" in data
        return whole and not special and picture.mode in ("RGB", "L", "1")
    return False


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation, 1 (upright) when there is none."""
    try:
        return int(picture.getexif().get(0x0112, 1)) if picture.format != "PNG" or "exif" in picture.info else 1
    except Exception:  # damaged EXIF is no reason to lose the picture
        return 1


def _pixels(picture: Image.Image) -> np.ndarray:
    """Upright uint8 (H,W) or (H,W,3) through Pillow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture.load()  # raises on cut-off data; PNG orientation is known only after it
            return _eight_bit(_upright(picture))
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


def _upright(picture: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _eight_bit(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I"):  # 16-bit greyscale, in 16 or 32 bits a pixel
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("holds whole numbers beyond 16 bits; save it as an 8- or 16-bit picture")
        return ((values * 255 + 32767) // 65535).astype(np.uint8)
    if picture.mode == "F":
        raise BadImage("holds floating-point values, whose range is unknown; save it as an 8- or 16-bit picture")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        rgba = np.asarray(picture.convert("RGBA")).astype(np.float32)
        alpha = rgba[..., 3:] / 255
        return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.array(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))


@dataclass(frozen=True)
class Geometry:
    """Shorter side to `size` pixels (area down, cubic up), then the centre `size` x `size`."""

    size: int

    @property
    def id(self) -> str:
        """Names the transform in cache keys: another rule must get another name."""
        return f"short-centre-area-cubic-{self.size}"

    def apply(self, image: np.ndarray, flip: bool = False) -> np.ndarray:
        """(H,W,3) uint8 to (size,size,3)."""
        return self._fit(image, cv2.INTER_CUBIC, flip)

    def apply_map(
        self, map: np.ndarray, image_shape: tuple[int, ...], flip: bool = False, *, names: bool = False
    ) -> np.ndarray:
        """A map of a picture of `image_shape` (H,W,…) to (size,size) or (size,size,3), aligned with `apply`.

        A map that has the training size already is passed through bit for bit. One of another size than the picture
        is first brought to it: a smaller one (the 1/64 colour map) by nearest neighbour, a larger one by area. `names`:
        the values are names (class ids), of which there is no mean: nearest neighbour throughout.
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
