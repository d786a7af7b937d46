"""Figures with their protocols. Figures of different protocols are never put side by side."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import SctoolError

Extract = Callable[[np.ndarray, str], np.ndarray]


@dataclass(frozen=True)
class Figure:
    """One number and everything that it depends on besides the model that drew the pictures."""

    key: str
    """Machine name, e.g. "fid" or "canny.f1@1px"."""
    name: str
    """Name in the table; says what it is, e.g. "FD (mini features)"."""
    value: float
    better: str
    """"lower", "higher" or "" where neither is better."""
    protocol: dict[str, Any]
    interval: tuple[float, float] | None = None
    """95 % interval over pictures (how it was found stands in the protocol); None where there is none."""

    @property
    def protocol_id(self) -> str:
        """Twelve hex digits of the protocol's hash."""
        return hashlib.sha256(json.dumps(self.protocol, sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Picture:
    """One drawn picture in the report: its files relative to the column's folder, and its own values."""

    file: str
    prompt: str = ""
    key: str = ""
    hints: dict[str, str] = field(default_factory=dict)
    """Hint file of each condition."""
    reference: str | None = None
    values: dict[str, float] = field(default_factory=dict)
    """By figure key, for every figure that is made of pictures' own values (CLIP cosine, F1, ...)."""


@dataclass
class Column:
    """The figures of one folder of pictures."""

    label: str
    folder: Path
    count: int
    figures: list[Figure] = field(default_factory=list)
    faults: list[dict[str, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list, repr=False)
    extract: dict[str, Extract] = field(default_factory=dict, repr=False)
    """For each condition that was measured: (picture (H, W, 3), key) -> the re-extracted map as RGB, for the report."""

    def get(self, key: str) -> Figure | None:
        """The figure of that key."""
        return next((figure for figure in self.figures if figure.key == key), None)

    def spread(self, key: str, values: Mapping[int, float]) -> None:
        """Notes a figure's own value at each picture, by position."""
        for position, value in values.items():
            self.pictures[position].values[key] = value


@dataclass
class Results:
    """What `evaluate` found: a column a folder, a cost profile for a run, and what the reader should know."""

    target: str
    columns: list[Column]
    profile: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def value(self, label: str, key: str) -> float:
        """One number, e.g. value("tuned", "canny.f1"). Raises `KeyError`."""
        figure = next(column for column in self.columns if column.label == label).get(key)
        if figure is None:
            raise KeyError(key)
        return figure.value

    def rows(self) -> list[tuple[Figure, list[Figure | None]]]:
        """One row a comparable figure: (its description, the columns' figures).

        Figures of one name and different protocols stand in rows of their own.
        """
        rows: dict[tuple[str, str], list[Figure | None]] = {}
        for index, column in enumerate(self.columns):
            for figure in column.figures:
                row = rows.setdefault((figure.key, figure.protocol_id), [None] * len(self.columns))
                row[index] = figure
        made = []
        for row in rows.values():
            present = [figure for figure in row if figure]
            compare(*present)
            made.append((present[0], row))
        return made

    def to_json(self) -> dict[str, Any]:
        """Everything as one JSON value; figures name their protocol, which stands once under "protocols".

        NaN and infinity, which JSON does not know, become null.
        """
        figures = [figure for column in self.columns for figure in column.figures]
        found = {
            "target": self.target,
            "folders": {
                column.label: {
                    "folder": str(column.folder),
                    "count": column.count,
                    "figures": {
                        f.key: {
                            "name": f.name,
                            "value": f.value,
                            "better": f.better,
                            "interval": f.interval if f.interval and all(map(math.isfinite, f.interval)) else None,
                            "protocol": f.protocol_id,
                        }
                        for f in column.figures
                    },
                    "faults": column.faults,
                }
                for column in self.columns
            },
            "profile": self.profile,
            "notes": self.notes,
            "protocols": {figure.protocol_id: figure.protocol for figure in figures},
        }
        return _finite(found)


def _finite(value: Any) -> Any:
    """The value with None for every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(*figures: Figure) -> Sequence[Figure]:
    """The figures, if they may stand side by side. Raises `SctoolError` naming where their protocols differ."""
    for other in figures[1:]:
        if other.key != figures[0].key or other.protocol_id != figures[0].protocol_id:
            keys = sorted(figures[0].protocol.keys() | other.protocol.keys())
            differ = [k for k in keys if figures[0].protocol.get(k) != other.protocol.get(k)] or ["metric"]
            raise SctoolError(
                f"{figures[0].name} and {other.name} cannot be compared: {', '.join(differ)} differ. "
                "Evaluate both in the same way."
            )
    return figures
