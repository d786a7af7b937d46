"""`sctool annotate`: one config in, one call to `annotators.run`, one closing line out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer


def annotate(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Image folder, folder or file of .tar shards, ControlNet prompt.json folder, one image, 'photos', "
            "or '-' for picture paths on stdin.",
        ),
    ],
    cond: Annotated[
        list[str] | None,
        typer.Option(
            help="canny, color, mask, outpaint; by networks hed, sketch, depth, seg, pose (see sctool weights). "
            "Settings as canny:low=50,high=150 or depth:model=dpt-hybrid. \\[default: canny]"
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder to write. \\[default: annotated/NAME]")] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="none, short:N, crop:N or crop:BASE; maps are made on exactly these pixels. \\[default: none]"
        ),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="merged: a complete data set; maps: the maps alone. \\[default: merged]")
    ] = None,
    render: Annotated[bool, typer.Option("--render", help="Store maps as full-size RGB hints.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of masks and random thresholds. \\[default: 0]")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N pictures.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="Processes. \\[default: all cores]")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: its address, auto, or local.")
    ] = None,
    shards: Annotated[
        str | None, typer.Option(metavar="K/N", help="Only the K-th of N parts; array jobs write one set together.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if any picture could not be read.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Make condition maps of photographs. The same command again resumes.

    The result is read as it is by sctool train --data, by datasets and by
    diffusers' scripts. Pictures that cannot be read are listed in errors.jsonl.

    Settings: canny low, high, random (scepter, t2i);
    color ratio, filter (cubic, area);
    mask preset (train, medium, thick, thin), area; outpaint keep (0.2-0.6), centre;
    hed, sketch model, hed also safe, invert; depth, seg, pose model;
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
    from ..core.config import AnnotateConfig, resolve

    flags = {
        "src": src, "cond": cond or None, "out": out, "size": in_pixels(size), "layout": layout,
        "render": render, "seed": seed, "limit": limit, "jobs": jobs, "ray": ray, "shards": shards,
        "strict": strict,
    }  # fmt: skip
    config = resolve(AnnotateConfig, flags=flags)
    with _bar(quiet) as progress:
        summary = run(config, paths=sys.stdin if src == "-" else None, progress=progress)
    if as_json:
        print(json.dumps(summary))
        return
    bad = f", {summary['failed']} unreadable (see {summary['errors']})" if summary["failed"] else ""
    kept = f", {summary['skipped']} of them done before" if summary["skipped"] else ""
    rest = "" if summary["whole"] else "; the part that ends last writes the lists of the whole set"
    print(
        f"{summary['out']}: {summary['images']} pictures with {', '.join(summary['conditions'])}{kept}{bad}, "
        f"{summary['seconds']:.1f} s, {summary['images_per_second']:.0f} images/s{rest}"
    )


def in_pixels(size: str | None) -> str | None:
    """`crop:BASE` as `crop:N`, N the side that the base was trained at; any other size as it is."""
    kind, _, name = (size or "").partition(":")
    if kind != "crop" or not name or name.isdigit():
        return size
    from ..core.backbones.bases import resolution

    return f"crop:{resolution(name)}"


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr with images/s and time left; plain lines now and then where stderr is a file."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, quiet=quiet, highlight=False)
    began, first, last, told = time.monotonic(), -1, time.monotonic(), -1

    def rate(done: int) -> float:
        nonlocal first
        first = done if first < 0 else first
        return (done - first) / max(time.monotonic() - began, 1e-9)

    def plain(done: int, total: int) -> None:
        nonlocal last, told
        speed = rate(done)
        if told != done and (time.monotonic() - last >= 15 or done == total):
            last, told = time.monotonic(), done
            left = f"{(total - done) / speed:.0f} s left" if speed else ""
            console.print(f"annotated {done}/{total}  {speed:.0f} images/s  {left}", style="dim")

    if not console.is_terminal:
        yield plain
        return
    columns = (TextColumn("annotating"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("annotating", total=None, speed="")
        yield lambda done, total: bar.update(task, completed=done, total=total, speed=f"{rate(done):.0f} images/s")
