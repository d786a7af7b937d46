"""Evaluations of several runs side by side: a row a figure, only where the protocols are the same."""

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
from .tables import ARROWS, number

FILE = "evaluation.json"


class _Number(BaseModel):
    name: str
    value: float | None
    """None for what was no number."""
    better: Literal["lower", "higher", ""]
    interval: tuple[float, float] | None = None
    protocol: str


class _Folder(BaseModel):
    count: int
    figures: dict[str, _Number]


class _File(BaseModel):
    """What `Results.to_json` writes, as far as it is read here."""

    folders: dict[str, _Folder]
    protocols: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.json: the figures, by key, of a run's own pictures and of its base's."""

    label: str
    file: Path
    count: int
    figures: dict[str, Figure]
    base: dict[str, Figure]


@dataclass(frozen=True)
class Row:
    """One figure of one protocol, a value a run; `verdict` says why `best`, a run's index, is none."""

    first: Figure
    base: Figure | None
    figures: list[Figure | None]
    best: int | None
    verdict: str


@dataclass(frozen=True)
class Difference:
    """Figures that runs measured by different protocols: the runs of each protocol, and the keys that differ."""

    names: list[str]
    groups: list[list[str]]
    keys: dict[str, list[Any]]
    """Protocol key -> its value in each group; None where it has none."""

    def __str__(self) -> str:
        said = [f"{key} ({' / '.join(map(str, v))})" if _telling(key, v) else key for key, v in self.keys.items()]
        runs = " / ".join(", ".join(group) for group in self.groups)
        return f"{'; '.join(self.names)}: {', '.join(said)} differ between {runs}"


def _telling(key: str, values: Sequence[Any]) -> bool:
    """Whether the values say more than that they differ: hashes and lists do not."""
    short = all(isinstance(value, int | float | str | None) and len(str(value)) <= 24 for value in values)
    return short and not key.endswith(("hash", "sha256"))


@dataclass
class Comparison:
    """What `compare` found."""

    runs: list[Evaluation]
    rows: list[Row]
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything as one JSON value; rows name their protocol, which stands once under "protocols"."""
        labels = [run.label for run in self.runs]
        return {
            "runs": {run.label: {"file": str(run.file), "count": run.count} for run in self.runs},
            "figures": [
                {
                    "key": row.first.key,
                    "name": row.first.name,
                    "better": row.first.better,
                    "protocol": row.first.protocol_id,
                    "base": _pair(row.base),
                    "values": {label: _pair(f) for label, f in zip(labels, row.figures, strict=True)},
                    "best": None if row.best is None else labels[row.best],
                    "verdict": row.verdict,
                }
                for row in self.rows
            ],
            "differences": [{"names": d.names, "groups": d.groups, "keys": d.keys} for d in self.differences],
            "notes": self.notes,
            "protocols": {row.first.protocol_id: row.first.protocol for row in self.rows},
        }


def _pair(figure: Figure | None) -> dict[str, Any] | None:
    return None if figure is None else {"value": figure.value, "interval": figure.interval}


# ------------------------------------------------------------------------------------------------------- reading


def find(target: str | Path, runs: str | Path = "runs") -> Path:
    """The evaluation.json that `target` means: the file itself, its folder, or the name of a run under `runs`.

    Raises `UsageError` for an unknown name, and for a run or folder that was not evaluated.
    """
    path = Path(target).expanduser()
    if path.is_file():
        return path
    folders = [folder for folder in (path, Path(runs) / target) if folder.is_dir()]
    found = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
    if found:
        return found
    if folders:
        raise UsageError(f"{folders[0]} has no {FILE}. Make it first: sctool evaluate {folders[0]}")
    known = [p.parent.name for p in Path(runs).glob("*/config.yaml")]
    if known:
        raise unknown("run", str(target), known)
    raise UsageError(f"'{target}' is no run, samples folder or {FILE}, and {runs}/ holds no run; see --runs.")


def load(file: str | Path, label: str = "") -> Evaluation:
    """Reads one evaluation.json. The run's figures are those of "tuned", else of the last folder in it.

    Raises `UsageError` when it is not what `sctool evaluate` writes, or holds no figures.
    """
    file = Path(file)
    try:
        read = _File.model_validate(json.loads(file.read_text(encoding="utf-8")))
        folders = {name: _figures(folder, read.protocols) for name, folder in read.folders.items()}
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError) as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else error
        raise UsageError(
            f"{file} is no {FILE} as `sctool evaluate` writes it ({where}). Make it again with `sctool evaluate`."
        ) from error
    own = "tuned" if "tuned" in folders else next(reversed(folders), None)
    if own is None or not folders[own]:
        raise UsageError(f"{file} holds no figures of pictures (perhaps costs alone). Run `sctool evaluate` again.")
    base = folders["base"] if "base" in folders and own != "base" else {}
    return Evaluation(label or _label(file), file, read.folders[own].count, folders[own], base)


def _figures(folder: _Folder, protocols: Mapping[str, dict[str, Any]]) -> dict[str, Figure]:
    return {
        key: Figure(key, f.name, f.value, f.better, protocols[f.protocol], f.interval)
        for key, f in folder.figures.items()
        if f.value is not None
    }


def _label(file: Path) -> str:
    return file.resolve().parent.name if file.name == FILE else file.stem


# ----------------------------------------------------------------------------------------------------- comparing


def compare(targets: Sequence[str | Path], runs: str | Path = "runs") -> Comparison:
    """Puts the figures of at least two evaluations side by side where their protocols are the same.

    Raises `UsageError` for fewer than two or one given twice (see also `find`, `load`), and `SctoolError` where no
    figure has one protocol in two of them.
    """
    files = [find(target, runs) for target in targets]
    if len(files) < 2:
        raise UsageError("compare needs at least two runs: sctool compare RUN RUN ...")
    if len({file.resolve() for file in files}) < len(files):
        raise UsageError("compare: the same evaluation is given twice.")
    labels = [_label(file) for file in files]
    if len(set(labels)) < len(labels):
        labels = [str(target) for target in targets]
    return side_by_side([load(file, label) for file, label in zip(files, labels, strict=True)])


def side_by_side(evaluations: list[Evaluation]) -> Comparison:
    """The rows, and below them what cannot stand in one. Raises `SctoolError` where there is no row."""
    found = Comparison(evaluations, [])
    for key in dict.fromkeys(key for each in evaluations for key in each.figures):
        groups: dict[str, list[Evaluation]] = {}
        for each in evaluations:
            if key in each.figures:
                groups.setdefault(each.figures[key].protocol_id, []).append(each)
        members = [group[0].figures[key] for group in groups.values()]
        if len(groups) > 1:
            labels = [[each.label for each in group] for group in groups.values()]
            keys = differing([figure.protocol for figure in members])
            same = next((d for d in found.differences if (d.groups, d.keys) == (labels, keys)), None)
            if same:
                same.names.append(members[0].name)
            else:
                found.differences.append(Difference([members[0].name], labels, keys))
        for first, group in zip(members, groups.values(), strict=True):
            if len(group) > 1:
                figures = [each.figures[key] if each in group else None for each in evaluations]
                best, verdict = winner(figures)
                found.rows.append(Row(first, _shared_base(first, group, found.notes), figures, best, verdict))
        if sum(map(len, groups.values())) == 1:
            (only,) = next(iter(groups.values()))
            found.notes.append(f"{members[0].name}: only in {only.label}")
    if not found.rows:
        reason = next(map(str, found.differences), "no figure was computed for two of them")
        labels = ", ".join(each.label for each in evaluations)
        raise SctoolError(f"{labels} have no comparable figure ({reason}). Evaluate them in the same way.")
    return found


def differing(protocols: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Keys whose values are not all the same, e.g. "sampling.steps", with each protocol's value."""
    flat = [_flat(protocol) for protocol in protocols]
    keys = sorted(set().union(*flat))
    values = {key: [each.get(key) for each in flat] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _flat(value: Mapping[str, Any], stem: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, each in value.items():
        made |= _flat(each, f"{stem}{key}.") if isinstance(each, Mapping) else {stem + key: each}
    return made


def winner(figures: Sequence[Figure | None]) -> tuple[int | None, str]:
    """The index of the figure that is better than all others by more than the intervals, and the verdict in words."""
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
    """The base's figure, where the runs agree on it; where they do not, a note says so."""
    bases = {each.label: each.base[figure.key] for each in group if figure.key in each.base}
    bases = {label: base for label, base in bases.items() if base.protocol_id == figure.protocol_id}
    first = next(iter(bases.values()), None)
    if first and not all(math.isclose(base.value, first.value, rel_tol=1e-6) for base in bases.values()):
        said = ", ".join(f"{number(base.value)} ({label})" for label, base in bases.items())
        notes.append(f"{figure.name}: the base's figure is not the same in all: {said}; were the pictures drawn alike?")
        return None
    return first


# ----------------------------------------------------------------------------------------------------- reporting


def with_interval(figure: Figure | None) -> str:
    """ "0.3666 [0.351, 0.382]"; the value alone where there is no interval, a dash where there is nothing."""
    if figure is None:
        return "–"
    span = f" [{number(figure.interval[0])}, {number(figure.interval[1])}]" if figure.interval else ""
    return number(figure.value) + span


def headings(found: Comparison) -> list[str]:
    """The table's headings: "" for the name, the base where there is one, a run each, verdict."""
    base = ["base"] if any(row.base for row in found.rows) else []
    return ["", *base, *[f"{run.label} (N={run.count})" for run in found.runs], "verdict"]


def cells(found: Comparison, row: Row) -> list[str]:
    """A row's texts under `headings`."""
    base = [with_interval(row.base)] if any(each.base for each in found.rows) else []
    verdict = row.verdict if row.best is None else f"{found.runs[row.best].label} {row.verdict}"
    return [f"{row.first.name} {ARROWS[row.first.better]}".strip(), *base, *map(with_interval, row.figures), verdict]


def below(found: Comparison) -> list[str]:
    """The lines under the table: what was not compared and why, and notes."""
    return [*[f"not compared: {each}" for each in found.differences], *found.notes]


def _best_cell(found: Comparison, row: Row) -> int | None:
    """Which of the row's `cells` is the winner's."""
    return None if row.best is None else len(cells(found, row)) - 1 - len(found.runs) + row.best


def show(found: Comparison, console: Console | None = None) -> None:
    """Prints the table, the winners bold, and what could not be compared."""
    console = console or Console()
    table = Table(title="Comparison", title_justify="left", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(heads := headings(found)):
        table.add_column(escape(heading), justify="left" if index in (0, len(heads) - 1) else "right")
    for row in found.rows:
        best = _best_cell(found, row)
        # An interval goes below its value, since runs are many and terminals narrow.
        texts = [escape(text.replace(" [", "\n[")) for text in cells(found, row)]
        table.add_row(*[f"[bold]{text}[/bold]" if i == best else text for i, text in enumerate(texts)])
    console.print(table)
    for line in below(found):
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def markdown(found: Comparison) -> str:
    """The comparison as Markdown, the winners bold."""
    heads = headings(found)
    rows = [heads, [":--", *["--:"] * (len(heads) - 2), ":--"]]
    for row in found.rows:
        best = _best_cell(found, row)
        rows.append([f"**{text}**" if i == best else text for i, text in enumerate(cells(found, row))])
    lines = ["# Comparison", "", *[f"| {' | '.join(text.replace('|', chr(92) + '|') for text in r)} |" for r in rows]]
    lines += ["", "Intervals are 95 %. A run is best only where its interval overlaps no other run's.", ""]
    return "\n".join([*lines, *[f"- {line}" for line in below(found)], ""])
