"""A table in the terminal: quality, differences, costs, and the papers' own tables below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from ..intervals import Estimate
from ..report.tables import ARROWS, number
from ..results import Figure
from .papers import Paper
from .table import COSTS, Row, Table

SCALES = {"peak_bytes": (1e-9, " (GB)")}
"""Figures shown in another unit."""
DIFFERENCES = "Seed by seed, minus the best mean"
WIDE = 5
"""Figures beside each other in a terminal."""

WHOLE_NAME = 20
"""Characters of a row's name that a narrow terminal leaves in one piece."""


class Section(NamedTuple):
    """One block of a table: its title, the figures that it shows, and the parameter counts beside them."""

    title: str
    keys: list[str]
    counts: tuple[str, ...]
    rate: bool = False
    """Whether the learning rate is shown."""


def title(table: Table) -> str:
    """What the table is of."""
    training = table.protocol["training"]
    images, seeds = training["batch"] * training["accumulate"], len(table.protocol["seeds"])
    shown = {
        "bases": " and ".join(Path(base).name for base in table.protocol["bases"].values()),
        "data": Path(training["data"]).name,
        "cond": ", ".join(training["cond"]),
    }
    return f"{table.form.title.format(**shown)}: {training['steps']} steps of {images}, {seeds} seed{'s' * (seeds > 1)}"


def sections(table: Table) -> list[Section]:
    """The blocks of the table: quality, adherence to conditions, costs."""
    conditions = tuple(f"{cond.partition(':')[0]}." for cond in table.protocol["training"]["cond"])
    adherence = [key for key in table.keys if conditions and key.startswith(conditions)]
    quality = [key for key in table.keys if key not in (*COSTS, *adherence)]
    costs = [key for key in table.keys if key in COSTS]
    found = [Section("Quality", quality, ("trainable",), rate=True)]
    found += [Section("Control", adherence, ())] if adherence else []
    return [*found, Section("Costs", costs, ("stored", "total"))]


def legend(table: Table) -> str:
    """What intervals and bold figures mean."""
    return (
        f"[…, …]: 95 % interval over seeds. Bold: better than all other {table.form.arms}, seed by seed, beyond the "
        "intervals of the differences."
    )


def heading(figure: Figure) -> str:
    """A figure's name, unit and better direction."""
    return f"{figure.name}{SCALES.get(figure.key, (1, ''))[1]} {ARROWS[figure.better]}".strip()


def spread(figure: Figure | None) -> tuple[str, str]:
    """A figure's mean and its interval as texts; a dash and "" for none."""
    if figure is None:
        return "–", ""
    scale, bounds = SCALES.get(figure.key, (1, ""))[0], figure.interval
    return number(figure.value * scale), _span(bounds, scale)


def change(key: str, difference: Estimate | None) -> tuple[str, str]:
    """A paired difference with its sign, and its interval, as texts."""
    if difference is None:
        return "–", ""
    scale = SCALES.get(key, (1, ""))[0]
    return f"{difference.value * scale:+.4g}", _span(difference.interval, scale)


def _span(bounds: tuple[float, float] | None, scale: float) -> str:
    return f"[{bounds[0] * scale:.4g}, {bounds[1] * scale:.4g}]" if bounds else ""


def count(value: int) -> str:
    """48,674,445 as 48.67M; numbers below ten thousand as they are."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * unit or (value >= unit and unit > 1e3):
            return f"{value / unit:.4g}{letter}"
    return f"{value:,}"


def rate(row: Row) -> str:
    """A row's learning rate; a dash for a base."""
    return "–" if row.lr is None else f"{row.lr:g}"


def own_settings(row: Row) -> str:
    """An arm's own settings in words; "" without any."""
    return ", ".join(f"{key} {value}" for key, value in row.own.items())


def rates_lines(table: Table) -> list[str]:
    """All learning rates that were tried, with their held-out losses."""
    lines = []
    for arm, tuned in table.tuned.items():
        tried = ", ".join(f"{lr:g}: {number(loss)}" for lr, loss in sorted(tuned.losses.items()))
        lines.append(f"learning rate of {arm}: {tuned.rate:g}, by held-out loss ({tried})")
    return lines


def verdict_lines(table: Table) -> list[str]:
    """For each figure, the best arm, or which rows the paired differences do not tell apart from the best mean."""
    lines = []
    for key in table.keys:
        name, winner, reference = table.example(key).name, table.best(key), table.reference(key)
        close = [b if a == reference else a for a, b in table.not_told_apart(key) if reference in (a, b)]
        apart = f"; not told apart from it: {', '.join(close)}" if close else ""
        if winner:
            lines.append(f"{name}: {winner} is the best of the {table.form.arms}{apart}.")
        elif close:
            lines.append(f"{name}: {reference} has the best mean{apart}.")
    return lines


def below(table: Table) -> list[str]:
    """The lines under the table."""
    own = [f"{row.name}: {own_settings(row)}" for row in table.rows if row.own]
    return [*verdict_lines(table), *rates_lines(table), *own, *table.notes]


def show(table: Table, console: Console | None = None) -> None:
    """Prints the table, the papers' tables, and the notes."""
    console = console or Console()
    first, *others = sections(table)
    _section(console, table, Section(title(table), *first[1:]))
    for section in others:
        _section(console, table, section)
    _differences(console, table)
    for line in (legend(table), *below(table)):
        _line(console, line)
    for paper in table.form.papers:
        _paper(console, paper)


def _line(console: Console, text: str) -> None:
    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _section(console: Console, table: Table, section: Section) -> None:
    """One row per base and arm with figures, the first with parameter counts and the learning rate as well."""
    for start in range(0, max(1, len(section.keys)), WIDE):
        keys, last = section.keys[start : start + WIDE], start + WIDE >= len(section.keys)
        counts, rates = (section.counts, section.rate) if last else ((), False)
        heads = [*(heading(table.example(key)) for key in keys), *counts, *(["lr"] if rates else [])]

        def cells(row: Row, keys: list[str] = keys, counts: Sequence[str] = counts, rates: bool = rates) -> list[str]:
            figures = [_figure_cell(table, row, key) for key in keys]
            return [*figures, *(count(row.parameters[key]) for key in counts), *([rate(row)] if rates else [])]

        _grid(console, section.title if not start else "", heads, table.all_rows, cells)


def _differences(console: Console, table: Table) -> None:
    """Every row's paired difference to the best mean, for the figures of quality."""
    keys = [key for key in table.keys if key not in COSTS and table.differences(key)]
    for start in range(0, len(keys), WIDE):
        part = keys[start : start + WIDE]
        heads = [f"{table.example(key).name} − {table.reference(key)}" for key in part]
        found = {key: table.differences(key) for key in part}

        def cells(row: Row, found: dict[str, dict[str, Estimate]] = found) -> list[str]:
            return [_cell(*change(key, own.get(row.name))) for key, own in found.items()]

        _grid(console, DIFFERENCES if not start else "", heads, table.all_rows, cells)


def _grid(
    console: Console, name: str, heads: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], list[str]]
) -> None:
    grid = Grid(title=escape(name) if name else None, title_justify="left", box=box.SIMPLE_HEAD)
    _columns(grid, heads, [row.name for row in rows])
    for row in rows:
        grid.add_row(escape(row.name), *cells(row))
    console.print(grid)


def _columns(grid: Grid, heads: Sequence[str], names: Sequence[str]) -> None:
    """The column of the rows' names, which breaks last in a narrow terminal, and one for each heading."""
    grid.add_column("", overflow="fold", min_width=min(WHOLE_NAME, max(map(len, names))))
    for text in heads:
        grid.add_column(escape(text), justify="right", overflow="fold")


def _figure_cell(table: Table, row: Row, key: str) -> str:
    text = _cell(*spread(row.figures.get(key)))
    return f"[bold]{text}[/bold]" if table.best(key) == row.name else text


def _cell(value: str, span: str) -> str:
    return escape(f"{value}\n{span}" if span else value)


def _paper(console: Console, paper: Paper) -> None:
    grid = Grid(title=escape(paper.title), title_justify="left", box=box.SIMPLE_HEAD)
    _columns(grid, paper.columns, list(paper.rows))
    for name, values in paper.rows.items():
        grid.add_row(escape(name), *map(escape, values))
    console.print(grid)
    _line(console, paper.note)
