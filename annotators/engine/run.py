"""`annotate`: every picture of a set to its condition maps, in processes, resumable at any moment."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ...core.config import AnnotateConfig
from ...core.data.sources import open_shards
from ...core.errors import SctoolError, UsageError
from .. import make_annotators
from ..base import Annotator
from .jobs import Job, annotate_unit, finished
from .listing import folder_jobs, open_input, shard_jobs
from .maps import Size
from .output import alone, claim, drop_stale, output_folder, read_marker, refuse_to_shrink, write_lists
from .pool import gpus, run_jobs

WORKERS_A_GPU = 2
"""Each loads the networks; while one decodes and writes, the other computes."""
IN_PROCESS = 128
"""Below this many pictures starting processes takes longer than the work."""

Progress = Callable[[int, int], None]
"""progress(done, total) in pictures, called some times a second."""


def annotate(
    config: AnnotateConfig, *, paths: Iterable[str] | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Annotates a set and gives a summary: counts, seconds, where it lies.

    paths: picture files, for `src = "-"`. The same call again continues where a killed one ended and gives the same
    bytes as an undisturbed one. Raises `UsageError` (wrong names, an output made with other settings), `Interrupted`
    (signals, after which the same call resumes), `SctoolError` (nothing could be written or read; faults with
    `strict`).
    """
    begun = time.monotonic()
    annotators = make_annotators(config.cond, config.seed)
    for annotator in annotators:
        annotator.ready()
    size = Size.parse(config.size)
    part = Part.parse(config.shards)
    source, shards = open_shards(config.src) or (open_input(config.src, paths), [])
    out = output_folder(config, source)
    if not shards and not source.records and not source.faults:
        raise UsageError(f"'{config.src}' holds no picture.")

    with alone(out, shared=part is not None):
        settings = claim(out, config, annotators, source)
        base = Job("", out, config.layout == "merged", annotators, size, config.render, settings)
        units = shard_jobs(base, shards, config.limit) if shards else folder_jobs(base, source, config.limit)
        jobs = units[part.number - 1 :: part.of] if part else units
        if config.limit is not None:
            refuse_to_shrink(out, units)
        skipped, counts, before = _run(jobs, config, annotators, progress)
        whole = part is None or all(finished(job) for job in units)
        if whole:
            drop_stale(out, units, before)
        listed = write_lists(out, units if whole else jobs, source.faults, part.errors if part and not whole else None)

    seconds = time.monotonic() - begun
    images = sum(count["images"] for count in counts)
    failed = sum(count["failed"] for count in counts) + len(source.faults)
    fresh = images - skipped
    summary = {
        "out": str(out),
        "conditions": [annotator.name for annotator in annotators],
        "images": images,
        "failed": failed,
        "skipped": skipped,
        "seconds": round(seconds, 3),
        "images_per_second": round(fresh / seconds, 1) if fresh else 0.0,
        "errors": str(listed) if listed else None,
        "whole": whole,
    }
    if not images and listed:
        with open(listed, encoding="utf-8") as lines:
            first = json.loads(next(lines))
        raise SctoolError(f"no picture could be annotated; first: {first['where']}: {first['reason']} (see {listed}).")
    if not images and jobs:
        raise UsageError(f"'{config.src}' holds no picture among the members of its shards.")
    if failed and config.strict:
        raise SctoolError(
            f"{failed} of {failed + images} pictures could not be read (--strict); they are listed in "
            f"{listed}. The others are annotated in {out}."
        )
    return summary


@dataclass(frozen=True)
class Part:
    """`--shards 3/16`: every 16th unit from the third on, for one of 16 array jobs that write one set."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str | None) -> Part | None:
        """Reads the flag; None for none. Raises `UsageError`."""
        if text is None:
            return None
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(
                f"--shards '{text}' is no part. Write K/N with K from 1 to N, e.g. 3/16 for the third of 16."
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def errors(self) -> str:
        """The name of the part's own list of errors."""
        return f"errors-{self.number}-of-{self.of}.jsonl"


def _run(
    jobs: list[Job], config: AnnotateConfig, annotators: tuple[Annotator, ...], progress: Progress | None
) -> tuple[int, list[dict[str, int]], set[str]]:
    """Does the units that are not finished.

    Gives the number of pictures found finished, all units' counts, and the files that units done again had before.
    """
    counts = [_counts(finished(job)) for job in jobs]
    todo = [i for i, count in enumerate(counts) if count is None]
    skipped = sum(count["images"] + count["failed"] for count in counts if count)
    kept = sum(count["images"] for count in counts if count)
    before = {name for i in todo for name in read_marker(jobs[i]).get("files", ())}
    fresh = _expected([jobs[i] for i in todo])

    def tell(done: int) -> None:
        if progress:
            progress(skipped + done, max(skipped + fresh, skipped + done))

    resume = "Run the same command again to continue."
    chosen = [jobs[i] for i in todo]
    if config.ray is not None:
        from .cluster import run_ray

        heavy = any(annotator.needs_weights for annotator in annotators)
        made = run_ray(annotate_unit, chosen, config.ray, config.jobs, tell, resume, lambda job: job.unit, gpu=heavy)
    else:
        workers = _workers(config.jobs, fresh, annotators)
        made = run_jobs(annotate_unit, chosen, workers, tell, resume, lambda job: job.unit)
    for i, count in zip(todo, made, strict=True):
        counts[i] = count
    tell(sum(count["images"] + count["failed"] for count in made))  # a unit done twice was counted twice
    return kept, [count for count in counts if count is not None], before


def _counts(marker: dict[str, Any] | None) -> dict[str, int] | None:
    return marker and {"images": marker["images"], "failed": marker["failed"]}


def _expected(jobs: list[Job]) -> int:
    """How many pictures the units hold; for shards estimated from the first one's pictures and all files' sizes."""
    if not jobs or not jobs[0].shard:
        return sum(len(job.records) for job in jobs)
    first = len(jobs[0].listed()[0])
    if any(job.limit is not None for job in jobs):
        return sum(job.limit if job.limit is not None else first for job in jobs)
    sizes = [os.path.getsize(job.tar) for job in jobs if os.path.exists(job.tar)]
    return round(first * sum(sizes) / sizes[0]) if sizes and sizes[0] else first


def _workers(wanted: int | None, pictures: int, annotators: tuple[Annotator, ...]) -> int:
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0))
    if any(annotator.needs_weights for annotator in annotators):
        return min(cores, WORKERS_A_GPU * len(gpus())) or cores
    return cores if pictures > IN_PROCESS else 1
