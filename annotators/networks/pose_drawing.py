"""Poses drawn in OpenPose's style: COCO's 17 keypoints to OpenPose's 18, limbs as ellipses, joints as discs.

Colours, order and rounding are those of ControlNet 1.1 and controlnet_aux (open_pose/util.py, draw_bodypose), so that
tuners and ControlNets trained on their maps work with these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import cv2
import numpy as np

Point = tuple[float, float] | None

JOINTS = 17
LEFT_SHOULDER, RIGHT_SHOULDER = 5, 6
# COCO's index of OpenPose's nose, neck, right arm, left arm, right leg, left leg, eyes, ears; None for the neck.
FROM_COCO = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255),
    (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
STICK = 4
"""Half the width of a limb, and the radius of a joint, in pixels."""


def to_openpose(keypoints: Sequence[Sequence[float]], threshold: float) -> list[Point]:
    """OpenPose's 18 points of COCO's 17 keypoints (x, y, score); None where the score is not above `threshold`.

    The neck is the midpoint of the shoulders, if both are visible.
    """
    visible: list[Point] = [(x, y) if score > threshold else None for x, y, score in keypoints]
    left, right = visible[LEFT_SHOULDER], visible[RIGHT_SHOULDER]
    neck = ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2) if left and right else None
    return [neck if i is None else visible[i] for i in FROM_COCO]


def draw_pose(canvas: np.ndarray, points: Sequence[Point]) -> None:
    """Draws one person's 18 points, in pixels, onto an RGB canvas (H, W, 3) uint8."""
    for (a, b), colour in zip(LIMBS, COLOURS, strict=False):  # the last colour is only for a joint
        start, end = points[a], points[b]
        if start is None or end is None:
            continue
        (x0, y0), (x1, y1) = start, end
        centre = int((x0 + x1) / 2), int((y0 + y1) / 2)
        length = math.hypot(x0 - x1, y0 - y1)
        angle = math.degrees(math.atan2(y0 - y1, x0 - x1))
        limb = cv2.ellipse2Poly(centre, (int(length / 2), STICK), int(angle), 0, 360, 1)
        cv2.fillConvexPoly(canvas, limb, [int(value * 0.6) for value in colour])
    for point, colour in zip(points, COLOURS, strict=True):
        if point is not None:
            cv2.circle(canvas, (int(point[0]), int(point[1])), STICK, colour, thickness=-1)


def draw_poses(people: Iterable[Sequence[Sequence[float]]], height: int, width: int, threshold: float) -> np.ndarray:
    """RGB (height, width, 3) uint8: all persons, given by their COCO keypoints, on black."""
    canvas = np.zeros((height, width, 3), np.uint8)
    for keypoints in people:
        draw_pose(canvas, to_openpose(keypoints, threshold))
    return canvas
