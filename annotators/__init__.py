"""Annotators: from an image to its condition map. One file per condition and one row in the table `ANNOTATORS`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..core.data.conditions import parse_conditions
from ..core.errors import UsageError, unknown
from .base import Annotator
from .canny import Canny
from .color import Color
from .depth import Depth
from .hed import Hed
from .mask import Mask
from .outpaint import Outpaint
from .pose import Pose
from .seg import Seg
from .sketch import Sketch

ANNOTATORS: dict[str, type[Annotator]] = {
    cls.name: cls for cls in (Canny, Color, Mask, Outpaint, Hed, Sketch, Depth, Seg, Pose)
}


def make_annotators(conditions: str | Iterable[str], seed: int = 0, flag: str = "--cond") -> tuple[Annotator, ...]:
    """Annotators from `canny:low=50,high=150,color` (one string or several; see `core.data.conditions`).

    Raises `UsageError` for an unknown condition or setting (naming the nearest), for one given twice, and for none.
    """
    specs = parse_conditions(conditions, flag)
    if not specs:
        raise UsageError(f"{flag} names no condition. Known: {', '.join(sorted(ANNOTATORS))}.")
    for spec in specs:
        if spec.name not in ANNOTATORS:
            raise unknown("condition", spec.name, ANNOTATORS)
    return tuple(ANNOTATORS[spec.name].parse(spec.settings, seed) for spec in specs)


def annotator(condition: str, seed: int = 0) -> Annotator:
    """One annotator from its name, with or without settings: `canny`, `canny:low=50,high=150`."""
    return make_annotators(condition, seed)[0]


def annotator_like(name: str, map_settings: Mapping[str, Any] | None = None, seed: int = 0) -> Annotator:
    """The annotator that makes maps as `map_settings` says, which tuner files and annotated sets note.

    What it does not say is the annotator's default. Raises `UsageError` for an unknown condition.
    """
    if name not in ANNOTATORS:
        raise unknown("condition", name, ANNOTATORS)
    cls = ANNOTATORS[name]
    known = {key: value for key, value in (map_settings or {}).items() if key in cls.Settings.model_fields}
    return cls(cls.Settings.model_validate(known), seed)
