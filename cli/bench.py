"""`sctool bench`: the papers' tables, each one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..eval.features.names import FEATURES
from .options import Command, help_of

app = typer.Typer(
    help="Make a paper's table: methods trained, drawn and measured alike, with intervals over seeds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def _group() -> None:
    """Keeps `transfer` a command of its own while it is the only table."""


@app.command(cls=Command)
def transfer(
    pairs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings of all runs as in sctool train, or METHOD:KEY=VALUE of one method's: lora:tuner.rank=32.",
        ),
    ] = None,
    methods: Annotated[str, typer.Option(help="Methods to compare, see `sctool methods`.")] = "full,scedit",
    base: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "base"))] = None,
    data: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "data"))] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of every run.")] = 500,
    batch: Annotated[int | None, typer.Option(help=help_of("TrainConfig", "batch"))] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method, with seeds 0, 1, ...; 3 or more for intervals.")] = 3,
    lr: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD=RATE", help="A method's learning rate; repeatable. \\[default: the method's own]"),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(help="Rates to try for every method without --lr, e.g. 3e-4,1e-3; lowest held-out loss wins."),
    ] = None,
    rate_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the runs that --rates makes. \\[default: --steps]")
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Images drawn of each run.")] = 200,
    sample_steps: Annotated[int | None, typer.Option(help="Sampler steps. \\[default: 50]")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of the images. \\[default: the base's usual, 7.5 or for DiT 4]")
    ] = None,
    features: Annotated[
        str, typer.Option(help=f"Features of the distance: {', '.join(FEATURES)}, as in `sctool evaluate`.")
    ] = "auto",
    weights: Annotated[
        list[str] | None, typer.Option(help="Weights of the features, as in `sctool evaluate`; repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the table and its runs.")] = Path("bench/transfer"),
    report: Annotated[bool, typer.Option("--report", help="Also write report.html, with images, to --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what is left to do and how long it takes; write nothing.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network, not even for hub ids.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Adapt one base to one data set with several methods, as in DiffScaler's table 1.

    Data order, noise, steps, batch and precision are the same for every method. Runs are ordinary run folders; the
    same command again does what is not done yet.

    Examples:

      sctool bench transfer --steps 20 --count 8                built-in base and data

      sctool bench transfer --data birds --methods full,scedit --steps 500 --batch 16 --dry-run

      sctool bench transfer --data birds --rates 3e-5,1e-4,3e-4 --rate-steps 200 --report

      sctool bench transfer --data birds --lr full=1e-5 scedit:tuner.ratio=0.5 precision=bf16 --json
    """
    from ..core.files import write_json
    from ..eval.bench.settings import make_settings
    from ..eval.bench.workshop import open_workshop

    settings = make_settings(
        methods=[name.strip() for name in methods.split(",") if name.strip()],
        seeds=seeds,
        flags={"base": base, "data": data, "steps": steps, "batch": batch},
        pairs=pairs or (),
        lr=lr or (),
        rates=_numbers(rates),
        rate_steps=rate_steps,
        count=count,
        sample_steps=sample_steps,
        guidance=guidance,
        features=features,
        weights=weights or (),
    )
    shop = open_workshop(settings, out, offline=offline, quiet=quiet)
    if dry_run:
        from ..eval.bench.plan import plan_transfer, show_plan

        plan = plan_transfer(shop)
        print(json.dumps(plan) if as_json else show_plan(plan))
        return

    from ..eval.bench.show import show
    from ..eval.bench.transfer import transfer as run

    table = run(shop)
    files = [out / "transfer.json"]
    write_json(files[0], table.to_json())
    if report:
        from ..eval.bench.page import write_page

        files.append(write_page(table, shop))
    if as_json:
        print(json.dumps(table.to_json()))
        return
    show(table)
    for file in files:
        print(file)


def _numbers(text: str | None) -> list[float]:
    from ..core.errors import UsageError

    try:
        return [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"--rates {text}: write numbers with commas, e.g. --rates 3e-4,1e-3.") from error
