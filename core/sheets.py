"""Contact sheets: rows of images under headings, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import replacing

MARGIN = 6
LINE = 16


def upscale(size: int, least: int = 128) -> int:
    """The integer factor that enlarges an image of `size` pixels to at least `least`, for display."""
    return max(1, -(-least // size))


def sheet(
    rows: Sequence[Sequence[np.ndarray]],
    headings: Sequence[str],
    captions: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """A grid: one row per sample, one column per kind (hint, base, tuned), a caption under each row.

    `rows` contains uint8 (H, W, 3) arrays of one size; small images are enlarged by an integer factor.
    """
    height, width = rows[0][0].shape[:2]
    factor = upscale(min(height, width))
    cell_h, cell_w = height * factor, width * factor
    font = ImageFont.load_default(size=12)
    top = MARGIN + (LINE if title else 0) + (LINE if any(headings) else 0)
    below = LINE if captions else 0
    canvas = Image.new(
        "RGB",
        (MARGIN + len(rows[0]) * (cell_w + MARGIN), top + len(rows) * (cell_h + below + MARGIN) + MARGIN),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((MARGIN, 2), title, fill="black", font=font)
    for column, heading in enumerate(headings):
        draw.text((MARGIN + column * (cell_w + MARGIN), top - LINE), heading, fill="black", font=font)
    for r, row in enumerate(rows):
        y = top + r * (cell_h + below + MARGIN)
        for column, cell in enumerate(row):
            image = Image.fromarray(cell).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            canvas.paste(image, (MARGIN + column * (cell_w + MARGIN), y))
        if captions:
            draw.text((MARGIN, y + cell_h + 1), captions[r], fill="#444444", font=font)
    return canvas


def save_png(image: Image.Image, path: str | Path, text: dict[str, str] | None = None) -> None:
    """Writes a PNG atomically, with `text` as its metadata."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info, optimize=True)
