"""Sketch lines, black and white: ControlNet's scribble from HED, or T2I-Adapter's sketch from PiDiNet."""

from __future__ import annotations

import cv2
import numpy as np

from .base import Params
from .hed import EdgeAnnotator, EdgeSettings, to_bytes

# Lines in four directions through a pixel; a ridge is a pixel that is the maximum along one of them.
LINES = [
    np.array(line, np.uint8)
    for line in (
        [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
        [[0, 1, 0], [0, 1, 0], [0, 1, 0]],
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0, 0, 1], [0, 1, 0], [1, 0, 0]],
    )
]


class Sketch(EdgeAnnotator):
    """Lines 255 on 0, at the image's size. The network decides the rule: scribble for HED, a threshold for PiDiNet."""

    name = "sketch"
    version = "sketch-1"
    Settings = EdgeSettings
    bilevel = True

    def maps(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, Params]]:
        """As in the base class; the params name the `rule`."""
        if self.network.bgr:  # T2I-Adapter's sketch
            return [((edge > 0.5).astype(np.uint8) * 255, {"rule": "above one half"}) for edge in self.edges(images)]
        return [(scribble(to_bytes(edge)), {"rule": "scribble"}) for edge in self.edges(images)]


def scribble(edge: np.ndarray) -> np.ndarray:
    """ControlNet's scribble of uint8 soft edges (H, W): thickened ridges, 0 and 255."""
    thick = cv2.GaussianBlur(ridges(edge, 127, 3.0), (0, 0), 3.0)
    return np.where(thick > 4, np.uint8(255), np.uint8(0))


def ridges(edge: np.ndarray, above: float, sigma: float) -> np.ndarray:
    """255 where the blurred edge is above `above` and maximal along a line (ControlNet's annotator/util.py, nms)."""
    blurred = cv2.GaussianBlur(edge.astype(np.float32), (0, 0), sigma)
    ridge = np.any([cv2.dilate(blurred, line) == blurred for line in LINES], axis=0)
    return np.where(ridge & (blurred > above), np.uint8(255), np.uint8(0))
