"""Outpainting masks: a rectangle of the image is kept, everything around it is to be painted (UniControl 2023)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from ..core.resolving import Config
from .base import Annotator, Params

MAX_STRETCH = 2.0
"""The aspect ratio of a kept rectangle differs from the image's by at most this factor."""


class OutpaintSettings(Config):
    """How much of an image is kept, and where."""

    keep: tuple[float, float] = Field((0.2, 0.6), description="share of the area that is kept, random in LOW-HIGH")
    centre: bool = Field(False, description="keep the centre, with the image's aspect ratio, as UniControl does")

    @field_validator("keep", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """Reads `0.2-0.6`, or one share."""
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
    """Mask (H, W): 0 inside one rectangle is kept; 255 around it is to be painted."""

    name = "outpaint"
    version = "outpaint-1"
    Settings = OutpaintSettings
    bilevel = True

    def annotate(self, image: np.ndarray, key: str) -> tuple[np.ndarray, Params]:
        """(H, W, 3) to a mask (H, W), with the kept rectangle as x0, y0, x1, y1 (ends excluded) and its share."""
        settings = self.settings
        assert isinstance(settings, OutpaintSettings)
        generator = self.generator(key)
        height, width = image.shape[:2]
        share = generator.uniform(*settings.keep)
        stretch = 1.0 if settings.centre else math.exp(generator.uniform(-math.log(MAX_STRETCH), math.log(MAX_STRETCH)))
        # With share s and stretch a, the sides are sqrt(s a) and sqrt(s / a) of the image's; neither may exceed 1.
        stretch = min(max(stretch, share), 1 / share)
        kept_w = min(max(1, round(width * math.sqrt(share * stretch))), width)
        kept_h = min(max(1, round(height * math.sqrt(share / stretch))), height)
        if (kept_w, kept_h) == (width, height):  # a tiny image: paint at least one row or column
            kept_w, kept_h = (max(1, width - 1), kept_h) if width > 1 else (kept_w, max(1, height - 1))
        free_w, free_h = width - kept_w, height - kept_h
        left = free_w // 2 if settings.centre else int(generator.integers(free_w + 1))
        top = free_h // 2 if settings.centre else int(generator.integers(free_h + 1))
        mask = np.full((height, width), 255, np.uint8)
        mask[top : top + kept_h, left : left + kept_w] = 0
        kept_share = round(kept_w * kept_h / (width * height), 6)
        return mask, {"kept": [left, top, left + kept_w, top + kept_h], "share": round(1 - kept_share, 6)}
