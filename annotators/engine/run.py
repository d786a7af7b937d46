"""`annotate`: condition maps of every image of a set, in processes, resumable at any moment."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.config import AnnotateConfig
from ...core.data.records import Fault
from ...core.data.sources import open_shards
from ...core.errors import SctoolError, UsageError
from .. import make_annotators
from ..base import Annotator
from .job import Job
from .listing import folder_jobs, open_input, shard_jobs
from .maps import Size
from .output import (
    locked_output,
    output_folder,
    record_settings,
    refuse_to_shrink,
    remove_obsolete_files,
    write_lists,
)
from .pool import JobFunction, gpus, run_jobs
from .worker import run_job

WORKERS_PER_GPU = 2
"""Each loads the networks; while one decodes and writes, the other computes."""
IN_PROCESS = 128
"""With fewer images than this, starting processes takes longer than the work."""

Progress = Callable[[int, int], None]
"""progress(done, total) in images, called a few times per second."""


def annotate(
    config: AnnotateConfig, *, paths: Iterable[str] | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Annotates a set and returns a summary: counts, seconds, the folder written.

    paths: image files, for `src = "-"`. After a kill, the same call continues, and the files are the same as if it had
    never been interrupted. Raises `UsageError` (wrong names, an output made with other settings), `Interrupted`
    (signals; the same call resumes), `SctoolError` (nothing could be read or written; faults with `strict`).
    """
    began = time.monotonic()
    annotators = make_annotators(config.cond, config.seed)
    for annotator in annotators:
        annotator.ready()
    size = Size.parse(config.size)
    part = Part.parse(config.shards)
    source, shards = open_shards(config.src) or (open_input(config.src, paths), [])
    out = output_folder(config, source)
    if not shards and not source.records and not source.faults:
        raise UsageError(f"'{config.src}' contains no images.")

    with locked_output(out, shared=part is not None):
        settings = record_settings(out, config, annotators, source)
        template = Job("", out, config.layout == "merged", annotators, size, config.render, settings)
        jobs = shard_jobs(template, shards, config.limit) if shards else folder_jobs(template, source, config.limit)
        own_jobs = jobs[part.number - 1 :: part.of] if part else jobs
        if config.limit is not None:
            refuse_to_shrink(out, jobs)
        counts = _run(own_jobs, config, annotators, progress)
        whole = part is None or all(job.valid_marker() for job in jobs)
        errors = _finish(out, jobs, own_jobs, source.faults, counts, part if not whole else None)
    failed, new = counts.failed + len(source.faults), counts.images - counts.skipped
    _raise_failures(config, out, counts, failed, errors)
    seconds = time.monotonic() - began
    return {
        "out": str(out),
        "conditions": [annotator.name for annotator in annotators],
        "images": counts.images,
        "failed": failed,
        "skipped": counts.skipped,
        "seconds": round(seconds, 3),
        "images_per_second": round(new / seconds, 1) if new else 0.0,
        "errors": str(errors) if errors else None,
        "whole": whole,
    }


@dataclass(frozen=True)
class Part:
    """`--shards 3/16`: every 16th job from the third on, for one of 16 array jobs that write one set."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str | None) -> Part | None:
        """Reads the flag; None for None. Raises `UsageError`."""
        if text is None:
            return None
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(
                f"--shards '{text}' is not a part. Write K/N with K from 1 to N, e.g. 3/16 for the third of 16."
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def errors(self) -> str:
        """The name of the part's own list of errors."""
        return f"errors-{self.number}-of-{self.of}.jsonl"


@dataclass(frozen=True)
class Counts:
    """What the jobs of a run did."""

    jobs: int
    images: int
    failed: int
    skipped: int
    """Images that were already finished."""
    replaced: set[str]
    """Files that jobs which were done again had written before."""


def _run(
    jobs: list[Job], config: AnnotateConfig, annotators: tuple[Annotator, ...], progress: Progress | None
) -> Counts:
    """Does the jobs that are not finished."""
    gpu = any(annotator.needs_weights for annotator in annotators)

    def workers(images: int) -> int:
        return _workers(config.jobs, images, annotators)

    return do_unfinished(run_job, jobs, workers, progress, ray=config.ray, ray_workers=config.jobs, gpu=gpu)


def do_unfinished(
    function: JobFunction, jobs: Sequence[Job], workers: Callable[[int], int], progress: Progress | None, *,
    ray: str | None = None, ray_workers: int | None = None, gpu: bool = False,
) -> Counts:  # fmt: skip
    """Calls `function(job, on_image)` for the jobs that are not finished, in processes or on the cluster `ray`.

    workers: the number of processes for a number of images. gpu: a task on the cluster uses a GPU if there are any.
    """
    markers = [job.valid_marker() for job in jobs]
    finished = [_counts(marker) for marker in markers if marker is not None]
    todo = [job for job, marker in zip(jobs, markers, strict=True) if marker is None]
    replaced = {name for job in todo for name in job.read_marker().get("files", ())}
    before, expected = _total(finished), expected_images(todo)

    def report(done: int) -> None:
        if progress:
            progress(before + done, before + max(expected, done))

    if ray is not None:
        from .cluster import run_on_ray

        new = run_on_ray(function, todo, ray, ray_workers, report, lambda job: job.name, gpu=gpu)
    else:
        new = run_jobs(function, todo, workers(expected), report, lambda job: job.name)
    report(_total(new))  # until now the images of a repeated job counted twice
    images, failed = (sum(count[key] for count in finished + new) for key in ("images", "failed"))
    return Counts(len(jobs), images, failed, sum(count["images"] for count in finished), replaced)


def _counts(marker: dict[str, Any]) -> dict[str, int]:
    return {"images": marker["images"], "failed": marker["failed"]}


def _total(counts: list[dict[str, int]]) -> int:
    return sum(count["images"] + count["failed"] for count in counts)


def expected_images(jobs: Sequence[Job]) -> int:
    """How many images the jobs have; for shards estimated from the first shard's images and all file sizes."""
    if not jobs or not jobs[0].is_shard:
        return sum(len(job.records) for job in jobs)
    first = len(jobs[0].list_records()[0])
    if any(job.limit is not None for job in jobs):
        return sum(job.limit if job.limit is not None else first for job in jobs)
    sizes = [os.path.getsize(job.tar) for job in jobs if os.path.exists(job.tar)]
    return round(first * sum(sizes) / sizes[0]) if sizes and sizes[0] else first


def _workers(wanted: int | None, images: int, annotators: tuple[Annotator, ...]) -> int:
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0))
    if any(annotator.needs_weights for annotator in annotators):
        return min(cores, WORKERS_PER_GPU * len(gpus())) or cores
    return cores if images > IN_PROCESS else 1


def _finish(
    out: Path, jobs: list[Job], own_jobs: list[Job], faults: list[Fault], counts: Counts, part: Part | None
) -> Path | None:
    """Writes the lists of the whole set, or for a `part` of an unfinished set its own. Returns the list of errors."""
    if part is not None:
        return write_lists(out, own_jobs, faults, part.errors)
    remove_obsolete_files(out, jobs, counts.replaced)
    return write_lists(out, jobs, faults, None)


def _raise_failures(config: AnnotateConfig, out: Path, counts: Counts, failed: int, errors: Path | None) -> None:
    """Raises an error if nothing could be annotated, or, with `strict`, if not everything could be."""
    if not counts.images and errors:
        with open(errors, encoding="utf-8") as lines:
            first = json.loads(next(lines))
        raise SctoolError(f"no image could be annotated; first: {first['where']}: {first['reason']} (see {errors}).")
    if not counts.images and counts.jobs:
        raise UsageError(f"'{config.src}' contains no images among the members of its shards.")
    if failed and config.strict:
        raise SctoolError(
            f"{failed} of {failed + counts.images} images could not be read (--strict); they are listed in "
            f"{errors}. The others are annotated in {out}."
        )
