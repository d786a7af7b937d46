"""Canny edges: `cv2.Canny` on RGB with thresholds 100/200, as ControlNet, T2I-Adapter and SCEdit use it."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from ..core.errors import UsageError
from ..core.resolving import Config
from .base import Annotator, Params

# Published ranges of random training thresholds, half open: (low, high).
RANDOM_RANGES = {
    "scepter": ((50, 100), (200, 350)),  # scepter CannyAnnotator RANDOM_CFG, by SCEdit's authors
    "t2i": ((50, 150), (150, 250)),  # T2I-Adapter AddCannyRandomThreshold: 100 and 200, each -50 to +49
}


class CannySettings(Config):
    """Thresholds of the gradient magnitude (L1, aperture 3), fixed or random for each image."""

    low: int = Field(100, ge=0, description="weak edges above this are kept when they touch strong ones")
    high: int = Field(200, ge=0, description="strong edges")
    random: Literal["none", "scepter", "t2i"] = Field("none", description="random thresholds from a published range")


class Canny(Annotator):
    """Edges 255 on 0, at the image's size; equal to `cv2.Canny(rgb, low, high)` bit for bit."""

    name = "canny"
    version = "canny-1"
    Settings = CannySettings
    bilevel = True

    @classmethod
    def parse(cls, text: str = "", seed: int = 0) -> Annotator:
        """As in the base class; fixed and random thresholds exclude each other."""
        annotator = super().parse(text, seed)
        given = annotator.settings.model_fields_set
        if "random" in given and given & {"low", "high"}:
            raise UsageError("canny random= chooses both thresholds; leave out low= and high=, or random=.")
        return annotator

    def made_with_same_settings(self, params: Params) -> bool:
        """As in the base class. Two recorded thresholds imply `random=none`, which is not recorded with a map."""
        fixed = {"random": "none"} if {"low", "high"} <= params.keys() else {}
        return super().made_with_same_settings({**fixed, **params})

    def thresholds(self, key: str) -> tuple[int, int]:
        """(low, high) of the image with this key."""
        settings = self.settings
        assert isinstance(settings, CannySettings)
        if settings.random == "none":
            return settings.low, settings.high
        generator = self.generator(key)
        (low0, low1), (high0, high1) = RANDOM_RANGES[settings.random]
        return int(generator.integers(low0, low1)), int(generator.integers(high0, high1))

    def annotate(self, image: np.ndarray, key: str) -> tuple[np.ndarray, Params]:
        """(H, W, 3) RGB to an (H, W) map of 0 and 255, with the thresholds used.

        The order of the channels matters: of equal gradients the first channel's is used, so BGR gives other edges.
        """
        low, high = self.thresholds(key)
        return edges(image, low, high), {"low": low, "high": high}


STRIP = 1 << 17
"""Pixels whose gradients fit into a processor's cache."""


def edges(image: np.ndarray, low: int, high: int) -> np.ndarray:
    """`cv2.Canny(image, low, high)` of (H, W, 3) uint8, bit for bit and in about half the time.

    At each pixel OpenCV uses the gradient of the channel where |dx| + |dy| is largest (the first of equal ones), in a
    loop over pixels. Here the same choice is made for whole channels, with vector instructions.
    """
    height, width = image.shape[:2]
    step = max(1, STRIP // width)
    if step >= height:
        return cv2.Canny(*_gradients(image), low, high)
    dx, dy = (np.empty((height, width), np.int16) for _ in range(2))
    for top in range(0, height, step):
        above = min(top, 1)  # include the neighbouring row, so that only the image's border is replicated
        x, y = _gradients(image[top - above : top + step + 1])
        dx[top : top + step], dy[top : top + step] = x[above : above + step], y[above : above + step]
    return cv2.Canny(dx, dy, low, high)


def _gradients(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 3x3 Sobel gradients of the channel where they are largest, two int16 (H, W)."""
    channels = cv2.split(image)
    dx, dy = cv2.spatialGradient(channels[0], borderType=cv2.BORDER_REPLICATE)
    size = np.abs(dx) + np.abs(dy)
    for channel in channels[1:]:
        x, y = cv2.spatialGradient(channel, borderType=cv2.BORDER_REPLICATE)
        larger = np.abs(x) + np.abs(y)
        wins = cv2.compare(larger, size, cv2.CMP_GT)
        cv2.copyTo(x, wins, dx)
        cv2.copyTo(y, wins, dy)
        size = cv2.max(size, larger)
    return dx, dy
