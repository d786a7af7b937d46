"""Spatial palette: the image at 1/64 of its size, as T2I-Adapter, webui and scepter make it.

The published algorithm then enlarges it again by nearest neighbour. Here the small image is stored, a fiftieth of the
bytes; it is enlarged when loaded, exactly, because width and height are among the parameters.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from ..core.resolving import Config
from .base import Annotator, Params

FILTERS = {"cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}


class ColorSettings(Config):
    """How coarse the palette is, and how its colours are computed."""

    ratio: int = Field(64, ge=1, description="image pixels per palette cell and side")
    filter: Literal["cubic", "area"] = Field(
        "cubic", description="cubic: as published, from 4x4 pixels per cell; area: the mean of the cell"
    )


class Color(Annotator):
    """Palette (max(1, H // ratio), max(1, W // ratio), 3) RGB."""

    name = "color"
    version = "color-1"
    Settings = ColorSettings

    def annotate(self, image: np.ndarray, key: str) -> tuple[np.ndarray, Params]:
        """(H, W, 3) RGB to the small palette; `width` and `height` are the image's."""
        settings = self.settings
        assert isinstance(settings, ColorSettings)
        height, width = image.shape[:2]
        cells = max(1, width // settings.ratio), max(1, height // settings.ratio)
        palette = cv2.resize(image, cells, interpolation=FILTERS[settings.filter])
        return palette, {"ratio": settings.ratio, "filter": settings.filter, "width": width, "height": height}


def enlarge(palette: np.ndarray, width: int, height: int) -> np.ndarray:
    """The palette at the image's size, (height, width, 3): a block of one colour per cell."""
    return cv2.resize(palette, (width, height), interpolation=cv2.INTER_NEAREST)
