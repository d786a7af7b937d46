"""`sctool methods`: what can be trained, and exactly how many parameters it trains."""

from __future__ import annotations

import json
from typing import Annotated

import typer

WIDTH = 100
"""Columns of the table: figures are never cut off, also where a terminal is narrower."""


def methods(
    base: Annotated[
        str, typer.Option(help="sd15, sd21, sdxl, dit-xl-2, mini, mini-dit, or a diffusers-format folder.")
    ] = "sd15",
    tasks: Annotated[int, typer.Option(min=1, help="Also count what this many tasks on one base store together.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """List the methods with exact trainable parameters on a base, per task. Reads no weights.

    Examples:

      sctool methods --base dit-xl-2 --tasks 10

      sctool methods --base ./sd15 --json
    """
    from ..core.backbones.architectures import architecture
    from ..core.counting import class_row, counts
    from ..core.distilling.counting import student_counts

    shapes = architecture(base)
    rows, new_class, students = counts(shapes), class_row(shapes), student_counts(shapes)
    if not as_json:
        _show(base, rows, tasks, new_class)
        _show_students(base, students)
        return
    table = [
        {
            "variant": row.variant.label,
            "method": row.method,
            "settings": dict(row.variant.settings),
            "conditions": row.variant.conditions,
            "trainable": row.trainable,
            "percent": round(row.percent, 4),
            "stored": row.stored * tasks,
            "total": row.total,
        }
        for row in rows
    ]
    family = shapes.family.name
    made = [{"student": one.label, "parameters": one.parameters, "total": one.total} for one in students]
    print(json.dumps({"base": base, "family": family, "tasks": tasks, "new_class": new_class, "methods": table,
                      "students": made}))  # fmt: skip


def _show(base: str, rows: list, tasks: int, new_class: int) -> None:
    """The counts and what the methods are, as a table on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..core.tuners import TUNERS

    table = Table(title=f"Trainable parameters on {base}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("variant", no_wrap=True)
    table.add_column("--method")
    for name in ("trainable", "% of base", *([f"{tasks} tasks"] if tasks > 1 else [])):
        table.add_column(name, justify="right")
    for row in rows:
        stored = [f"{row.stored * tasks:,}"] if tasks > 1 else []
        table.add_row(row.variant.label, row.method, f"{row.trainable:,}", f"{row.percent:.2f}", *stored)
    console = Console(width=max(Console().width, WIDTH))
    console.print(table)
    if new_class:
        console.print(f"Every class that the base does not know adds {new_class:,}.", highlight=False)
    for name, row in TUNERS.items():
        console.print(f"{name}: {row.summary} ({row.paper})", highlight=False, soft_wrap=True)


def _show_students(base: str, students: list) -> None:
    """The students that `sctool distill` makes, as a table on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Students of {base}, by sctool distill", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("student", no_wrap=True)
    for name in ("denoiser", "% of base", "with text encoder and autoencoder"):
        table.add_column(name, justify="right")
    for one in students:
        share = f"{100 * one.parameters / students[0].parameters:.2f}"
        table.add_row(one.label, f"{one.parameters:,}", share, "" if one.total is None else f"{one.total:,}")
    Console(width=max(Console().width, WIDTH)).print(table)
