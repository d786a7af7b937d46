"""Hints for sampling, from map files and from photographs, exactly as training renders them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..core.data.conditions import condition
from ..core.data.images import BadImage, Geometry, decode_map, decode_rgb
from ..core.data.records import FileBlob
from . import annotator_like


def hint_from_map(name: str, file: str, size: int) -> np.ndarray:
    """The RGB hint (size, size, 3) of a map file; one that shows the image must be given as that image.

    Raises `BadImage` for a file that cannot be used.
    """
    kind, map = condition(name), decode_map(FileBlob(file), file)
    fitted = Geometry(size).apply_map(map, map.shape, names=kind.categorical)
    if not kind.needs_image:
        return kind.render(fitted, fitted)
    if fitted.ndim == 2:
        raise BadImage("is a bare mask; give the image itself, with the area to be painted set to black")
    return fitted


def hint_from_photo(name: str, file: str, size: int, map_settings: Mapping[str, Any] | None = None) -> np.ndarray:
    """The RGB hint (size, size, 3) of a photograph, which is resized first and then annotated.

    `map_settings` says how a tuner's maps were made; the annotator's defaults when not given. Raises `BadImage`, and
    `UsageError` for an unknown condition.
    """
    image = Geometry(size).apply(decode_rgb(FileBlob(file), file))
    ((map, _),) = annotator_like(name, map_settings)([image], [Path(file).stem])
    return condition(name).render(Geometry(size).apply_map(map, image.shape), image)
