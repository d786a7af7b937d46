"""Spatial palette: the picture at 1/64 of its size, as T2I-Adapter, webui and scepter make it.

The published algorithm then enlarges it again by nearest neighbour. Stored is the small picture: a fiftieth of the
bytes, and the enlargement at load is exact because width and height are among the parameters.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from ..core.config import Config
from .base import Annotator, Params

FILTERS = {"cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}


class ColorSettings(Config):
    """How coarse the palette is, and how its colours are found."""

    ratio: int = Field(64, ge=1, description="pixels of the picture a palette cell, each way")
    filter: Literal["cubic", "area"] = Field(
        "cubic", description="cubic: the published sampling of 4x4 pixels a cell; area: the true mean of the cell"
    )


class Color(Annotator):
    """Palette (max(1, H // ratio), max(1, W // ratio), 3) RGB."""

    name = "color"
    version = "color-1"
    Settings = ColorSettings

    def annotate(self, image: np.ndarray, key: str) -> tuple[np.ndarray, Params]:
        """(H, W, 3) RGB to the small palette; `width` and `height` are the picture's."""
        settings = self.settings
        assert isinstance(settings, ColorSettings)
        height, width = image.shape[:2]
        cells = max(1, width // settings.ratio), max(1, height // settings.ratio)
        palette = cv2.resize(image, cells, interpolation=FILTERS[settings.filter])
        return palette, {"ratio": settings.ratio, "filter": settings.filter, "width": width, "height": height}


def enlarge(palette: np.ndarray, width: int, height: int) -> np.ndarray:
    """The palette at the picture's size, (height, width, 3): each cell one block of its colour."""
    return cv2.resize(palette, (width, height), interpolation=cv2.INTER_NEAREST)
