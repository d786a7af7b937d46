"""`sctool weights`: list, fetch and check the networks that conditions and metrics can use."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..core.data.conditions import condition_names

app = typer.Typer(
    help="List, fetch and check the weights of annotators and metrics.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command("list")
def list_(
    cond: Annotated[
        str | None, typer.Option(help=f"Only those of one condition: {condition_names(network=True)}.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """List the known weights: condition, licence, size, and whether they are on this machine.

    Any other hub id or folder in transformers' format works too:
    --cond depth:model=OWNER/NAME. Check the model card before commercial use.

    Examples:

      sctool weights list --cond depth
    """
    from ..annotators.networks.weights import WEIGHTS, find_cached
    from ..core.errors import unknown

    known = {name for row in WEIGHTS.values() for name in row.conds}
    if cond is not None and cond not in known:
        raise unknown("condition with weights", cond, known)
    rows = [(row, find_cached(row)) for row in WEIGHTS.values() if cond is None or cond in row.conds]
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
            "revision": row.revision if weights is None else weights.revision,
            "licence": row.licence,
            "commercial": row.commercial,
            "megabytes": row.megabytes,
            "path": None if weights is None else str(weights.path),
        }
        for row, weights in rows
    ]
    print(json.dumps({"weights": table}))


def _show(rows: list) -> None:
    """Two lines per row, 80 columns: hub ids are too long for a column of a table."""
    line = "{:<24}{:<12}{:<10}{:<17}{:<11}{}"
    print(line.format("name", "for", "role", "licence", "commercial", "cached"))
    commercial = {True: "yes", False: "no", None: "see card"}
    for row, weights in rows:
        role = "default" if row.default and row.role == "annotator" else row.role
        conds = ", ".join(row.conds)
        print(line.format(row.name, conds, role, row.licence, commercial[row.commercial], "yes" if weights else "no"))
        print(f"  {row.repo}{f' {row.file}' if row.file else ''}  {row.megabytes:.0f} MB")


@app.command(no_args_is_help=True)
def fetch(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Names from the list, or conditions for their defaults.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Download weights into the Hugging Face cache; print their path and SHA-256.

    Examples:

      sctool weights fetch hed depth

      HF_HOME=/data/hf sctool weights fetch mask2former
    """
    from ..annotators.networks.weights import fetch as run
    from ..annotators.networks.weights import select

    fetched = {row.name: (run(row), row.licence) for row in select(names)}
    if as_json:
        rows = {
            name: {"path": str(weights.path), "sha256": weights.sha256, "licence": licence}
            for name, (weights, licence) in fetched.items()
        }
        print(json.dumps(rows))
        return
    for name, (weights, licence) in fetched.items():
        print(f"{name}: {weights.path}\n  sha256 {weights.sha256}  licence {licence}")


@app.command()
def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME...]", help="Names or conditions; everything on this machine by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Hash the weights on this machine again and name damaged files. Works offline; exit code 1 for damage."""
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
        bad = [check.file for check in checks if check.intact is False]
        unknown = sum(check.intact is None for check in checks)
        damaged += [f"{row.name}: {file}" for file in bad]
        table[row.name] = {"files": len(checks), "unknown": unknown, "damaged": [str(file) for file in bad]}
    if as_json:
        print(json.dumps(table))
    else:
        for name, counts in table.items():
            unchecked = f", {counts['unknown']} without a known hash" if counts["unknown"] else ""
            intact = counts["files"] - counts["unknown"] - len(counts["damaged"])
            print(f"{name}: {intact} of {counts['files']} files intact{unchecked}")
        if not table:
            print("none of the listed weights are on this machine: sctool weights list")
    if damaged:
        raise SctoolError(
            f"damaged: {'; '.join(damaged)}. Delete these files (and what they link to) and fetch the weights again."
        )
