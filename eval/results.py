"""Figures with their protocols. Figures with different protocols are never put side by side."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import SctoolError

Extract = Callable[[np.ndarray, str], np.ndarray]
"""(image (H, W, 3), key) -> the map extracted from it, as an RGB image (H, W, 3); all uint8."""


@dataclass(frozen=True)
class Figure:
    """One number, and everything that it depends on besides the model that drew the images."""

    key: str
    """Machine name, e.g. "fid" or "canny.f1@1px"."""
    name: str
    """Name in tables, e.g. "FD (mini features)"."""
    value: float
    better: str
    """Which direction is better: "lower", "higher", or "" for neither."""
    protocol: dict[str, Any]
    interval: tuple[float, float] | None = None
    """95 % interval over images, computed as the protocol says; None where there are too few images."""

    @property
    def protocol_id(self) -> str:
        """Twelve hex digits of the protocol's hash."""
        return hashlib.sha256(json.dumps(self.protocol, sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class ImageResult:
    """One drawn image: its files relative to the folder, and its own values."""

    file: str
    prompt: str = ""
    key: str = ""
    hints: dict[str, str] = field(default_factory=dict)
    """Hint file of each condition."""
    reference: str | None = None
    values: dict[str, float] = field(default_factory=dict)
    """By figure key, for every figure that single images have (CLIP cosine, F1, ...)."""


@dataclass
class FolderResults:
    """The figures of one folder of images."""

    label: str
    path: Path
    count: int
    figures: list[Figure] = field(default_factory=list)
    faults: list[dict[str, str]] = field(default_factory=list)
    """File and reason of everything that was left out."""
    images: list[ImageResult] = field(default_factory=list, repr=False)
    extract: dict[str, Extract] = field(default_factory=dict, repr=False)
    """For each measured condition, what extracts it from an image, for the report."""

    def get(self, key: str) -> Figure | None:
        """The figure with that key."""
        return next((figure for figure in self.figures if figure.key == key), None)

    def set_values(self, key: str, values: Mapping[int, float]) -> None:
        """Records a figure's value for single images, by position."""
        for position, value in values.items():
            self.images[position].values[key] = value


@dataclass
class Results:
    """What `evaluate` measured: the figures of each folder, the costs of a run, and notes for the reader."""

    target: str
    folders: list[FolderResults]
    profile: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def value(self, label: str, key: str) -> float:
        """One number, e.g. value("tuned", "canny.f1"). Raises `KeyError`."""
        figure = next(results for results in self.folders if results.label == label).get(key)
        if figure is None:
            raise KeyError(key)
        return figure.value

    def rows(self) -> list[tuple[Figure, list[Figure | None]]]:
        """One row per comparable figure: (any of its figures, for name and protocol; the figure of each folder).

        Figures with the same key and different protocols get separate rows.
        """
        rows: dict[tuple[str, str], list[Figure | None]] = {}
        for index, results in enumerate(self.folders):
            for figure in results.figures:
                row = rows.setdefault((figure.key, figure.protocol_id), [None] * len(self.folders))
                row[index] = figure
        described = []
        for row in rows.values():
            present = [figure for figure in row if figure]
            check_comparable(*present)
            described.append((present[0], row))
        return described

    def to_json(self) -> dict[str, Any]:
        """Everything as one JSON value; figures name their protocol, which is listed once under "protocols".

        NaN and infinity, which JSON does not have, become null.
        """
        figures = [figure for results in self.folders for figure in results.figures]
        value = {
            "target": self.target,
            "folders": {results.label: _folder_json(results) for results in self.folders},
            "profile": self.profile,
            "notes": self.notes,
            "protocols": {figure.protocol_id: figure.protocol for figure in figures},
        }
        return _finite(value)


def _folder_json(results: FolderResults) -> dict[str, Any]:
    return {
        "folder": str(results.path),
        "count": results.count,
        "figures": {
            f.key: {
                "name": f.name,
                "value": f.value,
                "better": f.better,
                "interval": f.interval if f.interval and all(map(math.isfinite, f.interval)) else None,
                "protocol": f.protocol_id,
            }
            for f in results.figures
        },
        "faults": results.faults,
    }


def _finite(value: Any) -> Any:
    """The value with every number that is not finite replaced by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_comparable(*figures: Figure) -> None:
    """Raises `SctoolError`, naming where the protocols differ, unless the figures may be put side by side."""
    for other in figures[1:]:
        if other.key != figures[0].key or other.protocol_id != figures[0].protocol_id:
            keys = sorted(figures[0].protocol.keys() | other.protocol.keys())
            differ = [k for k in keys if figures[0].protocol.get(k) != other.protocol.get(k)] or ["metric"]
            raise SctoolError(
                f"{figures[0].name} and {other.name} cannot be compared: they differ in {', '.join(differ)}. "
                "Evaluate both in the same way."
            )
