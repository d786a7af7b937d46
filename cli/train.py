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
    tasks: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON file of tasks to train together, a tuner each: rows of name, data, cond, ..."),
    ] = None,
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

      sctool train --tasks tasks.yaml                           rows as {name: edges, data: photos, cond: canny}

      accelerate launch --num_processes 4 -m sctool train --cond canny batch=64
    """
    from ..core.config import TrainConfig
    from ..core.resolving import resolve_config
    from ..core.tasks import read_tasks, task_configs

    flags: dict[str, Any] = {
        "method": method, "base": base, "data": data, "maps": maps, "val_data": val_data, "steps": steps,
        "batch": batch, "lr": lr, "size": size, "precision": precision, "init": init, "seed": seed,
        "cond": cond, "tasks": read_tasks(tasks) if tasks else None,
    }  # fmt: skip
    from ..core.errors import SctoolError, UsageError
    from ..core.tuners import check_routing, with_learning_rate

    if cond is not None and not cond.strip(" ,"):
        raise UsageError("--cond names no condition; leave it out to train without control.")
    settings = resolve_config(TrainConfig, preset_name=preset, file=config, flags=flags, pairs=pairs or ())
    settings = with_learning_rate(settings)
    configs = task_configs(settings)
    for own in configs.values():
        check_names(own)
    check_routing(settings)

    from ..core.runs import open_run
    from ..core.training.lanes import TaskSet
    from ..eval.heldout import adherence

    main = os.environ.get("RANK", "0") == "0"  # of several processes, one locks the run and prints
    sets = {}
    for task, own in configs.items():
        source, held_out, made = open_sets(own, strict=strict, offline=offline, quiet=quiet)
        measures = adherence(own.conditions, made, quiet=quiet or not main)
        sets[task] = TaskSet(source, held_out, made, measures)
    if dry_run:
        from ..core.training.plan import plan_tasks, show_plan

        plan = plan_tasks(settings, sets, offline=offline)
        print(json.dumps(plan) if as_json else show_plan(plan))
        return

    from ..core.training.train import train_tasks

    run = open_run(out, name, settings)
    with run.locked() if main else nullcontext():
        try:
            summary = train_tasks(settings, run, sets, offline=offline, quiet=quiet)
        except SctoolError:
            if main:
                run.discard_if_untrained()
            raise
    if not main:
        return
    files = {part.task: str(part.tuner) for part in run.parts()}
    if as_json:
        tuners = {"tuners": files} if settings.tasks else {"tuner": files[None]}
        print(json.dumps({"run": str(run.path), **tuners, **summary.to_json()}))
    else:
        loss = f", loss {summary.last.loss:.4f}" if summary.last else ""
        print("\n".join(files.values()) + f"  ({summary.steps} steps{loss})")


def open_sets(config: TrainConfig, *, strict: bool, offline: bool, quiet: bool) -> tuple[Any, Any, dict[str, Any]]:
    """`open_training_sets` at the size and with the prompts of the config's base."""
    from ..annotators.training_sets import open_training_sets
    from ..core.backbones.bases import family_of, resolution

    size = config.size or resolution(config.base, offline)
    prompt = family_of(config.base, offline).prompt_rule(config.trigger, config.caption)
    return open_training_sets(config, size, prompt=prompt, strict=strict, quiet=quiet)


def check_names(settings: TrainConfig) -> None:
    """Raises `UsageError` for a method, method setting or condition that does not exist, naming the nearest."""
    from ..annotators import ANNOTATORS
    from ..core.errors import UsageError, unknown
    from ..core.tasks import task_configs
    from ..core.tuners import TUNERS, method_config

    method_config(settings.method, settings.tuner)
    control = TUNERS[settings.method].control
    if settings.conditions and control == "none":
        able = ", ".join(name for name, method in TUNERS.items() if method.control != "none")
        raise UsageError(f"--method {settings.method} takes no condition maps. Drop --cond, or use one of {able}.")
    if control == "required" and not all(one.conditions for one in task_configs(settings).values()):
        raise UsageError(f"--method {settings.method} needs condition maps. Add --cond, e.g. --cond canny.")
    for name in settings.conditions:
        if name not in ANNOTATORS and not settings.maps and settings.data == "photos":
            raise unknown("condition", name, ANNOTATORS)
