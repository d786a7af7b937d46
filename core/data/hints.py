"""Maps as the picture that a tuner sees: uint8 RGB, the same for training, preview and sampling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def render(cond: str, map: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The RGB hint (H,W,3) uint8 of a map (H,W) or (H,W,3) for its picture (H,W,3); sizes must agree."""
    return _RENDERERS.get(cond, _as_is)(map, image)


def needs_image(cond: str) -> bool:
    """Whether `render` looks at the picture for this condition; otherwise any picture of the size will do."""
    return cond in _RENDERERS


def _as_is(map: np.ndarray, image: np.ndarray) -> np.ndarray:
    return np.repeat(map[..., None], 3, axis=2) if map.ndim == 2 else map


def _masked(map: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The picture with what is to be painted (mask 255) set to 0, as in SCEdit's inpainting."""
    hole = (map if map.ndim == 2 else map[..., 0]) >= 128
    return np.where(hole[..., None], np.uint8(0), image)


_RENDERERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"mask": _masked}
