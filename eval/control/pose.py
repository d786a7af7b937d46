"""Pose adherence: the persons of the drawn picture against those of the reference picture, by COCO's rules.

Nobody has marked keypoints by hand here: the same networks look at both pictures, and what they find in the reference
counts as true. OKS and average precision as in COCO's keypoint evaluation (Lin et al. 2014, arXiv 1405.0312, and
cocodataset.org), with the box's area for the person's; PCK of Yang & Ramanan 2013 (IEEE TPAMI 35(12)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ...annotators.base import Annotator
from ...core.errors import SctoolError
from ..intervals import PictureFigures
from .base import ControlScore

Person = Mapping[str, Any]
SIGMAS = np.array(
    [0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089,
     0.089]
)  # fmt: skip
"""COCO's spread of each keypoint, as a share of the person's size."""
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 20  # detections a picture, as COCO counts them
REACH = 0.2  # of the box's longer side, within which a keypoint is right
VISIBLE = 0.3  # least score of a keypoint of the reference


class PoseScore(ControlScore):
    """Average precision over OKS .50 to .95, share of keypoints within a fifth of the box, share of persons found."""

    cond = "pose"
    reads = "reference"
    judged = True
    better: ClassVar[dict[str, str]] = {"oks_ap": "higher", "pck@0.2": "higher", "recall": "higher"}

    def __init__(self, made: Mapping[str, Any] | None = None, evaluator: Annotator | None = None) -> None:
        super().__init__(made, evaluator)
        self._detections: list[np.ndarray] = []

    @property
    def protocol(self) -> dict[str, Any]:
        """Annotator and what counts as true."""
        truth = f"persons of the reference picture, keypoints above {VISIBLE}, area of the box"
        return {**super().protocol, "truth": truth}

    def extract(self, pictures: list[np.ndarray], keys: Sequence[str]) -> list[Sequence[Person]]:
        """The persons of each picture."""
        return [params["persons"] for _, params in self.annotator(pictures, list(keys))]

    def targets(self, wanted: Sequence[np.ndarray], keys: Sequence[str]) -> list[Sequence[Person]]:
        """The persons of each reference picture."""
        return self.extract([np.ascontiguousarray(picture) for picture in wanted], keys)

    def update_maps(self, found: Sequence[Person], wanted: Sequence[Person], position: int | None = None) -> None:
        """Adds the persons of a picture and of its reference: `keypoints` (17 of x, y, score), `bbox` and `score`."""
        found = sorted(found, key=lambda person: -person["score"])[:MOST]
        wanted = [person for person in wanted if (_points(person)[:, 2] > VISIBLE).any()]
        likeness = np.array([[oks(p, g) for g in wanted] for p in found]).reshape(len(found), len(wanted))
        hits = np.stack([_matched(likeness, t) for t in THRESHOLDS], 1).reshape(len(found), len(THRESHOLDS))
        scores = np.array([person["score"] for person in found])
        self._detections.append(np.column_stack([scores, hits]))
        right = seen = 0
        pairs = dict(_pairs(likeness))
        for index, person in enumerate(wanted):
            visible = _points(person)[:, 2] > VISIBLE
            seen += int(visible.sum())
            if index in pairs:
                x0, y0, x1, y1 = person["bbox"]
                apart = np.linalg.norm(_points(found[pairs[index]])[:, :2] - _points(person)[:, :2], axis=1)
                right += int((apart[visible] <= REACH * max(x1 - x0, y1 - y0)).sum())
        there = sum(likeness[p, g] >= THRESHOLDS[0] for g, p in pairs.items())
        self.add((right, seen, there, len(wanted)), position)

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """ "pck@0.2", "recall"; both 0..1, of the reference's keypoints and persons."""
        return {"pck@0.2": sums[..., 0] / sums[..., 1], "recall": sums[..., 2] / sums[..., 3]}

    def resampled(self, counts: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Adds "oks_ap", which needs all pictures' persons in the order of their scores."""
        whose = np.repeat(np.arange(len(self._detections)), [len(each) for each in self._detections])
        table = np.concatenate(self._detections)
        order = np.argsort(-table[:, 0], kind="mergesort")
        weights, hits = counts[:, whose[order]], table[order, 1:]
        persons = counts @ rows[:, 3]
        ap = [average_precision(weight, hits, there) for weight, there in zip(weights, persons, strict=True)]
        return {"oks_ap": np.array(ap), **self.figures(counts @ rows)}

    def merge(self, other: PictureFigures) -> None:
        """Adds what another process has counted."""
        assert isinstance(other, PoseScore)
        super().merge(other)
        self._detections += other._detections

    def compute(self) -> dict[str, float]:
        """The figures. Raises `SctoolError` where no reference shows a person."""
        if not sum(row[3] for row in self._rows):
            raise SctoolError(f"pose: nobody is in the {self.n} reference pictures, so there is nothing to compare.")
        return super().compute()


def _points(person: Person) -> np.ndarray:
    return np.asarray(person["keypoints"], dtype=np.float64)


def oks(found: Person, wanted: Person) -> float:
    """Object keypoint similarity, 0..1, over the keypoints that are visible in `wanted`."""
    p, g = _points(found), _points(wanted)
    x0, y0, x1, y1 = wanted["bbox"]
    area = (x1 - x0) * (y1 - y0) + np.spacing(1)
    error = ((p[:, :2] - g[:, :2]) ** 2).sum(1) / (2 * SIGMAS) ** 2 / area / 2
    return float(np.exp(-error[g[:, 2] > VISIBLE]).mean())


def _matched(likeness: np.ndarray, threshold: float) -> np.ndarray:
    """Which of the found persons (P,), surest first, takes one of the wanted (P, G) at `threshold`, as COCO matches."""
    left, hits = np.ones(likeness.shape[1], bool), np.zeros(len(likeness), bool)
    for index, row in enumerate(likeness):
        best = max(np.flatnonzero(left & (row >= threshold)), key=lambda g: row[g], default=None)
        if best is not None:
            hits[index], left[best] = True, False
    return hits


def _pairs(likeness: np.ndarray) -> list[tuple[int, int]]:
    """(wanted, found), the likest first, each person once."""
    left, pairs = likeness.copy(), []
    while left.size and left.max() > 0:
        p, g = np.unravel_index(left.argmax(), left.shape)
        pairs.append((int(g), int(p)))
        left[p], left[:, g] = 0, 0
    return pairs


def average_precision(weights: np.ndarray, hits: np.ndarray, persons: float) -> float:
    """Mean over thresholds and 101 recalls of the interpolated precision; NaN for no person.

    weights: how often each detection (D,), surest first, is there; hits (D, T): whether it is right at a threshold.
    """
    if not persons:
        return float("nan")
    right, all_ = np.cumsum(weights[:, None] * hits, 0), np.cumsum(weights)[:, None]
    precision = np.divide(right, all_, out=np.zeros_like(right), where=all_ > 0)
    precision = np.maximum.accumulate(precision[::-1], 0)[::-1]
    total = 0.0
    for column in range(hits.shape[1]):
        at = np.searchsorted(right[:, column] / persons, RECALLS, side="left")
        total += precision[at[at < len(precision)], column].sum()
    return float(total / (len(RECALLS) * hits.shape[1]))
