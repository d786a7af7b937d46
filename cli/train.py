"""`sctool train`: one config in, one call to `core.train`, one line out."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..core.config import TrainConfig


def train(
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Any setting, e.g. lr=5e-5 tuner.ratio=0.1.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="What to train; see `sctool methods`. \\[default: scedit]")] = None,
    cond: Annotated[str | None, typer.Option(help="Conditions to control by, e.g. canny or canny,color.")] = None,
    base: Annotated[str | None, typer.Option(help="'mini', a diffusers folder, or a hub id. \\[default: mini]")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="'photos', image folder, shards, or prompt.json. \\[default: photos]"),
    ] = None,
    maps: Annotated[str | None, typer.Option(help="Folder of condition maps, when not in the data set.")] = None,
    val_data: Annotated[str | None, typer.Option(help="Held-out set; else rows marked so, else a tenth.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. \\[default: 1000]")] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures a step, over all processes. \\[default: 8]")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. \\[default: 1e-4]")] = None,
    size: Annotated[int | None, typer.Option(help="Training size in pixels. \\[default: the base's own]")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16. \\[default: auto]")] = None,
    init: Annotated[str | None, typer.Option(help="Tuner file or run to start from.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random. \\[default: 0]")] = None,
    preset: Annotated[str | None, typer.Option(help="A named recipe shipped with sctool.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; flags win over it.")] = None,
    name: Annotated[str | None, typer.Option(help="Run name. \\[default: from the settings]")] = None,
    out: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and train nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on any fault in the data set.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the network, not even for hub ids.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Train a tuner on a frozen base. The same command again resumes; other settings make another run.

    Examples:

      sctool train --method scedit                              SC-Tuner, built-in data and base

      sctool train --method scedit --cond canny --data photos   CSC-Tuner, controlled by edges

      sctool train --cond canny --base ./sd15 --data laion-canny batch=16 precision=bf16

      sctool train --preset scedit-fewshot --data ./my-style --trigger "<sce>"

      accelerate launch --num_processes 4 -m sctool train --cond canny batch=64
    """
    from ..core.config import TrainConfig, resolve

    flags: dict[str, Any] = {
        "method": method, "base": base, "data": data, "maps": maps, "val_data": val_data, "steps": steps,
        "batch": batch, "lr": lr, "size": size, "precision": precision, "init": init, "seed": seed,
        "cond": cond,
    }  # fmt: skip
    settings = resolve(TrainConfig, preset_name=preset, file=config, flags=flags, pairs=pairs or ())
    check_names(settings)

    from ..annotators.training_sets import open_training_sets
    from ..core.backbones.bases import resolution
    from ..core.runs import open_run
    from ..eval.heldout import adherence

    trained_size = settings.size or resolution(settings.base, offline)
    source, held_out, made = open_training_sets(settings, trained_size, strict=strict, quiet=quiet)
    if dry_run:
        from ..core.training.plan import plan_run, show_plan

        plan = plan_run(settings, source, held_out, offline=offline)
        print(json.dumps(plan) if as_json else show_plan(plan))
        return

    from ..core.training.train import train as run_training

    run = open_run(out, name, settings)
    first = os.environ.get("RANK", "0") == "0"  # of several processes, one holds the run and speaks
    with run.locked() if first else nullcontext():
        summary = run_training(
            settings, run, source, held_out=held_out, map_meta=made,
            measures=adherence(settings.conditions, made, quiet=quiet or not first),
            offline=offline, quiet=quiet,
        )  # fmt: skip
    if not first:
        return
    if as_json:
        print(json.dumps({"run": str(run.path), "tuner": str(run.tuner), **summary.to_json()}))
    else:
        loss = f", loss {summary.last.loss:.4f}" if summary.last else ""
        print(f"{run.tuner}  ({summary.steps} steps{loss})")


def check_names(settings: TrainConfig) -> None:
    """Raises `UsageError` for a method, method setting or condition that does not exist, naming the nearest."""
    from ..annotators import ANNOTATORS
    from ..core.errors import unknown
    from ..core.tuners import method_config

    method_config(settings.method, settings.tuner)
    for name in settings.conditions:
        if name not in ANNOTATORS and not settings.maps and settings.data == "photos":
            raise unknown("condition", name, ANNOTATORS)
