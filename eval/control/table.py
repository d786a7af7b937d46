"""The table of control scores: condition -> how closely images follow it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...annotators import ANNOTATORS
from ...core.errors import SctoolError
from ..metrics import Metric
from .base import ControlScore


def scores() -> dict[str, type[ControlScore]]:
    """Condition -> score, for the conditions that can be annotated."""
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


def conditions_of(metric: Metric) -> set[str]:
    """The conditions that a control metric measures."""
    return {cond for cond, cls in scores().items() if metric.hints == "all" or cls.metric == metric.name}


def measures(
    conds: Sequence[str], map_settings: Mapping[str, Any], note: Callable[[str], None] = lambda text: None
) -> dict[str, Callable[..., dict[str, float]]]:
    """For each condition that can be measured from its hint, a function (images, hints[, keys]) -> figures by key.

    images, hints: uint8 (H, W, 3) each; `map_settings` by condition, as in `ControlScore`. The function returns {} if
    every hint is empty. Conditions that need more than the hint, or missing weights, are left out with a `note`.
    """

    def measure(cls: type[ControlScore]) -> Callable[..., dict[str, float]]:
        def figures(
            images: Sequence[np.ndarray], hints: Sequence[np.ndarray], keys: Sequence[str] | None = None
        ) -> dict[str, float]:
            score = cls(map_settings.get(cls.cond))
            score.update(images, hints, keys)
            return score.compute() if score.n else {}

        return figures

    functions = {}
    for name, cls in scores().items():
        if name not in conds:
            continue
        if cls.compares_with != "hint":
            note(f"{name} adherence is not measured during training; `sctool evaluate` measures it.")
            continue
        try:
            cls(map_settings.get(name)).ready()
        except SctoolError as error:
            note(f"{name} adherence is not measured: {error}")
            continue
        functions[name] = measure(cls)
    return functions
