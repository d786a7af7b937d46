"""Which metrics can be computed on a target, and what the others lack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import SctoolError
from .control.table import conditions_of, scores
from .metrics import METRICS, Metric
from .options import Options
from .targets import Target


def applicable(target: Target, options: Options) -> set[str]:
    """The requested metrics of images that can be computed.

    Raises `SctoolError` for one that was requested by name and cannot be.
    """
    lacking = {name: what_lacks(metric, target, options) for name, metric in METRICS.items() if not metric.run}
    for name, reason in lacking.items():
        if reason and name in options.metrics:
            raise SctoolError(f"{METRICS[name].flag}: {target.path} {reason}")
    return {name for name, reason in lacking.items() if not reason and options.wants(name)}


def what_lacks(metric: Metric, target: Target, options: Options) -> str | None:
    """What the target lacks for the metric, as the predicate of a sentence; None where it has everything."""
    rows = target.rows
    if metric.references and (reason := _references_lack(metric, rows, options.reference)):
        return reason
    if metric.prompts and (without := [row for row in rows if not row.get("prompt")]):
        missing = _missing(without, rows, "prompt", "has no prompts")
        return f"{missing}. Prompts are read from metadata.jsonl, one per image."
    return _hints_lack(metric, rows) if metric.hints else None


def _references_lack(metric: Metric, rows: Sequence[dict[str, Any]], reference: str | None) -> str | None:
    if reference is not None:
        if metric.references == "moments" or not Path(reference).expanduser().is_file():
            return None
        return (
            f"cannot be compared with --reference {reference}, which contains only a mean and a covariance. "
            "Pass the folder of the reference images."
        )
    without = [row for row in rows if not row.get("reference")]
    if not without:
        return None
    or_file = " or a statistics file" if metric.references == "moments" else ""
    missing = _missing(without, rows, "reference", "has no reference images")
    return f"{missing}. Pass them with --reference FOLDER{or_file}."


def _hints_lack(metric: Metric, rows: Sequence[dict[str, Any]]) -> str | None:
    conditions = {cond for row in rows for cond in row.get("hints") or {}}
    measured = conditions_of(metric)
    if conditions & measured:
        return None
    if not conditions:
        return f"has no hints to compare with; a run trained with --cond {','.join(scores())} draws them."
    return f"has no {' or '.join(sorted(measured))} hints: its hints are {', '.join(sorted(conditions))}."


def _missing(without: Sequence[Any], rows: Sequence[Any], what: str, all_missing: str) -> str:
    """`all_missing` where all rows are `without`; else how many of them have no `what`."""
    if len(without) == len(rows):
        return all_missing
    return f"is incomplete: {len(without)} of {len(rows)} rows {'has' if len(without) == 1 else 'have'} no {what}"
