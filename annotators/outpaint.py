"""Outpainting masks: a rectangle of the picture is kept and all around it is to be painted (UniControl 2023)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from ..core.config import Config
from .base import Annotator, Params

SHAPE = 2.0
"""A kept rectangle is at most this many times wider, or narrower, than the picture's own proportions."""


class OutpaintSettings(Config):
    """How much of a picture is kept, and where."""

    keep: tuple[float, float] = Field((0.2, 0.6), description="share of the area kept, drawn from this range: LOW-HIGH")
    centre: bool = Field(False, description="keep the middle, in the picture's proportions, as UniControl does")

    @field_validator("keep", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """`0.2-0.6`, or one share."""
        if not isinstance(value, str):
            return value
        low, _, high = value.partition("-")
        return (low, high or low)

    @field_validator("keep")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] < 1:
            raise ValueError("write it as LOW-HIGH with 0 < LOW <= HIGH < 1, e.g. 0.2-0.6")
        return value


class Outpaint(Annotator):
    """Mask (H, W): 255, outside of one rectangle, is to be painted; 0, inside, is kept."""

    name = "outpaint"
    version = "outpaint-1"
    Settings = OutpaintSettings
    bilevel = True

    def annotate(self, image: np.ndarray, key: str) -> tuple[np.ndarray, Params]:
        """(H, W, 3) to an (H, W) mask, with the kept rectangle as x0, y0, x1, y1 (ends not included) and its share."""
        settings = self.settings
        assert isinstance(settings, OutpaintSettings)
        generator = self.generator(key)
        height, width = image.shape[:2]
        share = generator.uniform(*settings.keep)
        stretch = 1.0 if settings.centre else math.exp(generator.uniform(-math.log(SHAPE), math.log(SHAPE)))
        # A share s of stretch a has sides sqrt(s a) and sqrt(s / a) of the picture's: neither may pass the whole.
        stretch = min(max(stretch, share), 1 / share)
        kept_w = min(max(1, round(width * math.sqrt(share * stretch))), width)
        kept_h = min(max(1, round(height * math.sqrt(share / stretch))), height)
        if (kept_w, kept_h) == (width, height):  # a picture of few pixels
            kept_w, kept_h = (max(1, width - 1), kept_h) if width > 1 else (kept_w, max(1, height - 1))
        free_w, free_h = width - kept_w, height - kept_h
        left = free_w // 2 if settings.centre else int(generator.integers(free_w + 1))
        top = free_h // 2 if settings.centre else int(generator.integers(free_h + 1))
        mask = np.full((height, width), 255, np.uint8)
        mask[top : top + kept_h, left : left + kept_w] = 0
        kept = round(kept_w * kept_h / (width * height), 6)
        return mask, {"kept": [left, top, left + kept_w, top + kept_h], "share": round(1 - kept, 6)}
