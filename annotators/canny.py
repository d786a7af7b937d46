"""Canny edges: `cv2.Canny` on RGB with thresholds 100/200, as ControlNet, T2I-Adapter and SCEdit use it."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from ..core.config import Config
from ..core.errors import UsageError
from .base import Annotator, Params

# Published ranges of random training thresholds, half open: (low, high).
RANDOM_RANGES = {
    "scepter": ((50, 100), (200, 350)),  # scepter CannyAnnotator RANDOM_CFG, by SCEdit's authors
    "t2i": ((50, 150), (150, 250)),  # T2I-Adapter AddCannyRandomThreshold: 100 and 200, each -50 to +49
}


class CannySettings(Config):
    """Thresholds of the gradient magnitude (L1, aperture 3), fixed or drawn for each picture."""

    low: int = Field(100, ge=0, description="weak edges above this are kept when they touch strong ones")
    high: int = Field(200, ge=0, description="strong edges")
    random: Literal["none", "scepter", "t2i"] = Field("none", description="draw thresholds from a published range")


class Canny(Annotator):
    """Edges 255 on 0, at the picture's size; equal to `cv2.Canny(rgb, low, high)` bit for bit."""

    name = "canny"
    version = "canny-1"
    summary = "edges of cv2.Canny on RGB (1 bit)"
    Settings = CannySettings
    bilevel = True

    @classmethod
    def parse(cls, text: str = "", seed: int = 0) -> Annotator:
        """As in the contract; fixed and drawn thresholds exclude each other."""
        annotator = super().parse(text, seed)
        given = annotator.settings.model_fields_set
        if "random" in given and given & {"low", "high"}:
            raise UsageError("canny random= draws both thresholds; leave out low= and high=, or random=.")
        return annotator

    def thresholds(self, key: str) -> tuple[int, int]:
        """(low, high) of the picture named `key`."""
        settings = self.settings
        assert isinstance(settings, CannySettings)
        if settings.random == "none":
            return settings.low, settings.high
        generator = self.generator(key)
        (low0, low1), (high0, high1) = RANDOM_RANGES[settings.random]
        return int(generator.integers(low0, low1)), int(generator.integers(high0, high1))

    def annotate(self, image: np.ndarray, key: str) -> tuple[np.ndarray, Params]:
        """(H, W, 3) RGB to an (H, W) map of 0 and 255, with the thresholds used.

        The channels' order matters: of equal gradients the first channel's is taken, so BGR gives other edges.
        """
        low, high = self.thresholds(key)
        return cv2.Canny(image, low, high), {"low": low, "high": high}
