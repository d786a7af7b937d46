"""Annotators: picture to condition map. `ANNOTATORS` is the only table of names: a condition is a file and a row."""

from __future__ import annotations

from collections.abc import Iterable

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


def parse_conditions(specs: Iterable[str], seed: int = 0) -> tuple[Annotator, ...]:
    """Annotators from `canny,color` or `canny:low=50,high=150,color` (one text or several).

    A part with `=` and without a condition's name belongs to the condition before it.
    Raises `UsageError` for an unknown condition or setting (naming the nearest), one given twice, or none at all.
    """
    wanted: list[tuple[str, list[str]]] = []
    for part in (part.strip() for spec in specs for part in spec.split(",")):
        name, colon, rest = part.partition(":")
        if "=" in name:
            if not wanted:
                raise UsageError(f"--cond '{part}' sets nothing: name the condition first, e.g. canny:{part}.")
            wanted[-1][1].append(part)
        elif name:
            wanted.append((name.strip(), [rest] if colon else []))
    if not wanted:
        raise UsageError(f"--cond names no condition. Known: {', '.join(sorted(ANNOTATORS))}.")
    found: dict[str, Annotator] = {}
    for name, settings in wanted:
        if name not in ANNOTATORS:
            raise unknown("condition", name, ANNOTATORS)
        if name in found:
            raise UsageError(f"--cond names '{name}' twice.")
        found[name] = ANNOTATORS[name].parse(",".join(settings), seed)
    return tuple(found.values())


def annotator(name: str, seed: int = 0) -> Annotator:
    """One annotator from its name, with settings or without: `canny`, `canny:low=50,high=150`."""
    (found,) = parse_conditions([name], seed)
    return found
