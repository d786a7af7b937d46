"""Conditions: what each map shows, how it becomes the RGB hint that a tuner sees, and how `--cond` is written.

The annotator of a condition is in `annotators/NAME.py`, its adherence metric in `eval/control/`. Imports neither torch
nor numpy, so that the command line can name the conditions in its help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    import numpy as np

Render = Callable[["np.ndarray", "np.ndarray"], "np.ndarray"]
"""(map (H, W) or (H, W, 3), image (H, W, 3)) -> RGB hint (H, W, 3); all uint8 and of one size."""


def _as_rgb(map: np.ndarray, image: np.ndarray) -> np.ndarray:
    return map[..., None].repeat(3, axis=2) if map.ndim == 2 else map


def _masked(map: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The image with the area to be painted (mask 255) set to 0, as in SCEdit's inpainting."""
    import numpy as np

    hole = (map if map.ndim == 2 else map[..., 0]) >= 128
    return np.where(hole[..., None], np.uint8(0), image)


def _class_colours(map: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Class ids in ADE20K's colours, 150 and above black. A map that is already in colour is returned unchanged."""
    from .palette import CLASS_COLOURS

    return CLASS_COLOURS[map] if map.ndim == 2 else map


@dataclass(frozen=True)
class Condition:
    """One kind of condition map."""

    name: str
    summary: str = ""
    network: bool = False
    """Its annotator runs a network, whose weights must be on this machine."""
    render: Render = _as_rgb
    needs_image: bool = False
    """`render` reads the image's pixels, not only its size."""
    categorical: bool = False
    """Map values are class ids: resized by nearest neighbour only; some classes share a colour."""


CONDITIONS: dict[str, Condition] = {
    condition.name: condition
    for condition in (
        Condition("canny", "Canny edges (1 bit)"),
        Condition("color", "colour palette at 1/64 of the size"),
        Condition("mask", "free-form inpainting masks, 255 = to be painted (1 bit)", render=_masked, needs_image=True),
        Condition("outpaint", "outpainting masks, 255 = to be painted (1 bit)", render=_masked, needs_image=True),
        Condition("hed", "soft edges (8 bit)", network=True),
        Condition("sketch", "sketches, thinned soft edges (1 bit)", network=True),
        Condition("depth", "relative depth, near is bright (8 bit)", network=True),
        Condition("seg", "semantic segmentation, ADE20K class ids (8 bit)", network=True, render=_class_colours,
                  categorical=True),
        Condition("pose", "human pose as OpenPose draws it, keypoints in the metadata (RGB)", network=True),
    )
}  # fmt: skip
"""The conditions that sctool can annotate and measure."""

MAP_FOLDERS = CONDITIONS.keys() | {"inpaint", "lineart", "mlsd", "normal", "pidi", "scribble", "softedge", "teed"}
"""Folder names that mark their files as maps rather than images, also outside `conditions/`."""


def condition(name: str) -> Condition:
    """The condition of that name. One that sctool cannot annotate is shown to the tuner unchanged."""
    return CONDITIONS.get(name) or Condition(name)


def condition_names(*, network: bool) -> str:
    """The conditions whose annotator runs a network, or those that need none: `canny, color, ...`."""
    return ", ".join(name for name, condition in CONDITIONS.items() if condition.network == network)


# ------------------------------------------------------------------------------------------------- syntax of --cond


@dataclass(frozen=True)
class ConditionSpec:
    """A condition with annotator settings, e.g. `canny:low=50,high=150`."""

    name: str
    settings: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.settings}" if self.settings else self.name


def parse_conditions(text: str | Iterable[str], flag: str = "--cond") -> tuple[ConditionSpec, ...]:
    """Conditions from `canny:low=50,high=150,color` (one string or several). Names are not checked here.

    A part such as `high=150` belongs to the condition before it.
    Raises `UsageError` for settings without a condition, and for a condition given twice.
    """
    texts = [text] if isinstance(text, str) else text
    specs: list[tuple[str, list[str]]] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, colon, rest = part.partition(":")
        if "=" in name:
            if not specs:
                raise UsageError(f"{flag} '{part}' belongs to no condition. Write one first, e.g. canny:{part}.")
            specs[-1][1].append(part)
        elif name:
            specs.append((name.strip(), [rest] if colon else []))
    names = [name for name, _ in specs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{flag} names '{name}' twice.")
    return tuple(ConditionSpec(name, ",".join(settings)) for name, settings in specs)
