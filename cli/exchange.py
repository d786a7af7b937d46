"""`sctool import` and `sctool export`: tuners from other tools' files, and ours as theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..core.exchange.importing import Imported


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File or folder of another tool.")],
    base: Annotated[str, typer.Option(help="Base that it is for: 'mini', a diffusers-format folder, or a hub id.")],
    cond: Annotated[
        str | None, typer.Option(help="What its maps are, e.g. canny, where the file does not say.")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Keys to leave out on purpose, e.g. ^lora_te; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. \\[default: the file's name]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what becomes of every key; write nothing.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Read a tuner from another tool's file: LoRA of kohya, peft or diffusers, SCEdit of scepter or swift, adapters.

    The format is told by its keys. A key that would be dropped is an error. Pickled files are read as tensors only.

    Examples:

      sctool import add_detail.safetensors --base ./sd15 --dry-run

      sctool import add_detail.safetensors --base ./sd15 --ignore ^lora_te

      sctool import ldm_step-10000/pytorch_model.bin --base ./sd21 --cond canny --out edges
    """
    from ..core.backbones.loading import load_backbone
    from ..core.data.conditions import parse_conditions
    from ..core.errors import UsageError
    from ..core.exchange.importing import read_tuner, write_tuner

    if cond is not None and [spec.name for spec in parse_conditions(cond)] != [cond]:
        raise UsageError(f"--cond {cond}: name one condition without settings, e.g. canny.")
    out = out or Path(file.resolve().stem)
    if not dry_run and out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UsageError(f"--out {out} exists already; choose another folder, or remove it.")
    backbone = load_backbone(base, offline=offline)
    found = read_tuner(file, backbone, cond, ignore or ())
    written = None if dry_run else write_tuner(out, found, backbone)
    print(json.dumps(described(found, written)) if as_json else "\n".join(lines(found, written, dry_run)))


def described(found: Imported, written: Path | None) -> dict[str, object]:
    """What was read as one JSON value."""
    return {
        "tuner": str(written) if written else None, "method": found.tuner.method, "format": found.what,
        "conditions": list(found.tuner.conditions), "used": dict(found.used), "unused": list(found.unused),
    }  # fmt: skip


def lines(found: Imported, written: Path | None, every: bool) -> list[str]:
    """What was read for a person; `every` key with it."""
    keys = [f"  {theirs} -> {ours}" for theirs, ours in found.used.items()] if every else []
    left = [f"  {key} left out" for key in found.unused] if every else []
    count = f"{len(found.used)} keys used, {len(found.unused)} left out"
    return [
        *keys,
        *left,
        f"{found.file}: {found.what}, read as {found.tuner.method}, {count}",
        *([str(written)] if written else []),
    ]


def export(
    tuner: Annotated[str, typer.Argument(metavar="TUNER", help="Run or tuner file.")],
    to: Annotated[str, typer.Option(help="peft, diffusers, kohya, scepter or comfyui.")],
    task: Annotated[str | None, typer.Option(help="Task of a run that has several.")] = None,
    base: Annotated[str | None, typer.Option(help="Base that it is for. \\[default: the tuner's]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. \\[default: TUNER-FORMAT]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Load a tuner made for another base.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Write a tuner in another tool's format, where that can hold the method.

    Examples:

      sctool export runs/style --to kohya

      sctool export runs/edges --to diffusers --out controlnet-edges

      sctool export runs/canny --to scepter --out for-scepter
    """
    from ..core.backbones.loading import load_backbone
    from ..core.chosen import base_of, choose
    from ..core.exchange.exporting import export as write
    from ..core.exchange.table import format_for

    [chosen] = choose([(tuner, 1.0)], [task] if task else [])
    format_for(to, chosen.meta["method"])  # before the base is loaded
    name = Path(tuner).resolve().stem if chosen.file.name != "tuner.safetensors" else Path(tuner).name
    folder = out or Path(f"{name}-{to}")
    backbone = load_backbone(base or base_of([chosen]), offline=offline)
    files = write(chosen.file, backbone, to, folder, force=force)
    print(json.dumps({"format": to, "files": list(map(str, files))}) if as_json else "\n".join(map(str, files)))
