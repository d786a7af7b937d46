"""`sctool prepare`: one config in, one call to `annotators.preparing.run`, one closing line out."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from .bars import images_bar
from .options import help_of


def prepare(
    src: Annotated[str, typer.Argument(metavar="SRC", help=help_of("PrepareConfig", "src"))],
    base: Annotated[str | None, typer.Option(help=help_of("PrepareConfig", "base"))] = None,
    cond: Annotated[list[str] | None, typer.Option(help=help_of("PrepareConfig", "cond"))] = None,
    out: Annotated[str | None, typer.Option(help=help_of("PrepareConfig", "out"))] = None,
    maps: Annotated[str | None, typer.Option(help=help_of("PrepareConfig", "maps"))] = None,
    size: Annotated[int | None, typer.Option(help=help_of("PrepareConfig", "size"))] = None,
    dtype: Annotated[str | None, typer.Option(help=help_of("PrepareConfig", "dtype"))] = None,
    flip: Annotated[bool, typer.Option("--flip", help=help_of("PrepareConfig", "flip"))] = False,
    trigger: Annotated[str | None, typer.Option(help=help_of("PrepareConfig", "trigger"))] = None,
    caption: Annotated[str | None, typer.Option(help=help_of("PrepareConfig", "caption"))] = None,
    seed: Annotated[int | None, typer.Option(help=help_of("PrepareConfig", "seed"))] = None,
    batch: Annotated[int | None, typer.Option(help=help_of("PrepareConfig", "batch"))] = None,
    limit: Annotated[int | None, typer.Option(help=help_of("PrepareConfig", "limit"))] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help=help_of("PrepareConfig", "jobs"))] = None,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help=help_of("PrepareConfig", "ray"))] = None,
    shards: Annotated[str | None, typer.Option(metavar="K/N", help=help_of("PrepareConfig", "shards"))] = None,
    strict: Annotated[bool, typer.Option("--strict", help=help_of("PrepareConfig", "strict"))] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how much disk it would take, and stop.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network, not even for hub ids.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Encode a set once, for trainings of any length. Run the same command again to resume.

    Latents, text rows and condition maps in shards, which sctool train --data
    reads in memory that does not grow with the set. Worth it from about a
    hundred thousand images, or for a set that several machines train on.

    Examples:

      sctool prepare photos --cond canny --dtype bf16

      sctool prepare laion/ --base ./stable-diffusion-v1-5 --cond canny --dtype bf16 --dry-run

      sctool prepare laion/ --base ./stable-diffusion-v1-5 --cond canny --shards 3/16   the third of 16 array jobs

      sctool train --cond canny --base ./stable-diffusion-v1-5 --data prepared/laion
    """
    from ..annotators.preparing.run import prepare_set
    from ..core.config import PrepareConfig
    from ..core.resolving import resolve_config

    flags = {
        "src": src, "base": base, "cond": cond or None, "out": out, "maps": maps, "size": size, "dtype": dtype,
        "flip": flip, "trigger": trigger, "caption": caption, "seed": seed, "batch": batch, "limit": limit,
        "jobs": jobs, "ray": ray, "shards": shards, "strict": strict,
    }  # fmt: skip
    config = resolve_config(PrepareConfig, flags=flags)

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    if dry_run:
        plan = prepare_set(config, offline=offline, dry_run=True)
        print(json.dumps(plan) if as_json else show_plan(plan))
        return
    with images_bar(quiet, "prepar") as progress:
        summary = prepare_set(config, offline=offline, progress=progress, say=say)
    print(json.dumps(summary) if as_json else show_summary(summary))


def show_plan(plan: dict[str, Any]) -> str:
    """The plan as one line."""
    from ..core.files import human

    return (
        f"{plan['out']}: about {plan['images']} images still to prepare in {plan['shards']} shards, "
        f"{human(plan['bytes'])}: {plan['per_image'] / 1e3:.1f} kB an image and {plan['per_caption'] / 1e3:.1f} kB for "
        f"each of about {plan['captions']} captions"
    )


def show_summary(summary: dict[str, Any]) -> str:
    """What was done, in one or two lines."""
    from ..core.files import human

    earlier = f", {summary['skipped']} of them before" if summary["skipped"] else ""
    failed = f", {summary['failed']} left out (see {summary['errors']})" if summary["failed"] else ""
    speed = f", {summary['seconds']:.1f} s, {summary['images_per_second']:.0f} images/s"
    first = f"{summary['out']}: {summary['images']} images prepared{earlier}{failed}{speed}"
    if not summary["whole"]:
        return f"{first}; the part that finishes last completes the set"
    notes = [
        f"{summary['train']} to train on, {summary['held_out']} marked as held out",
        f"{human(summary['bytes'])} in {summary['shards']} shards, {summary['dtype']}",
        *(f"error of stored {what} {error} dB below the signal" for what, error in summary["error_db"].items()),
        *([f"{summary['captions_too_long']} captions longer than is read"] if summary["captions_too_long"] else []),
        *([f"{summary['without_prompt']} images without caption or label"] if summary["without_prompt"] else []),
    ]
    return f"{first}\n{'; '.join(notes)}"
