"""Inpainting masks of LaMa (Suvorov et al. 2021, arXiv 2109.07161; saicinpainting/training/data/masks.py).

A mask is either brush strokes or boxes, never both. The published sizes are in pixels, for images of 256 (training) or
512 (the evaluation sets); here they scale with min(H, W), so that a preset covers the same share at every size.
255 is to be painted. Random numbers come from a generator per image, not from a global one that forked workers would
share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from ..core.resolving import Config
from .base import Annotator, Params

MAX_TRIES = 100


@dataclass(frozen=True)
class Strokes:
    """Ranges for masks of strokes, in pixels at the preset's size; `times` is inclusive."""

    times: tuple[int, int]
    length: int
    width: int
    angle: int = 4


@dataclass(frozen=True)
class Boxes:
    """Ranges for masks of boxes, in pixels at the preset's size; both ranges are inclusive."""

    times: tuple[int, int]
    side: tuple[int, int]
    margin: int


@dataclass(frozen=True)
class Preset:
    """A published mixture: boxes with probability `box`, otherwise strokes; masks larger than `area` are rejected."""

    base: int
    strokes: Strokes
    boxes: Boxes | None
    box: float
    area: float


# LaMa calls its stroke routine with max_times + 1, so the inclusive upper end is one more than in its config.
PRESETS = {
    "train": Preset(256, Strokes((1, 6), 200, 100), Boxes((1, 4), (30, 150), 10), 1 / 2, 1.0),
    "medium": Preset(512, Strokes((4, 11), 200, 100), Boxes((1, 5), (30, 150), 0), 0.3 / 1.3, 0.5),
    "thick": Preset(512, Strokes((1, 6), 450, 250), Boxes((1, 4), (30, 300), 10), 0.3 / 1.3, 0.5),
    "thin": Preset(512, Strokes((4, 71), 100, 20), None, 0.0, 0.5),
}


class MaskSettings(Config):
    """Which published mixture, and how much of an image it may cover."""

    preset: Literal["train", "medium", "thick", "thin"] = Field("train", description="LaMa's configuration")
    area: float | None = Field(None, gt=0, le=1, description="largest share covered; the preset's own by default")


class Mask(Annotator):
    """Random mask (H, W): 255 is to be painted, 0 is kept; never empty."""

    name = "mask"
    version = "mask-1"
    Settings = MaskSettings
    bilevel = True

    def annotate(self, image: np.ndarray, key: str) -> tuple[np.ndarray, Params]:
        """(H, W, 3) to an (H, W) mask, with preset, kind and covered share."""
        settings = self.settings
        assert isinstance(settings, MaskSettings)
        preset = PRESETS[settings.preset]
        limit = preset.area if settings.area is None else settings.area
        generator = self.generator(key)
        height, width = image.shape[:2]
        best: tuple[float, np.ndarray, str] | None = None
        for _ in range(MAX_TRIES):
            boxed = preset.boxes is not None and generator.random() < preset.box
            mask = _boxes(preset, height, width, generator) if boxed else _strokes(preset, height, width, generator)
            share = float(np.count_nonzero(mask)) / mask.size
            if share and (best is None or share < best[0]):
                best = share, mask, "box" if boxed else "irregular"
            if 0 < share <= limit:
                best = share, mask, "box" if boxed else "irregular"
                break
        assert best is not None, "a stroke always touches its starting pixel"
        share, mask, kind = best
        return mask, {"preset": settings.preset, "kind": kind, "share": round(share, 6)}


def _strokes(preset: Preset, height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Broken lines of random direction, length and width."""
    strokes, scale = preset.strokes, min(height, width) / preset.base
    mask = np.zeros((height, width), np.uint8)
    for i in range(int(generator.integers(strokes.times[0], strokes.times[1] + 1))):
        x, y = int(generator.integers(width)), int(generator.integers(height))
        for _ in range(1 + int(generator.integers(5))):
            angle = 0.01 + int(generator.integers(strokes.angle))
            if i % 2 == 0:
                angle = 2 * math.pi - angle
            length = (10 + int(generator.integers(strokes.length))) * scale
            brush = max(1, round((5 + int(generator.integers(strokes.width))) * scale))
            to_x = min(max(int(x + length * math.sin(angle)), 0), width)
            to_y = min(max(int(y + length * math.cos(angle)), 0), height)
            cv2.line(mask, (x, y), (to_x, to_y), 255, brush)
            x, y = to_x, to_y
    return mask


def _boxes(preset: Preset, height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Axis-parallel boxes inside the margin; sides shrink to fit small images."""
    boxes, scale = preset.boxes, min(height, width) / preset.base
    assert boxes is not None
    mask = np.zeros((height, width), np.uint8)
    margin = min(round(boxes.margin * scale), (min(height, width) - 1) // 2)
    for _ in range(int(generator.integers(boxes.times[0], boxes.times[1] + 1))):
        spans = []
        for extent in (height, width):
            room = extent - 2 * margin
            largest = min(max(1, round(boxes.side[1] * scale)), room)
            smallest = min(max(1, round(boxes.side[0] * scale)), largest)
            side = int(generator.integers(smallest, largest + 1))
            start = int(generator.integers(margin, margin + room - side + 1))
            spans.append(slice(start, start + side))
        mask[spans[0], spans[1]] = 255
    return mask
