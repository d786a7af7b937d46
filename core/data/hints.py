"""Maps as the picture that a tuner sees: uint8 RGB, the same for training, preview and sampling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .palette import ADE20K


def render(cond: str, map: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The RGB hint (H,W,3) uint8 of a map (H,W) or (H,W,3) for its picture (H,W,3); sizes must agree."""
    return _RENDERERS.get(cond, _as_is)(map, image)


def needs_image(cond: str) -> bool:
    """Whether `render` looks at the picture for this condition; otherwise any picture of the size will do."""
    return _RENDERERS.get(cond) is _masked


def is_categorical(cond: str) -> bool:
    """Whether a map's values are names and not quantities: such a map is resized by nearest neighbour alone."""
    return _RENDERERS.get(cond) is _coloured


def _as_is(map: np.ndarray, image: np.ndarray) -> np.ndarray:
    return np.repeat(map[..., None], 3, axis=2) if map.ndim == 2 else map


def _masked(map: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The picture with what is to be painted (mask 255) set to 0, as in SCEdit's inpainting."""
    hole = (map if map.ndim == 2 else map[..., 0]) >= 128
    return np.where(hole[..., None], np.uint8(0), image)


def _coloured(map: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Class ids in ADE20K's colours, 150 and above black; a map that has colours already as it is."""
    return _COLOURS[map] if map.ndim == 2 else map


_COLOURS = np.concatenate([ADE20K, np.zeros((256 - len(ADE20K), 3), np.uint8)])
_RENDERERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mask": _masked,
    "outpaint": _masked,
    "seg": _coloured,
}
