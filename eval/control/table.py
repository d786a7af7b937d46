"""The table of control metrics: condition -> how far pictures keep to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...annotators import ANNOTATORS
from ...core.errors import SctoolError
from .base import ControlScore

EDGES, SEGMENTATION = ("canny", "sketch"), ("seg",)
"""The conditions that `--nmse` and `--iou` select."""


def scores() -> dict[str, type[ControlScore]]:
    """Condition -> metric, for the conditions that can be annotated."""
    from .colors import ColorScore
    from .depth import DepthScore
    from .edges import EdgeScore, SketchScore
    from .pose import PoseScore
    from .preservation import OutpaintScore, OutsideScore
    from .segmentation import SegmentationScore
    from .soft_edges import SoftEdgeScore

    table = (
        EdgeScore, SketchScore, ColorScore, OutsideScore, OutpaintScore, SoftEdgeScore, DepthScore, SegmentationScore,
        PoseScore,
    )  # fmt: skip
    return {cls.cond: cls for cls in table if cls.cond in ANNOTATORS}


def measures(
    conds: Sequence[str], made: Mapping[str, Any], note: Callable[[str], None] = lambda text: None
) -> dict[str, Callable[..., dict[str, float]]]:
    """For each condition that can be measured from its hint, a function (pictures, hints[, keys]) -> figures by name.

    pictures, hints: uint8 (H, W, 3) each; `made` as in `ControlScore`. Without any hint that is not empty: {}.
    Conditions that need more than the hint, or weights that are not at hand, are left out and `note` is told.
    """

    def measure(cls: type[ControlScore]) -> Callable[..., dict[str, float]]:
        def figures(
            pictures: Sequence[np.ndarray], hints: Sequence[np.ndarray], keys: Sequence[str] | None = None
        ) -> dict[str, float]:
            score = cls(made.get(cls.cond))
            score.update(pictures, hints, keys)
            return score.compute() if score.n else {}

        return figures

    ready = {}
    for name, cls in scores().items():
        if name not in conds:
            continue
        if cls.reads != "hint":
            note(f"{name} adherence is not measured while training; `sctool evaluate` measures it.")
            continue
        try:
            cls(made.get(name)).ready()
        except SctoolError as error:
            note(f"{name} adherence is not measured: {error}")
            continue
        ready[name] = measure(cls)
    return ready
