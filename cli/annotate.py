"""`sctool annotate`: one config in, one call to `annotators.engine.run`, one closing line out."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from ..core.data.conditions import condition_names
from .bars import images_bar
from .options import help_of

CONDITIONS = (
    f"{condition_names(network=False)}; with networks: {condition_names(network=True)} (see sctool weights). "
    "Settings follow a colon: canny:low=50,high=150 or depth:model=dpt-hybrid."
)


def annotate(
    src: Annotated[str, typer.Argument(metavar="SRC", help=help_of("AnnotateConfig", "src"))],
    cond: Annotated[list[str] | None, typer.Option(help=help_of("AnnotateConfig", "cond", CONDITIONS))] = None,
    out: Annotated[str | None, typer.Option(help=help_of("AnnotateConfig", "out"))] = None,
    size: Annotated[str | None, typer.Option(help=help_of("AnnotateConfig", "size"))] = None,
    layout: Annotated[str | None, typer.Option(help=help_of("AnnotateConfig", "layout"))] = None,
    render: Annotated[bool, typer.Option("--render", help=help_of("AnnotateConfig", "render"))] = False,
    seed: Annotated[int | None, typer.Option(help=help_of("AnnotateConfig", "seed"))] = None,
    limit: Annotated[int | None, typer.Option(help=help_of("AnnotateConfig", "limit"))] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help=help_of("AnnotateConfig", "jobs"))] = None,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help=help_of("AnnotateConfig", "ray"))] = None,
    shards: Annotated[str | None, typer.Option(metavar="K/N", help=help_of("AnnotateConfig", "shards"))] = None,
    strict: Annotated[bool, typer.Option("--strict", help=help_of("AnnotateConfig", "strict"))] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Make condition maps of images. Run the same command again to resume.

    The result can be read by sctool train --data, by datasets and by
    diffusers' training scripts. Unreadable images are listed in errors.jsonl.

    Settings: canny low, high, random (scepter, t2i);
    color ratio, filter (cubic, area);
    mask preset (train, medium, thick, thin), area; outpaint keep (0.2-0.6), centre;
    hed, sketch, depth, seg and pose model; hed also safe, invert;
    pose also detector, threshold, keypoint_threshold;
    all networks dtype (auto, fp32, bf16, fp16) and batch.

    Examples:

      sctool annotate photos --cond canny,color,mask --size crop:mini

      sctool annotate laion/ --cond canny:random=scepter --size crop:512

      sctool annotate shards/ --cond canny --layout maps

      sctool annotate laion/ --shards 3/16                  the third of 16 array jobs

      find . -name '*.jpg' | sctool annotate - --cond mask:preset=thick --json
    """
    from ..annotators.engine.run import annotate as run
    from ..core.config import AnnotateConfig
    from ..core.resolving import resolve_config

    flags = {
        "src": src, "cond": cond or None, "out": out, "size": in_pixels(size), "layout": layout,
        "render": render, "seed": seed, "limit": limit, "jobs": jobs, "ray": ray, "shards": shards,
        "strict": strict,
    }  # fmt: skip
    config = resolve_config(AnnotateConfig, flags=flags)
    with images_bar(quiet, "annotat") as progress:
        summary = run(config, paths=sys.stdin if src == "-" else None, progress=progress)
    if as_json:
        print(json.dumps(summary))
        return
    unreadable = f", {summary['failed']} unreadable (see {summary['errors']})" if summary["failed"] else ""
    earlier = f", {summary['skipped']} already done" if summary["skipped"] else ""
    pending = "" if summary["whole"] else "; the part that finishes last writes the lists of the whole set"
    print(
        f"{summary['out']}: {summary['images']} images with {', '.join(summary['conditions'])}{earlier}{unreadable}, "
        f"{summary['seconds']:.1f} s, {summary['images_per_second']:.0f} images/s{pending}"
    )


def in_pixels(size: str | None) -> str | None:
    """`crop:BASE` as `crop:N`, where N is the training size of the base; any other size unchanged."""
    kind, _, name = (size or "").partition(":")
    if kind != "crop" or not name or name.isdigit():
        return size
    from ..core.backbones.bases import resolution

    return f"crop:{resolution(name)}"
