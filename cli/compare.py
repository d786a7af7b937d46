"""`sctool compare`: the figures of several evaluations side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import UsageError


def compare(
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", help="Run names or folders, samples folders, or evaluation.json files."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    out: Annotated[Path | None, typer.Option(help="Also write the table as Markdown to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Compare the results of `sctool evaluate` for several runs.

    Figures with different protocols never share a row; they are listed below the table, with what differs.

    Examples:

      sctool compare edges edges-lora

      sctool compare runs/a runs/b samples/c --out table.md

      sctool compare a/evaluation.json b/evaluation.json --json
    """
    if out and out.is_dir():
        raise UsageError(f"--out {out} is a folder; pass a file, e.g. {out / 'comparison.md'}.")

    from ..core.files import write_text
    from ..eval.report.compare import compare_runs, markdown, show

    comparison = compare_runs(targets or [], runs)
    if out:
        write_text(out, markdown(comparison))
    if as_json:
        print(json.dumps(comparison.to_json()))
        return
    show(comparison)
    if out:
        print(out)
