"""Evaluations of several runs side by side: one row per figure, only where the protocols are the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...core.errors import SctoolError, UsageError, unknown
from ..results import Figure
from ..targets import ambiguous, run_of_name
from .tables import ARROWS, number

FILE = "evaluation.json"


class _FigureEntry(BaseModel):
    name: str
    value: float | None
    """None for NaN and infinity."""
    better: Literal["lower", "higher", ""]
    interval: tuple[float, float] | None = None
    protocol: str


class _FolderEntry(BaseModel):
    count: int
    figures: dict[str, _FigureEntry]


class _EvaluationFile(BaseModel):
    """The parts of what `Results.to_json` writes that are used here."""

    folders: dict[str, _FolderEntry]
    protocols: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.json: the figures, by key, of a run's own images and of its base's images."""

    label: str
    file: Path
    count: int
    figures: dict[str, Figure]
    base: dict[str, Figure]


@dataclass(frozen=True)
class ComparisonRow:
    """One figure under one protocol, with a value per run; `best` is a run's index, and `verdict` explains it."""

    first: Figure
    base: Figure | None
    figures: list[Figure | None]
    best: int | None
    verdict: str


@dataclass(frozen=True)
class Difference:
    """Figures that runs measured under different protocols: the runs of each protocol, and the keys that differ."""

    names: list[str]
    groups: list[list[str]]
    keys: dict[str, list[Any]]
    """Protocol key -> its value in each group; None where it has none."""

    def __str__(self) -> str:
        keys = [f"{key} ({' / '.join(map(str, v))})" if _worth_showing(key, v) else key for key, v in self.keys.items()]
        runs = " / ".join(", ".join(group) for group in self.groups)
        return f"{'; '.join(self.names)}: {', '.join(keys)} differ between {runs}"


def _worth_showing(key: str, values: Sequence[Any]) -> bool:
    """Whether the values themselves are informative; hashes and lists are not."""
    short = all(isinstance(value, int | float | str | None) and len(str(value)) <= 24 for value in values)
    return short and not key.endswith(("hash", "sha256"))


@dataclass
class Comparison:
    """The figures of several evaluations side by side, and what could not be compared."""

    runs: list[Evaluation]
    rows: list[ComparisonRow]
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything as one JSON value; rows name their protocol, which is listed once under "protocols"."""
        labels = [run.label for run in self.runs]
        return {
            "runs": {run.label: {"file": str(run.file), "count": run.count} for run in self.runs},
            "figures": [
                {
                    "key": row.first.key,
                    "name": row.first.name,
                    "better": row.first.better,
                    "protocol": row.first.protocol_id,
                    "base": _value_json(row.base),
                    "values": {label: _value_json(f) for label, f in zip(labels, row.figures, strict=True)},
                    "best": None if row.best is None else labels[row.best],
                    "verdict": row.verdict,
                }
                for row in self.rows
            ],
            "differences": [{"names": d.names, "groups": d.groups, "keys": d.keys} for d in self.differences],
            "notes": self.notes,
            "protocols": {row.first.protocol_id: row.first.protocol for row in self.rows},
        }


def _value_json(figure: Figure | None) -> dict[str, Any] | None:
    return None if figure is None else {"value": figure.value, "interval": figure.interval}


# ------------------------------------------------------------------------------------------------------- reading


def find_evaluation(target: str | Path, runs: str | Path = "runs") -> Path:
    """The evaluation.json that `target` means: the file itself, its folder, or the name of a run under `runs`.

    Raises `UsageError` for an unknown name, for a run or folder that was not evaluated, and for a name that is both an
    evaluated folder here and an evaluated run.
    """
    path, run = Path(target).expanduser(), run_of_name(target, runs)
    if path.is_file():
        return path
    folders = [folder for folder in (path, Path(runs) / target) if folder.is_dir()]
    files = [folder / FILE for folder in folders if (folder / FILE).is_file()]
    if run and len({file.resolve() for file in files}) > 1:
        raise ambiguous(target, path, run)
    if files:
        return files[0]
    if folders:
        folder = next((folder for folder in folders if (folder / "config.yaml").is_file()), folders[0])
        raise UsageError(f"{folder} has no {FILE}. Create it first: sctool evaluate {folder}")
    known = [p.parent.name for p in Path(runs).glob("*/config.yaml")]
    if known:
        raise unknown("run", str(target), known)
    raise UsageError(f"'{target}' is not a run, samples folder or {FILE}, and {runs}/ contains no runs; see --runs.")


def read_evaluation(file: str | Path, label: str = "") -> Evaluation:
    """Reads one evaluation.json. The run's figures are those of "tuned", else of the last folder in it.

    Raises `UsageError` for a file that `sctool evaluate` did not write, or without figures.
    """
    file = Path(file)
    try:
        content = _EvaluationFile.model_validate(json.loads(file.read_text(encoding="utf-8")))
        folders = {name: _figures(folder, content.protocols) for name, folder in content.folders.items()}
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError) as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else error
        raise UsageError(
            f"{file} is not an {FILE} as `sctool evaluate` writes it ({where}). Create it again with `sctool evaluate`."
        ) from error
    own = "tuned" if "tuned" in folders else next(reversed(folders), None)
    if own is None or not folders[own]:
        raise UsageError(f"{file} contains no figures of images (perhaps only costs). Run `sctool evaluate` again.")
    base = folders["base"] if "base" in folders and own != "base" else {}
    return Evaluation(label or _label(file), file, content.folders[own].count, folders[own], base)


def _figures(folder: _FolderEntry, protocols: Mapping[str, dict[str, Any]]) -> dict[str, Figure]:
    return {
        key: Figure(key, f.name, f.value, f.better, protocols[f.protocol], f.interval)
        for key, f in folder.figures.items()
        if f.value is not None
    }


def _label(file: Path) -> str:
    return file.resolve().parent.name if file.name == FILE else file.stem


# ----------------------------------------------------------------------------------------------------- comparing


def compare_runs(targets: Sequence[str | Path], runs: str | Path = "runs") -> Comparison:
    """Puts the figures of at least two evaluations side by side where their protocols are the same.

    Raises `UsageError` for fewer than two or a repeated one (see also `find_evaluation`, `read_evaluation`), and
    `SctoolError` if no figure has the same protocol in two of them.
    """
    files = [find_evaluation(target, runs) for target in targets]
    if len(files) < 2:
        raise UsageError("compare needs at least two runs: sctool compare RUN RUN ...")
    if len({file.resolve() for file in files}) < len(files):
        raise UsageError("compare: the same evaluation is given twice.")
    labels = [_label(file) for file in files]
    if len(set(labels)) < len(labels):
        labels = [str(target) for target in targets]
    return side_by_side([read_evaluation(file, label) for file, label in zip(files, labels, strict=True)])


def side_by_side(evaluations: list[Evaluation]) -> Comparison:
    """The rows, and what cannot be in one row. Raises `SctoolError` if there is no row."""
    comparison = Comparison(evaluations, [])
    for key in dict.fromkeys(key for evaluation in evaluations for key in evaluation.figures):
        _add_figure(comparison, key)
    if not comparison.rows:
        reason = next(map(str, comparison.differences), "no two of them have a figure in common")
        labels = ", ".join(evaluation.label for evaluation in evaluations)
        raise SctoolError(f"{labels} have no comparable figure ({reason}). Evaluate them in the same way.")
    return comparison


def _add_figure(comparison: Comparison, key: str) -> None:
    """Adds one row for each protocol that several runs share, and the differences between the protocols."""
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in comparison.runs:
        if key in evaluation.figures:
            groups.setdefault(evaluation.figures[key].protocol_id, []).append(evaluation)
    examples = [group[0].figures[key] for group in groups.values()]
    if len(groups) > 1:
        _add_difference(comparison, examples, [[run.label for run in group] for group in groups.values()])
    for first, group in zip(examples, groups.values(), strict=True):
        if len(group) > 1:
            figures = [run.figures[key] if run in group else None for run in comparison.runs]
            base = _shared_base(first, group, comparison.notes)
            comparison.rows.append(ComparisonRow(first, base, figures, *winner(figures)))
    if sum(map(len, groups.values())) == 1:
        ((only,),) = groups.values()
        comparison.notes.append(f"{examples[0].name}: only in {only.label}")


def _add_difference(comparison: Comparison, examples: Sequence[Figure], labels: list[list[str]]) -> None:
    """Figures that differ in the same way between the same runs share one entry."""
    keys = differing([figure.protocol for figure in examples])
    same = next((d for d in comparison.differences if (d.groups, d.keys) == (labels, keys)), None)
    if same:
        same.names.append(examples[0].name)
    else:
        comparison.differences.append(Difference([examples[0].name], labels, keys))


def differing(protocols: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Keys whose values are not all the same, e.g. "sampling.steps", with each protocol's value."""
    flat = [_flat(protocol) for protocol in protocols]
    values = {key: [protocol.get(key) for protocol in flat] for key in sorted(set().union(*flat))}
    return {key: group for key, group in values.items() if any(value != group[0] for value in group)}


def _flat(value: Mapping[str, Any], stem: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{stem}{key}.") if isinstance(item, Mapping) else {stem + key: item}
    return flat


def winner(figures: Sequence[Figure | None]) -> tuple[int | None, str]:
    """The index of the figure whose interval is better than all others and overlaps none, and the verdict in words."""
    present = {i: f for i, f in enumerate(figures) if f is not None}
    if len(present) < 2 or not next(iter(present.values())).better:
        return None, ""
    lower = next(iter(present.values())).better == "lower"
    spans = {i: f.interval for i, f in present.items() if f.interval and all(map(math.isfinite, f.interval))}
    if len(spans) < len(present):
        return None, "no intervals"
    best = (min if lower else max)(present, key=lambda i: present[i].value)
    low, high = spans.pop(best)
    apart = all(high < other[0] if lower else low > other[1] for other in spans.values())
    return (best, "best") if apart else (None, "within intervals")


def _shared_base(figure: Figure, group: Sequence[Evaluation], notes: list[str]) -> Figure | None:
    """The base's figure if the runs agree on it; otherwise None, with a note."""
    bases = {run.label: run.base[figure.key] for run in group if figure.key in run.base}
    bases = {label: base for label, base in bases.items() if base.protocol_id == figure.protocol_id}
    first = next(iter(bases.values()), None)
    if first and not all(math.isclose(base.value, first.value, rel_tol=1e-6) for base in bases.values()):
        values = ", ".join(f"{number(base.value)} ({label})" for label, base in bases.items())
        notes.append(f"{figure.name}: the base's figure differs between runs: {values}. Were its images drawn alike?")
        return None
    return first


# ----------------------------------------------------------------------------------------------------- reporting


def with_interval(figure: Figure | None) -> str:
    """ "0.3666 [0.351, 0.382]"; only the value without an interval, a dash without a figure."""
    if figure is None:
        return "–"
    span = f" [{number(figure.interval[0])}, {number(figure.interval[1])}]" if figure.interval else ""
    return number(figure.value) + span


def headings(comparison: Comparison) -> list[str]:
    """The table's headings: "" for the name, the base if there is one, one per run, verdict."""
    base = ["base"] if any(row.base for row in comparison.rows) else []
    return ["", *base, *[f"{run.label} (N={run.count})" for run in comparison.runs], "verdict"]


def cells(comparison: Comparison, row: ComparisonRow) -> list[str]:
    """A row's texts under `headings`."""
    base = [with_interval(row.base)] if any(other.base for other in comparison.rows) else []
    verdict = row.verdict if row.best is None else f"{comparison.runs[row.best].label} {row.verdict}"
    return [f"{row.first.name} {ARROWS[row.first.better]}".strip(), *base, *map(with_interval, row.figures), verdict]


def below(comparison: Comparison) -> list[str]:
    """The lines under the table: what was not compared and why, and notes."""
    return [*[f"not compared: {difference}" for difference in comparison.differences], *comparison.notes]


def _best_cell(comparison: Comparison, row: ComparisonRow) -> int | None:
    """Which of the row's `cells` is the winner's."""
    return None if row.best is None else len(cells(comparison, row)) - 1 - len(comparison.runs) + row.best


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Prints the table with the winners in bold, and what could not be compared."""
    console = console or Console()
    table = Table(title="Comparison", title_justify="left", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(heads := headings(comparison)):
        table.add_column(escape(heading), justify="left" if index in (0, len(heads) - 1) else "right")
    for row in comparison.rows:
        best = _best_cell(comparison, row)
        # An interval goes below its value, since runs are many and terminals narrow.
        texts = [escape(text.replace(" [", "\n[")) for text in cells(comparison, row)]
        table.add_row(*[f"[bold]{text}[/bold]" if i == best else text for i, text in enumerate(texts)])
    console.print(table)
    for line in below(comparison):
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def markdown(comparison: Comparison) -> str:
    """The comparison as Markdown, with the winners in bold."""
    heads = headings(comparison)
    rows = [heads, [":--", *["--:"] * (len(heads) - 2), ":--"]]
    for row in comparison.rows:
        best = _best_cell(comparison, row)
        rows.append([f"**{text}**" if i == best else text for i, text in enumerate(cells(comparison, row))])
    lines = ["# Comparison", "", *[f"| {' | '.join(text.replace('|', chr(92) + '|') for text in r)} |" for r in rows]]
    lines += ["", "Intervals are 95 %. A run is best only if its interval overlaps no other run's interval.", ""]
    return "\n".join([*lines, *[f"- {line}" for line in below(comparison)], ""])
