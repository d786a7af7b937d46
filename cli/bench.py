"""`sctool bench`: the papers' tables, each one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..eval.features.names import FEATURES
from .options import Command, help_of

if TYPE_CHECKING:
    from ..eval.bench.form import Form
    from ..eval.bench.settings import Measuring

app = typer.Typer(
    help="Make a paper's table: methods trained, drawn and measured alike, with intervals over seeds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Pairs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings of all runs as in sctool train, or METHOD:KEY=VALUE of one method's: lora:tuner.rank=32.",
    ),
]
Methods = Annotated[str, typer.Option(help="Methods to compare, see `sctool methods`.")]
Base = Annotated[str | None, typer.Option(help=help_of("TrainConfig", "base"))]
Bases = Annotated[
    str | None,
    typer.Option(help="Bases: 'mini', diffusers-format folders or hub ids, e.g. a teacher and its student, by commas."),
]
Data = Annotated[str | None, typer.Option(help=help_of("TrainConfig", "data"))]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps of every run.")]
Batch = Annotated[int | None, typer.Option(help=help_of("TrainConfig", "batch"))]
Seeds = Annotated[int, typer.Option(help="Runs of each row, with seeds 0, 1, ...; 3 or more for intervals.")]
Rate = Annotated[
    list[str] | None,
    typer.Option(metavar="METHOD=RATE", help="A method's learning rate; repeatable. \\[default: the method's own]"),
]
Rates = Annotated[
    str | None,
    typer.Option(
        help="Learning rates to try for every row without one of its own, e.g. 3e-4,1e-3; lowest held-out loss wins."
    ),
]
RateSteps = Annotated[
    int | None, typer.Option(min=1, help="Steps of the runs that --rates makes. \\[default: --steps]")
]
Count = Annotated[int, typer.Option(min=2, help="Images drawn of each run.")]
SampleSteps = Annotated[int | None, typer.Option(help="Sampler steps. \\[default: 50]")]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale of the images. \\[default: the base's usual, 7.5 or for DiT 4]")
]
Features = Annotated[
    str, typer.Option(help=f"Features of the distance: {', '.join(FEATURES)}, as in `sctool evaluate`.")
]
Weights = Annotated[
    list[str] | None, typer.Option(help="Weights of the features, as in `sctool evaluate`; repeatable.")
]
ClipModel = Annotated[str | None, typer.Option(help="CLIP of the CLIP score, as in `sctool evaluate`.")]
ClipWeights = Annotated[str | None, typer.Option(help="Its weights, as in `sctool evaluate`.")]
Out = Annotated[Path, typer.Option(help="Folder of the table and its runs.")]
Report = Annotated[bool, typer.Option("--report", help="Also write report.html, with images, to --out.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what is left to do and how long it takes; write nothing.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network, not even for hub ids.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]


@app.command(cls=Command)
def transfer(
    pairs: Pairs = None,
    methods: Methods = "full,scedit",
    base: Base = None,
    data: Data = None,
    steps: Steps = 500,
    batch: Batch = None,
    seeds: Seeds = 3,
    lr: Rate = None,
    rates: Rates = None,
    rate_steps: RateSteps = None,
    count: Count = 200,
    sample_steps: SampleSteps = None,
    guidance: Guidance = None,
    features: Features = "auto",
    weights: Weights = None,
    out: Out = Path("bench/transfer"),
    report: Report = False,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
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
    from ..eval.bench.transfer import Transfer

    flags = {"data": data, "steps": steps, "batch": batch}
    asked: dict[str, Any] = {
        "names": _names(methods), "bases": [base or "mini"], "seeds": seeds, "flags": flags, "pairs": pairs or (),
        "lr": lr or (), "rates": _numbers(rates), "rate_steps": rate_steps, "count": count,
        "sample_steps": sample_steps, "guidance": guidance, "measuring": _measuring(features, weights),
    }  # fmt: skip
    _run(Transfer(), asked, out, report=report, dry_run=dry_run, offline=offline, as_json=as_json, quiet=quiet)


@app.command(cls=Command)
def control(
    pairs: Pairs = None,
    methods: Methods = "scedit,diffscaler",
    cond: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "cond"))] = None,
    base: Bases = None,
    data: Data = None,
    maps: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "maps"))] = None,
    steps: Steps = 500,
    batch: Batch = None,
    seeds: Seeds = 3,
    lr: Rate = None,
    rates: Rates = None,
    rate_steps: RateSteps = None,
    count: Count = 200,
    sample_steps: SampleSteps = None,
    guidance: Guidance = None,
    features: Features = "auto",
    weights: Weights = None,
    clip_model: ClipModel = None,
    clip_weights: ClipWeights = None,
    evaluator: Annotated[
        list[str] | None,
        typer.Option(help="What extracts a condition from drawn images, as in `sctool evaluate`; repeatable."),
    ] = None,
    out: Out = Path("bench/control"),
    report: Report = False,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Control one or more bases by condition maps with several methods, as in SCEdit's table 2.

    Distance to the real images, CLIP score, adherence to each condition, parameters, memory and times; the untouched
    bases are the first rows. The same command again does what is not done yet.

    Examples:

      sctool bench control --cond canny --steps 20 --count 8    built-in base and data

      sctool bench control --cond canny --data birds --methods scedit,diffscaler --steps 500 --batch 16 --dry-run

      sctool bench control --cond canny,color --data birds --lr scedit=3e-4 scedit:tuner.kernel=3 --report

      sctool bench control --cond canny --base mini,runs/small/student --data birds
    """
    from ..eval.bench.control import Control

    flags = {"data": data, "maps": maps, "cond": cond, "steps": steps, "batch": batch}
    measuring = _measuring(features, weights, clip_model, clip_weights, evaluator)
    asked: dict[str, Any] = {
        "names": _names(methods), "bases": _names(base or "mini"), "seeds": seeds, "flags": flags,
        "pairs": pairs or (), "lr": lr or (), "rates": _numbers(rates), "rate_steps": rate_steps, "count": count,
        "sample_steps": sample_steps, "guidance": guidance, "measuring": measuring,
    }  # fmt: skip
    _run(Control(), asked, out, report=report, dry_run=dry_run, offline=offline, as_json=as_json, quiet=quiet)


@app.command(cls=Command)
def distill(
    pairs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings of all runs as in sctool distill, or ARM:KEY=VALUE of one arm's: half:ratio=0.5.",
        ),
    ] = None,
    arms: Annotated[
        str,
        typer.Option(
            help="Students to compare: lowrank, lowrank-undistilled, energy, energy-undistilled, bk-base, bk-small, "
            "bk-tiny, or any name with settings of its own."
        ),
    ] = "lowrank,lowrank-undistilled",
    base: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "base", "The teacher."))] = None,
    data: Data = None,
    steps: Steps = 500,
    batch: Batch = None,
    seeds: Seeds = 3,
    rates: Rates = None,
    rate_steps: RateSteps = None,
    count: Count = 200,
    sample_steps: SampleSteps = None,
    guidance: Guidance = None,
    features: Features = "auto",
    weights: Weights = None,
    clip_model: ClipModel = None,
    clip_weights: ClipWeights = None,
    out: Out = Path("bench/distill"),
    report: Report = False,
    dry_run: DryRun = False,
    offline: Offline = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Distil students of one base, as in the tables of ELR-Diffusion and BK-SDM.

    Distance to the real images and to the teacher's, CLIP score, parameters and times; the teacher is the first row.
    The same command again does what is not done yet.

    Examples:

      sctool bench distill --steps 20 --count 8                 built-in base and data

      sctool bench distill --base ./sd21 --data laion --arms lowrank,bk-small --steps 5000 --batch 32 --dry-run

      sctool bench distill --arms lowrank,bk-small --rates 3e-4,1e-3 --rate-steps 60 --report

      sctool bench distill --arms lowrank,energy,half half:ratio=0.5 half:start=balanced --report
    """
    from ..eval.bench.distill import Distill

    asked: dict[str, Any] = {
        "names": _names(arms), "bases": [base or "mini"], "seeds": seeds,
        "flags": {"data": data, "steps": steps, "batch": batch}, "pairs": pairs or (),
        "rates": _numbers(rates), "rate_steps": rate_steps, "count": count, "sample_steps": sample_steps,
        "guidance": guidance, "measuring": _measuring(features, weights, clip_model, clip_weights),
    }  # fmt: skip
    _run(Distill(), asked, out, report=report, dry_run=dry_run, offline=offline, as_json=as_json, quiet=quiet)


def _run(
    form: Form, asked: dict[str, Any], out: Path, *, report: bool, dry_run: bool, offline: bool, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Makes the table, or with `dry_run` its plan, and prints it."""
    from ..core.files import write_json
    from ..eval.bench.settings import make_settings
    from ..eval.bench.workshop import open_workshop

    shop = open_workshop(make_settings(form, **asked), out, offline=offline, quiet=quiet)
    if dry_run:
        from ..eval.bench.plan import plan_table, show_plan

        plan = plan_table(shop)
        print(json.dumps(plan) if as_json else show_plan(plan))
        return

    from ..eval.bench.collecting import make_table
    from ..eval.bench.show import show

    table = make_table(shop)
    files = [out / f"{form.name}.json"]
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


def _measuring(
    features: str,
    weights: list[str] | None,
    clip_model: str | None = None,
    clip_weights: str | None = None,
    evaluators: list[str] | None = None,
) -> Measuring:
    from ..eval.bench.settings import Measuring

    return Measuring(features, tuple(weights or ()), clip_model, clip_weights, tuple(evaluators or ()))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str | None) -> list[float]:
    from ..core.errors import UsageError

    try:
        return [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"--rates {text}: write numbers with commas, e.g. --rates 3e-4,1e-3.") from error
