"""`sctool weights`: which networks the conditions can use, getting them, and whether they are whole."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="List, fetch and check the weights of annotators and evaluators.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command("list")
def list_(
    cond: Annotated[
        str | None, typer.Option(help="Only those of one condition: hed, sketch, depth, seg, pose.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Show the weights by condition: licence, size, and whether they are on this machine.

    Any other folder in transformers' format or hub id works too:
    --cond depth:model=OWNER/NAME. Check a model's card before you use its maps commercially.

    Examples:

      sctool weights list --cond depth
    """
    from ..annotators.networks.weights import WEIGHTS, at_hand
    from ..core.errors import unknown

    known = {name for row in WEIGHTS.values() for name in row.conds}
    if cond is not None and cond not in known:
        raise unknown("condition with weights", cond, known)
    rows = [(row, at_hand(row)) for row in WEIGHTS.values() if cond is None or cond in row.conds]
    if not as_json:
        _show(rows)
        return
    table = [
        {
            "name": row.name,
            "conditions": row.conds,
            "role": row.role,
            "default": row.default,
            "repo": row.repo,
            "file": row.file,
            "revision": row.revision if found is None else found.revision,
            "licence": row.licence,
            "commercial": row.commercial,
            "megabytes": row.megabytes,
            "path": None if found is None else str(found.path),
        }
        for row, found in rows
    ]
    print(json.dumps({"weights": table}))


def _show(rows: list) -> None:
    """Two lines a row, 80 columns: hub ids are too long for a table's cells."""
    line = "{:<24}{:<12}{:<10}{:<17}{:<11}{}"
    print(line.format("name", "for", "role", "licence", "commercial", "here"))
    commercial = {True: "yes", False: "no", None: "see card"}
    for row, found in rows:
        role = "default" if row.default and row.role == "annotator" else row.role
        conds = ", ".join(row.conds)
        print(line.format(row.name, conds, role, row.licence, commercial[row.commercial], "yes" if found else "no"))
        print(f"  {row.repo}{f' {row.file}' if row.file else ''}  {row.megabytes:.0f} MB")


@app.command(no_args_is_help=True)
def fetch(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Names from the list, or conditions for their defaults.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Download weights into the Hugging Face cache; print where they lie and their SHA-256.

    Examples:

      sctool weights fetch hed depth

      HF_HOME=/data/hf sctool weights fetch mask2former
    """
    from ..annotators.networks.weights import fetch as run
    from ..annotators.networks.weights import select

    fetched = {row.name: (run(row), row.licence) for row in select(names)}
    if as_json:
        rows = {
            name: {"path": str(f.path), "sha256": f.sha256, "licence": known} for name, (f, known) in fetched.items()
        }
        print(json.dumps(rows))
        return
    for name, (found, known) in fetched.items():
        print(f"{name}: {found.path}\n  sha256 {found.sha256}  licence {known}")


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Names or conditions; all at hand by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Hash the weights on this machine again and name damaged files. Uses no network; exit code 1 for damage."""
    from ..annotators.networks.weights import WEIGHTS, select
    from ..annotators.networks.weights import verify as run
    from ..core.errors import SctoolError

    damaged: list[str] = []
    table: dict[str, dict[str, Any]] = {}
    for row in select(names) if names else WEIGHTS.values():
        checks = run(row)
        if not checks:
            if names:
                raise SctoolError(f"'{row.name}' is not on this machine. Get it with: sctool weights fetch {row.name}")
            continue
        bad = [check.file for check in checks if check.sound is False]
        unknown = sum(check.sound is None for check in checks)
        damaged += [f"{row.name}: {file}" for file in bad]
        table[row.name] = {"files": len(checks), "unknown": unknown, "damaged": [str(file) for file in bad]}
    if as_json:
        print(json.dumps(table))
    else:
        for name, found in table.items():
            untold = f", {found['unknown']} without a known hash" if found["unknown"] else ""
            sound = found["files"] - found["unknown"] - len(found["damaged"])
            print(f"{name}: {sound} of {found['files']} files sound{untold}")
        if not table:
            print("no weights of the list are on this machine: sctool weights list")
    if damaged:
        raise SctoolError(
            f"damaged: {'; '.join(damaged)}. Delete these files (and what they link to) and fetch the weights again."
        )
