"""Decoding of every kind of picture, refusal of what is none, and image and map staying on top of each other."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from sctool.core.data.conditions import condition
from sctool.core.data.images import BadImage, Geometry, decode_map, decode_rgb, picture_size

RNG = np.random.default_rng(0)
SMOOTH = cv2.resize(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8), (70, 50), interpolation=cv2.INTER_CUBIC)


def save(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def giant_png(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 92}), ("JPEG", {"progressive": True}), ("PNG", {})])
def test_fast_path_equals_pillow(mode, kind, options):
    data = save(Image.fromarray(SMOOTH).convert(mode), kind, **options)
    assert np.array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(orientation, kind):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(SMOOTH), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode_rgb(data), expected)
    if kind == "JPEG":
        assert picture_size(data) == expected.shape[:2]


def test_cmyk_is_read_as_pillow_reads_it():
    data = save(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    assert np.array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(decode_rgb(data).astype(int) - SMOOTH).mean() < 20


def test_sixteen_bit_is_scaled_not_wrapped():
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    expected = np.rint(values / 257.0)
    for data in (cv2.imencode(".png", values)[1].tobytes(), save(Image.fromarray(values), "TIFF")):
        assert np.array_equal(decode_rgb(data)[..., 0], expected)
        assert np.array_equal(decode_map(data), expected)
    colour = np.stack([values, values[::-1], values.T], axis=2)
    decoded = decode_rgb(cv2.imencode(".png", np.ascontiguousarray(colour[..., ::-1]))[1].tobytes())
    assert np.abs(decoded - np.rint(colour / 257.0)).max() <= 1


def test_transparency_is_laid_on_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (200, 0, 0, 255)
    rgba[2, :, 3] = 128
    decoded = decode_rgb(save(Image.fromarray(rgba)))
    assert decoded[0, 0].tolist() == [200, 0, 0]
    assert decoded[2, 0].tolist() == [127, 127, 127]
    assert decoded[3, 0].tolist() == [255, 255, 255]

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    data = save(palette, transparency=1)
    assert decode_rgb(data)[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert decode_rgb(save(palette))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert decode_rgb(save(Image.new("LA", (2, 1), (7, 0))))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("alpha", [0, 1, 100, 200, 254, 255])
def test_partly_transparent_colours_are_mixed_with_white(alpha):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, :3] = (200, 100, 3), (255, 255, 255), (0, 77, 128)
    rgba[..., 3] = alpha
    expected = rgba[..., :3] * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(decode_rgb(save(Image.fromarray(rgba))) - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"a caption, not a picture\n", "is not an image"),
        (save(Image.fromarray(SMOOTH), "JPEG")[:-300], "cut off"),
        (save(Image.fromarray(SMOOTH), "JPEG")[:-2], "cut off"),
        (save(Image.fromarray(SMOOTH), "PNG")[:-200], "cut off"),
        (save(Image.fromarray(SMOOTH), "PNG")[:20], "(damaged header|not an image)"),
        (giant_png(30_000, 30_000), "pixels; scale it down"),
        (giant_png(14_000, 13_000), "more than 178,956,970"),
        (save(Image.fromarray(np.zeros((3, 3), np.float32)), "TIFF"), "floating-point"),
    ],
)
@pytest.mark.parametrize("decode", [decode_rgb, decode_map])
def test_bad_bytes_are_refused_with_a_reason(decode, data, reason):
    with pytest.raises(BadImage, match=f"x.jpg .*{reason}"):
        decode(data, "x.jpg")


def test_one_pixel_decodes():
    assert decode_rgb(save(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


def test_maps_keep_their_channels():
    edges = (RNG.random((9, 11)) > 0.5).astype(np.uint8) * 255
    bilevel = cv2.imencode(".png", edges, [cv2.IMWRITE_PNG_BILEVEL, 1])[1].tobytes()
    for data in (bilevel, save(Image.fromarray(edges)), save(Image.fromarray(edges > 0))):
        assert np.array_equal(decode_map(data), edges)
    assert np.array_equal(decode_map(save(Image.fromarray(SMOOTH))), SMOOTH)


# ----------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(("height", "width", "size"), [(90, 140, 64), (140, 90, 64), (64, 64, 64), (40, 30, 64)])
@pytest.mark.parametrize("flip", [False, True])
def test_marker_stays_aligned(height, width, size, flip):
    """A white square drawn on picture and map lies at the same place afterwards, in whatever size the map comes."""
    image = np.zeros((height, width, 3), np.uint8)
    y, x, side = height // 2 - 9, width // 2 + 2, 8
    image[y : y + side, x : x + side] = 255
    geometry = Geometry(size)
    fitted = geometry.apply(image, flip)
    assert fitted.shape == (size, size, 3)
    assert fitted.flags["C_CONTIGUOUS"]
    double = np.repeat(np.repeat(image[..., 0], 2, axis=0), 2, axis=1)
    for map in (image[..., 0], image, double):
        hint = geometry.apply_map(map, image.shape, flip)
        hint = hint if hint.ndim == 2 else hint[..., 0]
        assert np.array_equal(hint.shape, (size, size))
        agreement = (hint > 127) == (fitted[..., 0] > 127)
        assert agreement.mean() > 0.98
        centre = [np.argwhere(m > 127).mean(axis=0) for m in (hint, fitted[..., 0])]
        assert np.abs(centre[0] - centre[1]).max() <= 1


CASES = [(100, 151), (151, 100), (30, 47), (64, 97), (64, 64)]


def fitted_by_hand(pixels, enlarge, shrink, size=64):
    """The shorter side to 64 px, then the centre: written again, step by step."""
    height, width = pixels.shape[:2]
    if height <= width:
        height, width = size, round(width * size / height)
    else:
        height, width = round(height * size / width), size
    if pixels.shape[:2] != (height, width):
        rule = enlarge if min(pixels.shape[:2]) < size else shrink
        pixels = cv2.resize(pixels, (width, height), interpolation=rule)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(("height", "width"), CASES)
def test_geometry_is_area_down_cubic_up_centre(height, width):
    image = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = fitted_by_hand(image, cv2.INTER_CUBIC, cv2.INTER_AREA)
    assert np.array_equal(Geometry(64).apply(image), expected)
    assert np.array_equal(Geometry(64).apply(image, flip=True), expected[:, ::-1])


@pytest.mark.parametrize(("height", "width"), CASES)
@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("factor", [0.5, 1, 2])
def test_maps_are_brought_to_the_image_first(height, width, names, factor):
    map = RNG.integers(0, 256, (int(height * factor), int(width * factor)), dtype=np.uint8)
    shrink = cv2.INTER_NEAREST if names else cv2.INTER_AREA
    full = map
    if factor != 1:
        full = cv2.resize(map, (width, height), interpolation=shrink if factor > 1 else cv2.INTER_NEAREST)
    expected = fitted_by_hand(full, cv2.INTER_NEAREST, shrink)
    assert np.array_equal(Geometry(64).apply_map(map, (height, width, 3), names=names), expected)
    flipped = Geometry(64).apply_map(map, (height, width, 3), True, names=names)
    assert np.array_equal(flipped, expected[:, ::-1])


def test_map_of_training_size_passes_untouched():
    map = RNG.integers(0, 256, (64, 64), dtype=np.uint8)
    assert np.array_equal(Geometry(64).apply_map(map, (300, 200, 3)), map)
    assert np.array_equal(Geometry(64).apply_map(map, (300, 200, 3), flip=True), map[:, ::-1])


def test_small_colour_map_keeps_its_colours():
    small = RNG.integers(0, 256, (2, 3, 3), dtype=np.uint8)
    large = Geometry(64).apply_map(small, (128, 192, 3))
    assert np.array_equal(large[16, 32], small[0, 1])
    assert np.array_equal(large[48, 32], small[1, 1])


def test_whole_picture_is_used_along_the_shorter_side():
    ramp = np.repeat(np.arange(128, dtype=np.uint8)[:, None, None], 200, axis=1).repeat(3, axis=2)
    fitted = Geometry(64).apply(ramp)
    assert abs(int(fitted[0, 0, 0]) - 0.5) <= 0.5
    assert abs(int(fitted[-1, 0, 0]) - 126.5) <= 0.5
    assert Geometry(64).id != Geometry(32).id


def test_hints_are_rgb_and_masks_hide():
    image = np.full((4, 4, 3), 9, np.uint8)
    mask = np.zeros((4, 4), np.uint8)
    mask[1] = 255
    hidden = condition("mask").render(mask, image)
    assert hidden[1].max() == 0
    assert (hidden[[0, 2, 3]] == 9).all()
    colour = np.dstack([mask, np.zeros_like(mask), np.zeros_like(mask)])
    assert np.array_equal(condition("mask").render(colour, image), hidden), "the first channel decides"
    grey = np.full((4, 4), 127, np.uint8)
    assert condition("mask").render(grey, image).min() == 9
    assert condition("mask").render(grey + 1, image).max() == 0
    assert condition("mask").needs_image
    assert not condition("canny").needs_image
    assert np.array_equal(condition("canny").render(mask, image), mask[..., None].repeat(3, axis=2))
    assert condition("color").render(image, image) is image


def test_names_are_never_averaged():
    ids = np.random.default_rng(0).choice(np.array([3, 7, 149, 255], np.uint8), (90, 120))
    for size, shape in ((32, (90, 120)), (32, (200, 260)), (200, (90, 120)), (16, (45, 60))):
        fitted = Geometry(size).apply_map(ids, shape, names=True)
        assert fitted.shape == (size, size)
        assert set(np.unique(fitted)) <= {3, 7, 149, 255}
    averaged = Geometry(32).apply_map(ids, ids.shape)
    assert not set(np.unique(averaged)) <= {3, 7, 149, 255}
