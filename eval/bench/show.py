"""A transfer table in the terminal: quality, costs, and the paper's own table below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..report.tables import ARROWS, number
from ..results import Figure
from .transfer import BASE, PAPER, PAPER_NOTE, PAPER_SETS, Row, TransferTable

COUNTS = ("trainable", "stored", "total")
COSTS = ("step_s", "peak_bytes")
SCALES = {"peak_bytes": (1e-9, " (GB)")}
"""Figures shown in another unit."""
LEGEND = "[…, …]: 95 % interval over seeds. Bold: better than every other method, with intervals that do not overlap."


def title(table: TransferTable) -> str:
    """What the table is of."""
    training = table.protocol["training"]
    images, seeds = training["batch"] * training["accumulate"], len(table.protocol["seeds"])
    base, data = (Path(training[key]).name for key in ("base", "data"))
    return f"Transfer of {base} to {data}: {training['steps']} steps of {images}, {seeds} seeds"


def heading(figure: Figure) -> str:
    """A figure's name, unit and better direction."""
    return f"{figure.name}{SCALES.get(figure.key, (1, ''))[1]} {ARROWS[figure.better]}".strip()


def spread(figure: Figure | None) -> tuple[str, str]:
    """A figure's mean and its interval as texts; a dash and "" for none."""
    if figure is None:
        return "–", ""
    scale, bounds = SCALES.get(figure.key, (1, ""))[0], figure.interval
    span = f"[{bounds[0] * scale:.4g}, {bounds[1] * scale:.4g}]" if bounds else ""
    return number(figure.value * scale), span


def count(value: int) -> str:
    """48,674,445 as 48.67M; numbers below ten thousand as they are."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * unit or (value >= unit and unit > 1e3):
            return f"{value / unit:.4g}{letter}"
    return f"{value:,}"


def rate(row: Row) -> str:
    """A row's learning rate; a dash for the base."""
    return "–" if row.lr is None else f"{row.lr:g}"


def own_settings(row: Row) -> str:
    """A method's own settings in words; "" without any."""
    return ", ".join(f"{key} {value}" for key, value in row.own.items())


def rates_lines(table: TransferTable) -> list[str]:
    """All learning rates that were tried, with their held-out losses."""
    lines = []
    for method, tuned in table.tuned.items():
        tried = ", ".join(f"{lr:g}: {number(loss)}" for lr, loss in sorted(tuned.losses.items()))
        lines.append(f"learning rate of {method}: {tuned.rate:g}, by held-out loss ({tried})")
    return lines


def verdict_lines(table: TransferTable) -> list[str]:
    """For each figure, the best method and the pairs that the intervals do not tell apart."""
    lines = []
    for key in table.keys:
        name, winner, pairs = table.example(key).name, table.best(key), table.not_told_apart(key)
        if winner:
            lines.append(f"{name}: {winner} is best.")
        if pairs:
            lines.append(f"{name}: not told apart: {'; '.join(f'{a} and {b}' for a, b in pairs)}.")
    return lines


def below(table: TransferTable) -> list[str]:
    """The lines under the table."""
    own = [f"{row.name}: {own_settings(row)}" for row in table.rows if row.own]
    return [*verdict_lines(table), *rates_lines(table), *own, *table.notes]


def show(table: TransferTable, console: Console | None = None) -> None:
    """Prints both tables with their notes."""
    console = console or Console()
    quality, costs = ([key for key in table.keys if (key in COSTS) is cost] for cost in (False, True))
    _grid(console, table, title(table), quality, ("trainable",), "lr")
    _grid(console, table, "Costs", costs, ("stored", "total"))
    for line in (LEGEND, *below(table)):
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    _show_paper(console)


def _grid(
    console: Console, table: TransferTable, name: str, keys: Sequence[str], counts: Sequence[str], *more: str
) -> None:
    """One row per method with the figures `keys`, the parameter counts and, as `more`, the learning rate."""
    grid = Table(title=escape(name), title_justify="left", box=box.SIMPLE_HEAD)
    for text in ("method", *(heading(table.example(key)) for key in keys), *counts, *more):
        grid.add_column(escape(text), justify="left" if text == "method" else "right")
    for row in (table.base, *table.rows):
        cells = [_cell(table, row, key) for key in keys]
        grid.add_row(
            escape(row.name), *cells, *(count(row.parameters[key]) for key in counts), *[rate(row)] * len(more)
        )
    console.print(grid)


def _cell(table: TransferTable, row: Row, key: str) -> str:
    value, span = spread(row.figures.get(key))
    text = escape(f"{value}\n{span}" if span else value)
    return f"[bold]{text}[/bold]" if row.name != BASE and table.best(key) == row.name else text


def _show_paper(console: Console) -> None:
    grid = Table(title="DiffScaler's own table 1 (FID)", title_justify="left", box=box.SIMPLE_HEAD)
    for text in ("method", "parameters", *PAPER_SETS):
        grid.add_column(text, justify="left" if text == "method" else "right")
    for name, (parameters, *values) in PAPER.items():
        grid.add_row(name, parameters, *(f"{value:.2f}" for value in values))
    console.print(grid)
    console.print(PAPER_NOTE, style="dim", markup=False, highlight=False, soft_wrap=True)
