"""A finished table: rows with their figures over the seeds, what tells them apart, and everything as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..results import Figure
from . import aggregate
from .aggregate import Values
from .form import Form
from .rates import Tuned

COSTS = ("step_s", "sample_step_s", "peak_bytes")
"""Keys of figures that are costs; all others are figures of quality, which a row that diverged does not have."""


@dataclass
class Row:
    """One arm, or an untouched base: its figures over the seeds, by key, and its values by seed."""

    name: str
    parameters: dict[str, int]
    lr: float | None = None
    own: dict[str, Any] = field(default_factory=dict)
    """Settings in which it differs from the defaults, written for it alone."""
    figures: dict[str, Figure] = field(default_factory=dict)
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    diverged: list[int] = field(default_factory=list)
    """Seeds with which its training diverged."""

    def add(self, key: str, seed: int, value: float | None) -> None:
        """One value of one seed; None where it could not be measured."""
        if value is not None:
            self.values.setdefault(key, {})[seed] = value

    def to_json(self) -> dict[str, Any]:
        """Everything as one JSON value."""
        figures = {
            key: {
                "name": figure.name,
                "better": figure.better,
                "mean": figure.value,
                "interval": figure.interval,
                "values": {str(seed): value for seed, value in self.values[key].items()},
                "protocol": figure.protocol,
            }
            for key, figure in self.figures.items()
        }
        return {
            "parameters": self.parameters, "lr": self.lr, "settings": self.own, "figures": figures,
            "diverged": self.diverged,
        }  # fmt: skip


@dataclass
class Table:
    """The finished table: a row for each base and one for each arm."""

    form: Form
    protocol: dict[str, Any]
    bases: list[Row]
    rows: list[Row]
    tuned: dict[str, Tuned]
    notes: list[str]

    @property
    def all_rows(self) -> list[Row]:
        """The bases first."""
        return [*self.bases, *self.rows]

    @property
    def keys(self) -> list[str]:
        """The figures that some row has: quality in the order in which it was measured, then costs."""
        found = dict.fromkeys(key for row in (*self.rows, *self.bases) for key in row.figures)
        return [*(key for key in found if key not in COSTS), *(key for key in COSTS if key in found)]

    def example(self, key: str) -> Figure:
        """Any row's figure with this key, for its name and direction."""
        return next(row.figures[key] for row in self.all_rows if key in row.figures)

    def values(self, key: str, rows: list[Row]) -> dict[str, Values]:
        """The values by seed of those of `rows` that have the figure."""
        return {row.name: row.values[key] for row in rows if key in row.figures}

    def reference(self, key: str) -> str | None:
        """The arm with the best mean, with which all rows are compared seed by seed; None where none has the figure."""
        return aggregate.leader(self.values(key, self.rows), self.example(key).better)

    def differences(self, key: str) -> dict[str, aggregate.Estimate]:
        """Every other row's mean difference to the `reference`, seed by seed, with its interval."""
        reference, values = self.reference(key), self.values(key, self.all_rows)
        if reference is None:
            return {}
        found = {name: aggregate.difference(own, values[reference]) for name, own in values.items()}
        return {name: one for name, one in found.items() if one is not None and name != reference}

    def best(self, key: str) -> str | None:
        """The arm that is better than all others beyond the paired intervals; None where there is none.

        Where an arm diverged or could not be measured, it has lost; the others are still compared.
        """
        return aggregate.best(self.values(key, self.rows), self.example(key).better)

    def not_told_apart(self, key: str) -> list[tuple[str, str]]:
        """Pairs of rows, the bases among them, whose paired difference may be zero."""
        return aggregate.not_told_apart(self.values(key, self.all_rows))

    def to_json(self) -> dict[str, Any]:
        """Everything as one JSON value."""
        return {
            "table": self.form.name,
            "protocol": self.protocol,
            "bases": {row.name: row.to_json() for row in self.bases},
            self.form.arms: {row.name: row.to_json() for row in self.rows},
            "best": {key: self.best(key) for key in self.keys},
            "differences": {key: self._differences_json(key) for key in self.keys},
            "not_told_apart": {key: self.not_told_apart(key) for key in self.keys},
            "rates": {name: tuned.to_json() for name, tuned in self.tuned.items()},
            "notes": self.notes,
            "papers": [paper.to_json() for paper in self.form.papers],
        }

    def _differences_json(self, key: str) -> dict[str, Any]:
        rows = {name: {"mean": one.value, "interval": one.interval} for name, one in self.differences(key).items()}
        return {"reference": self.reference(key), "interval": aggregate.PAIRED, "rows": rows}
