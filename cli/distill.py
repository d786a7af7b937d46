"""`sctool distill`: a smaller base out of a base, trained against it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import help_of

if TYPE_CHECKING:
    from ..core.config import TrainConfig
    from ..core.runs import Run


def distill(
    pairs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Any setting, e.g. ema=0.999 feature=0 task=1."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The teacher: 'mini', a diffusers-format folder, or a hub id.")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help=help_of("StudentConfig", "ratio"))] = None,
    budget: Annotated[float | None, typer.Option(help=help_of("StudentConfig", "budget"))] = None,
    ranks: Annotated[
        Path | None, typer.Option(help="YAML or JSON file of ranks by layer name or regular expression.")
    ] = None,
    prune: Annotated[str | None, typer.Option(help=help_of("StudentConfig", "prune"))] = None,
    form: Annotated[str | None, typer.Option(help=help_of("StudentConfig", "form"))] = None,
    start: Annotated[str | None, typer.Option(help=help_of("StudentConfig", "start"))] = None,
    data: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "data"))] = None,
    val_data: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "val_data"))] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Optimizer steps; 0 only makes the student.")] = None,
    batch: Annotated[int | None, typer.Option(help=help_of("TrainConfig", "batch"))] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. \\[default: 5e-5, BK-SDM's]")] = None,
    precision: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "precision"))] = None,
    seed: Annotated[int | None, typer.Option(help=help_of("TrainConfig", "seed"))] = None,
    densify: Annotated[
        bool, typer.Option("--densify", help="Also write the student as an ordinary diffusers folder, multiplied out.")
    ] = False,
    fastest: Annotated[
        bool,
        typer.Option(
            "--fastest", help="Also write it with each layer in the form that is faster on this machine, thin or not."
        ),
    ] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; flags override it.")] = None,
    name: Annotated[str | None, typer.Option(help="Run name. \\[default: made from the settings]")] = None,
    out: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and make nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on any fault in the data set.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Make a smaller student of a base and train it against its teacher. The same command again resumes.

    The student, RUN/student, is a base for every command, and its teacher's tuners fit it.

    Examples:

      sctool distill                                            built-in base and data

      sctool distill --base ./sd21 --budget 0.5 --data laion batch=64 precision=bf16 memory=minimum

      sctool distill --base ./sd15 --prune small --dry-run

      sctool distill --base ./sd15 --ratio 0.4225 --start balanced --steps 0 --densify    the paper's, untrained
    """
    from ..core.errors import UsageError
    from ..core.resolving import read_yaml

    sizes = {"ratio": ratio, "budget": budget, "ranks": read_yaml(ranks) if ranks else None, "prune": prune}
    if len(named := [key for key, value in sizes.items() if value is not None]) > 1:
        raise UsageError(f"--{' and --'.join(named)} each decide the student's size; give one of them.")
    flags: dict[str, Any] = {
        "base": base, "data": data, "val_data": val_data, "steps": steps or None, "batch": batch, "lr": lr,
        "precision": precision, "seed": seed, "form": form, "start": start, **sizes,
    }  # fmt: skip

    from ..core.distilling.distill import RESULT, check_run, distill_config
    from ..core.distilling.distill import distill as distill_into
    from ..core.runs import named_run, open_run

    settings = distill_config(flags, pairs or (), config)
    also = tuple(form for form, wanted in (("dense", densify), ("fast", fastest)) if wanted)
    if also and settings.distill and settings.distill.prune:
        flag = "--densify" if densify else "--fastest"
        raise UsageError(f"a pruned student is an ordinary folder already; leave {flag} out.")
    main = os.environ.get("RANK", "0") == "0"
    run = named_run(out, name, settings)
    new = not run.path.exists()  # an older run may have a finished student, made with --steps 0
    if steps == 0 and not dry_run:
        with run.locked(), discarding(run, new):
            print(only_made(run, settings, also=also, offline=offline, as_json=as_json, quiet=quiet))
        return
    part = training_set(settings, strict=strict, offline=offline, quiet=quiet)
    if dry_run:
        from ..core.distilling.plan import plan_distillation, show_plan

        plan = plan_distillation(settings, part.source, part.held_out, offline=offline)
        print(json.dumps(plan) if as_json else show_plan(plan))
        return

    check_run(run, settings, offline=offline)  # not after: opening the run saves its new settings
    open_run(out, name, settings)
    with run.locked() if main else nullcontext(), discarding(run, main and new):
        summary = distill_into(
            settings, run, part.source, held_out=part.held_out, distance=part.distance, also=also,
            offline=offline, quiet=quiet,
        )  # fmt: skip
    if main:
        student = str(run.path / RESULT)
        loss = f", loss {summary.last.loss:.4f}" if summary.last else ""
        figures = {"run": str(run.path), "student": student, **summary.to_json()}
        print(json.dumps(figures) if as_json else f"{student}  ({summary.steps} steps{loss})")


@contextmanager
def discarding(run: Run, wanted: bool) -> Iterator[None]:
    """Removes, where it is wanted, the folder of a run that fails before it has trained."""
    from ..core.errors import SctoolError

    try:
        yield
    except SctoolError:
        if wanted:
            run.discard_if_untrained()
        raise


def training_set(config: TrainConfig, *, strict: bool, offline: bool, quiet: bool) -> Any:
    """The images, those held out, and what measures the student's samples against the teacher's."""
    from ..core.training.lanes import TaskSet
    from ..eval.heldout import sample_distance
    from .train import open_sets

    source, held_out, _ = open_sets(config, strict=strict, offline=offline, quiet=quiet)
    return TaskSet(source, held_out, distance=sample_distance(config.base, offline=offline))


def only_made(run: Any, config: TrainConfig, *, also: Any, offline: bool, as_json: bool, quiet: bool) -> str:
    """Writes the untrained student as the run's result; returns what is printed."""
    from ..core.distilling.distill import make_only

    made = make_only(run, config, also=also, offline=offline, quiet=quiet)
    if as_json:
        return json.dumps(made)
    figures = f"{made['parameters']:,} parameters, not trained, relative output error {made['start_error']:.4f}"
    return f"{made['student']}  ({figures})"
