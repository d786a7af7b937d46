"""Pose adherence: the persons in the drawn image against those in the reference image, by COCO's rules.

There are no hand-labelled keypoints: the same networks look at both images, and what they detect in the reference is
taken as the truth. OKS and average precision as in COCO's keypoint evaluation (Lin et al. 2014, arXiv 1405.0312, and
cocodataset.org), with the area of the box as the person's; PCK of Yang & Ramanan 2013 (IEEE TPAMI 35(12)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ...annotators.base import Annotator
from ...core.errors import SctoolError
from ..intervals import ImageFigures
from ..metrics import FigureInfo
from .base import ControlScore

Person = Mapping[str, Any]
SIGMAS = np.array(
    [0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089,
     0.089]
)  # fmt: skip
"""COCO's spread of each keypoint, as a share of the person's size."""
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 20  # detections per image, as COCO counts them
REACH = 0.2  # share of the box's longer side within which a keypoint is correct
VISIBLE = 0.3  # keypoints of the reference with a higher score count


class PoseScore(ControlScore):
    """Average precision over OKS .50 to .95, share of correct keypoints, share of detected persons."""

    cond = "pose"
    compares_with = "reference"
    independent = True
    figure_info: ClassVar[dict[str, FigureInfo]] = {
        "oks_ap": FigureInfo("OKS-AP", "higher"),
        "pck@0.2": FigureInfo("PCK@0.2", "higher"),
        "recall": FigureInfo("persons detected", "higher"),
    }

    def __init__(self, map_settings: Mapping[str, Any] | None = None, evaluator: Annotator | None = None) -> None:
        super().__init__(map_settings, evaluator)
        self._detections: list[np.ndarray] = []

    @property
    def protocol(self) -> dict[str, Any]:
        """Adds what is taken as the truth."""
        truth = f"persons of the reference picture, keypoints above {VISIBLE}, area of the box"
        return {**super().protocol, "truth": truth}

    def extract(self, images: list[np.ndarray], keys: Sequence[str]) -> list[Sequence[Person]]:
        """The persons in each image."""
        return [params["persons"] for _, params in self.annotator(images, list(keys))]

    def prepare_targets(self, targets: Sequence[np.ndarray], keys: Sequence[str]) -> list[Sequence[Person]]:
        """The persons in each reference image."""
        return self.extract([np.ascontiguousarray(image) for image in targets], keys)

    def update_maps(self, extracted: Sequence[Person], target: Sequence[Person], position: int | None = None) -> None:
        """Adds the persons in an image and in its reference: `keypoints` (17 of x, y, score), `bbox` and `score`."""
        detected = sorted(extracted, key=lambda person: -person["score"])[:MOST]
        expected = [person for person in target if (_points(person)[:, 2] > VISIBLE).any()]
        similarity = np.array([[oks(p, g) for g in expected] for p in detected]).reshape(len(detected), len(expected))
        hits = np.stack([_matched(similarity, t) for t in THRESHOLDS], 1).reshape(len(detected), len(THRESHOLDS))
        scores = np.array([person["score"] for person in detected])
        self._detections.append(np.column_stack([scores, hits]))
        correct = total = 0
        pairs = dict(_pairs(similarity))
        for index, person in enumerate(expected):
            visible = _points(person)[:, 2] > VISIBLE
            total += int(visible.sum())
            if index in pairs:
                x0, y0, x1, y1 = person["bbox"]
                apart = np.linalg.norm(_points(detected[pairs[index]])[:, :2] - _points(person)[:, :2], axis=1)
                correct += int((apart[visible] <= REACH * max(x1 - x0, y1 - y0)).sum())
        recalled = sum(similarity[p, g] >= THRESHOLDS[0] for g, p in pairs.items())
        self.add((correct, total, recalled, len(expected)), position)

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """ "pck@0.2", "recall": shares, 0..1, of the reference's keypoints and persons."""
        return {"pck@0.2": sums[..., 0] / sums[..., 1], "recall": sums[..., 2] / sums[..., 3]}

    def resampled(self, counts: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Adds "oks_ap", which needs the persons of all images in the order of their scores."""
        image_of = np.repeat(np.arange(len(self._detections)), [len(table) for table in self._detections])
        table = np.concatenate(self._detections)
        order = np.argsort(-table[:, 0], kind="mergesort")
        weights, hits = counts[:, image_of[order]], table[order, 1:]
        persons = counts @ rows[:, 3]
        ap = [average_precision(weight, hits, total) for weight, total in zip(weights, persons, strict=True)]
        return {"oks_ap": np.array(ap), **self.figures(counts @ rows)}

    def merge(self, other: ImageFigures) -> None:
        """Adds what another process counted."""
        assert isinstance(other, PoseScore)
        super().merge(other)
        self._detections += other._detections

    def compute(self) -> dict[str, float]:
        """The figures by key. Raises `SctoolError` if no reference image contains a person."""
        if not sum(row[3] for row in self._rows):
            raise SctoolError(f"pose: the {self.n} reference images contain no person, so there is nothing to compare.")
        return super().compute()


def _points(person: Person) -> np.ndarray:
    return np.asarray(person["keypoints"], dtype=np.float64)


def oks(detected: Person, expected: Person) -> float:
    """Object keypoint similarity, 0..1, over the keypoints that are visible in `expected`."""
    p, g = _points(detected), _points(expected)
    x0, y0, x1, y1 = expected["bbox"]
    area = (x1 - x0) * (y1 - y0) + np.spacing(1)
    error = ((p[:, :2] - g[:, :2]) ** 2).sum(1) / (2 * SIGMAS) ** 2 / area / 2
    return float(np.exp(-error[g[:, 2] > VISIBLE]).mean())


def _matched(similarity: np.ndarray, threshold: float) -> np.ndarray:
    """Which detections (P,), most certain first, match an expected person (P, G) at `threshold`, as COCO matches."""
    free, hits = np.ones(similarity.shape[1], bool), np.zeros(len(similarity), bool)
    for index, row in enumerate(similarity):
        best = max(np.flatnonzero(free & (row >= threshold)), key=lambda g: row[g], default=None)
        if best is not None:
            hits[index], free[best] = True, False
    return hits


def _pairs(similarity: np.ndarray) -> list[tuple[int, int]]:
    """(expected, detected), the most similar first, each person once."""
    free, pairs = similarity.copy(), []
    while free.size and free.max() > 0:
        p, g = np.unravel_index(free.argmax(), free.shape)
        pairs.append((int(g), int(p)))
        free[p], free[:, g] = 0, 0
    return pairs


def average_precision(weights: np.ndarray, hits: np.ndarray, persons: float) -> float:
    """Mean over thresholds and 101 recalls of the interpolated precision; NaN without any person.

    weights: how often each detection (D,), most certain first, counts; hits (D, T): is it correct at a threshold.
    """
    if not persons:
        return float("nan")
    correct, all_ = np.cumsum(weights[:, None] * hits, 0), np.cumsum(weights)[:, None]
    precision = np.divide(correct, all_, out=np.zeros_like(correct), where=all_ > 0)
    precision = np.maximum.accumulate(precision[::-1], 0)[::-1]
    total = 0.0
    for column in range(hits.shape[1]):
        at = np.searchsorted(correct[:, column] / persons, RECALLS, side="left")
        total += precision[at[at < len(precision)], column].sum()
    return float(total / (len(RECALLS) * hits.shape[1]))
