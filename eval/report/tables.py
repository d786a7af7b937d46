"""The report as a table for the terminal, a JSON file and a Markdown file beside the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ...core.files import write_json, write_text
from ..results import Figure, Results

ARROWS = {"lower": "↓", "higher": "↑", "": ""}
COSTS = {
    "train_step_s": "training step (s)",
    "sample_step_s": "sampling step (s)",
    "train_peak_bytes": "training peak memory (MB)",
    "sample_peak_bytes": "sampling peak memory (MB)",
}
WIDE = 55  # characters per column below which intervals go under their figures
INTERVALS = "[…, …]: 95 % interval over images"


def number(value: float | None) -> str:
    """Four significant digits."""
    return "–" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def shown(figure: Figure | None) -> str:
    """A figure with its interval: 0.721 [0.70, 0.74]; a dash for none."""
    if figure is None:
        return "–"
    bounds = figure.interval
    return number(figure.value) + (f" [{bounds[0]:.3g}, {bounds[1]:.3g}]" if bounds else "")


def figure_rows(results: Results) -> list[list[str]]:
    """Name, a value with its interval per folder, protocol id; one row per protocol."""
    rows = []
    for first, figures in results.rows():
        values = [shown(figure) for figure in figures]
        rows.append([f"{first.name} {ARROWS[first.better]}".strip(), *values, first.protocol_id])
    return rows


def cost_rows(profile: dict[str, Any]) -> list[list[str]]:
    """Name, base, tuned and ratio of every cost."""
    counts = profile["parameters"]
    rows = [[f"{key} parameters", "", f"{counts[key]:,}", ""] for key in ("trainable", "stored")]
    total = f"{counts['total'] / counts['base']:.4f}"
    rows.append(["total parameters", f"{counts['base']:,}", f"{counts['total']:,}", total])
    for key, name in COSTS.items():
        scale = 1e-6 if key.endswith("bytes") else 1
        pair = [profile[side].get(key) for side in ("base", "tuned")]
        ratio = profile["ratio"].get(key)
        values = [number(value * scale if value is not None else None) for value in pair]
        rows.append([name, *values, number(ratio)])
    return rows


def show(results: Results, console: Console | None = None) -> None:
    """Prints the tables and the faults; the notes were printed on stderr and are in the files."""
    console = console or Console()
    if results.folders:
        table = _table(f"Evaluation of {results.target}", _headings(results))
        narrow = console.width < WIDE * len(results.folders)
        for row in figure_rows(results):
            table.add_row(*(cell.replace(" [", "\n[") if narrow else cell for cell in row))
        console.print(table)
        if _has_intervals(results):
            console.print(INTERVALS, style="dim")
    if results.profile:
        protocol = results.profile["protocol"]
        title = f"Costs of {results.profile['method']} on {protocol['device']}, batch {protocol['batch']}"
        table = _table(title, ["", "base", "tuned", "ratio"])
        for row in cost_rows(results.profile):
            table.add_row(*row)
        console.print(table)
    for line in _fault_lines(results):
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def _headings(results: Results) -> list[str]:
    return ["", *[f"{folder.label} (N={folder.count})" for folder in results.folders], "protocol"]


def _has_intervals(results: Results) -> bool:
    return any(figure.interval for folder in results.folders for figure in folder.figures)


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index in (0, len(headings)) else "right")
    return table


def _fault_lines(results: Results, most: int = 10) -> list[str]:
    lines = [f"left out: {r.label}/{fault['file']}: {fault['reason']}" for r in results.folders for fault in r.faults]
    rest = len(lines) - most
    return [*lines[:most], f"… and {rest} more, in evaluation.json"] if rest > 0 else lines


def markdown(results: Results) -> str:
    """The report as Markdown, with the full protocols."""
    lines = [f"# Evaluation of {results.target}", ""]
    if results.folders:
        lines += _markdown_table(_headings(results), figure_rows(results))
        if _has_intervals(results):
            lines += [f"{INTERVALS}.", ""]
    if results.profile:
        lines += ["## Costs", "", *_markdown_table(["", "base", "tuned", "ratio"], cost_rows(results.profile))]
        lines += [f"- {key}: {value}" for key, value in results.profile["protocol"].items()] + [""]
    extra = [*results.notes, *_fault_lines(results)]
    if extra:
        lines += ["## Notes", "", *[f"- {line}" for line in extra], ""]
    figures = {figure.protocol_id: figure for folder in results.folders for figure in folder.figures}
    if figures:
        lines += ["## Protocols", "", "Figures with different protocols must not be compared.", ""]
        lines += [_protocol_line(figure) for figure in figures.values()] + [""]
    return "\n".join(lines)


def _markdown_table(headings: list[str], rows: list[list[str]]) -> list[str]:
    rule = [":--", *["--:"] * (len(headings) - 1)]
    return [f"| {' | '.join(row)} |" for row in [headings, rule, *rows]] + [""]


def _protocol_line(figure: Figure) -> str:
    parts = "; ".join(f"{key} {value}" for key, value in figure.protocol.items())
    return f"- `{figure.protocol_id}`: {parts}"


def write(results: Results, folder: str | Path) -> tuple[Path, Path]:
    """Writes evaluation.json and evaluation.md into `folder`, each atomically; returns their paths."""
    folder = Path(folder)
    write_json(folder / "evaluation.json", results.to_json())
    write_text(folder / "evaluation.md", markdown(results))
    return folder / "evaluation.json", folder / "evaluation.md"
