"""`sctool train`: one config in, one call to `core.training.train`, one line out."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import help_of

if TYPE_CHECKING:
    from ..core.config import TrainConfig


def train(
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Any setting, e.g. lr=5e-5 tuner.ratio=0.1.")
    ] = None,
    method: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "method"))] = None,
    cond: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "cond"))] = None,
    base: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "base"))] = None,
    data: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "data"))] = None,
    maps: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "maps"))] = None,
    val_data: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "val_data"))] = None,
    steps: Annotated[int | None, typer.Option(help=help_of("TrainConfig", "steps"))] = None,
    batch: Annotated[int | None, typer.Option(help=help_of("TrainConfig", "batch"))] = None,
    lr: Annotated[float | None, typer.Option(help=help_of("TrainConfig", "lr"))] = None,
    size: Annotated[int | None, typer.Option(help=help_of("TrainConfig", "size"))] = None,
    precision: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "precision"))] = None,
    init: Annotated[str | None, typer.Option(help=help_of("TrainConfig", "init"))] = None,
    seed: Annotated[int | None, typer.Option(help=help_of("TrainConfig", "seed"))] = None,
    preset: Annotated[str | None, typer.Option(help="A named recipe shipped with sctool.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; flags override it.")] = None,
    name: Annotated[str | None, typer.Option(help="Run name. \\[default: made from the settings]")] = None,
    out: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and train nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on any fault in the data set.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network, not even for hub ids.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Train a tuner on a frozen base. The same command again resumes; other settings make another run.

    Examples:

      sctool train --method scedit                              SC-Tuner, built-in data and base

      sctool train --method scedit --cond canny --data photos   CSC-Tuner, controlled by edges

      sctool train --cond canny --base ./sd15 --data laion-canny batch=16 precision=bf16

      sctool train --preset scedit-fewshot --data ./my-style trigger="<sce>"

      accelerate launch --num_processes 4 -m sctool train --cond canny batch=64
    """
    from ..core.config import TrainConfig, resolve_config

    flags: dict[str, Any] = {
        "method": method, "base": base, "data": data, "maps": maps, "val_data": val_data, "steps": steps,
        "batch": batch, "lr": lr, "size": size, "precision": precision, "init": init, "seed": seed,
        "cond": cond,
    }  # fmt: skip
    from ..core.errors import SctoolError, UsageError
    from ..core.tuners import with_learning_rate

    if cond is not None and not cond.strip(" ,"):
        raise UsageError("--cond names no condition; leave it out to train without control.")
    settings = resolve_config(TrainConfig, preset_name=preset, file=config, flags=flags, pairs=pairs or ())
    check_names(settings)
    settings = with_learning_rate(settings)

    from ..annotators.training_sets import open_training_sets
    from ..core.backbones.bases import family_of, resolution
    from ..core.runs import open_run
    from ..eval.heldout import adherence

    trained_size = settings.size or resolution(settings.base, offline)
    prompt = family_of(settings.base, offline).prompt_rule(settings.trigger, settings.caption)
    source, held_out, map_meta = open_training_sets(settings, trained_size, prompt=prompt, strict=strict, quiet=quiet)
    if dry_run:
        from ..core.training.plan import plan_run, show_plan

        plan = plan_run(settings, source, held_out, offline=offline)
        print(json.dumps(plan) if as_json else show_plan(plan))
        return

    from ..core.training.train import train as run_training

    run = open_run(out, name, settings)
    main = os.environ.get("RANK", "0") == "0"  # of several processes, one locks the run and prints
    with run.locked() if main else nullcontext():
        try:
            summary = run_training(
                settings, run, source, held_out=held_out, map_meta=map_meta,
                measures=adherence(settings.conditions, map_meta, quiet=quiet or not main),
                offline=offline, quiet=quiet,
            )  # fmt: skip
        except SctoolError:
            if main:
                run.discard_if_untrained()
            raise
    if not main:
        return
    if as_json:
        print(json.dumps({"run": str(run.path), "tuner": str(run.tuner), **summary.to_json()}))
    else:
        loss = f", loss {summary.last.loss:.4f}" if summary.last else ""
        print(f"{run.tuner}  ({summary.steps} steps{loss})")


def check_names(settings: TrainConfig) -> None:
    """Raises `UsageError` for a method, method setting or condition that does not exist, naming the nearest."""
    from ..annotators import ANNOTATORS
    from ..core.errors import UsageError, unknown
    from ..core.tuners import TUNERS, method_config

    method_config(settings.method, settings.tuner)
    if settings.conditions and not TUNERS[settings.method].takes_conditions:
        able = " or ".join(name for name, method in TUNERS.items() if method.takes_conditions)
        raise UsageError(f"--method {settings.method} takes no condition maps. Drop --cond, or use --method {able}.")
    for name in settings.conditions:
        if name not in ANNOTATORS and not settings.maps and settings.data == "photos":
            raise unknown("condition", name, ANNOTATORS)
