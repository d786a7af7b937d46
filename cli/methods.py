"""`sctool methods`: what can be trained, and exactly how many parameters it trains."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def methods(
    base: Annotated[str, typer.Option(help="sd15, sd21, sdxl, mini, or a diffusers-format folder.")] = "sd15",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """List the methods with exact trainable parameters on a base. Reads no weights.

    Examples:

      sctool methods --base sdxl

      sctool methods --base ./sd15 --json
    """
    from ..core.backbones.architectures import architecture
    from ..core.counting import counts

    shapes = architecture(base)
    rows = counts(shapes)
    if not as_json:
        _show(base, rows)
        return
    table = [
        {
            "variant": row.variant.label,
            "method": row.method,
            "settings": dict(row.variant.settings),
            "conditions": row.variant.conditions,
            "trainable": row.trainable,
            "percent": round(row.percent, 4),
        }
        for row in rows
    ]
    print(json.dumps({"base": base, "family": shapes.family.name, "methods": table}))


def _show(base: str, rows: list) -> None:
    """The counts and what the methods are, as a table on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..core.tuners import TUNERS

    table = Table(title=f"Trainable parameters on {base}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("variant", no_wrap=True)
    table.add_column("--method")
    for name in ("trainable", "% of base"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.variant.label, row.method, f"{row.trainable:,}", f"{row.percent:.2f}")
    console = Console()
    console.print(table)
    for name, row in TUNERS.items():
        console.print(f"{name}: {row.summary} ({row.paper})", highlight=False, soft_wrap=True)
