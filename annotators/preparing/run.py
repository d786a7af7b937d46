"""`prepare`: latents, text rows and maps of a set in shards, in processes or on many machines, resumable by shard."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2

from ...core.backbones.bases import family_of, resolution
from ...core.backbones.loading import Backbone, autoencoder_dtype
from ...core.config import PrepareConfig
from ...core.data.conditions import ConditionSpec, parse_conditions
from ...core.data.records import Source, file_stamp
from ...core.data.sources import open_shards, open_source
from ...core.data.streaming.layout import MANIFEST, Manifest, ShardInfo, index_name
from ...core.devices import best_device
from ...core.errors import SctoolError
from ...core.files import human, require_space
from .. import ANNOTATORS, make_annotators
from ..base import Annotator
from ..engine.listing import folder_jobs, shard_jobs
from ..engine.maps import Size
from ..engine.output import locked_output, output_folder, refuse_to_shrink, remove_obsolete_files, settle, write_errors
from ..engine.pool import gpus
from ..engine.run import WORKERS_PER_GPU, Counts, Part, Progress, do_unfinished
from .job import PrepareJob, Recipe
from .plan import DiskPlan, plan_disk
from .worker import check_recipe, prepare_job

FOLDER_SHARD = 1024
"""Images of a folder per prepared shard."""


def prepare_set(
    config: PrepareConfig, *, offline: bool = False, dry_run: bool = False, progress: Progress | None = None,
    say: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Prepares a set and returns a summary; with `dry_run` only the plan. `say` is called with lines of text.

    After a kill, the same call continues, to the same files. Raises `UsageError` for settings that do not fit (the
    base, the maps, an output made with others), `Interrupted` (signals; the same call resumes), `SctoolError` where
    the disk has too little room, nothing could be read, or something could not with `strict`.
    """
    began = time.monotonic()
    say = say or (lambda line: None)
    part = Part.parse(config.shards)
    specs = parse_conditions(config.cond)
    annotators = own_annotators(specs, config.seed)
    source, shards = open_shards(config.src, config.maps) or (open_source(config.src, config.maps), [])
    recipe = make_recipe(config, specs, source, offline)
    backbone = check_recipe(recipe)
    out = output_folder(config, source, "prepared")
    template = PrepareJob("", out, True, annotators, Size(), False, "", recipe=recipe)
    if dry_run:
        jobs = list_jobs(template, source, shards, config.limit)
        plan = plan_disk(jobs, backbone)
        return {"out": str(out), **plan.to_json()}
    with locked_output(out, shared=part is not None):
        settings = settle(out, settings_of(config, recipe, specs, annotators, source, backbone))
        jobs = list_jobs(replace(template, settings=settings), source, shards, config.limit)
        own_jobs = jobs[part.number - 1 :: part.of] if part else jobs
        if config.limit is not None:
            refuse_to_shrink(out, jobs)
        plan = plan_disk(own_jobs, backbone)
        _announce(plan, out, config, say)
        manifest_outdated = any(job.valid_marker() is None for job in own_jobs)
        if manifest_outdated:
            (out / MANIFEST).unlink(
                missing_ok=True
            )  # of a set that has changed: not to be trained on until it is whole
        gpu = backbone.vae.device.type == "cuda"
        counts = do_unfinished(
            prepare_job, own_jobs, lambda images: _workers(config.jobs, gpu), progress,
            ray=config.ray, ray_workers=config.jobs, gpu=gpu,
        )  # fmt: skip
        whole = part is None or all(job.valid_marker() for job in jobs)
        if whole:
            remove_obsolete_files(out, jobs, counts.replaced)
        errors = write_errors(
            out, jobs if whole else own_jobs, source.faults, None if whole or not part else part.errors
        )
        manifest = make_manifest(config, recipe, source, backbone, jobs) if whole else None
        failed = counts.failed + len(source.faults)
        _refuse_nothing(config, out, counts, errors)
        if manifest:
            manifest.save(out)
    if failed and config.strict:
        raise SctoolError(
            f"{failed} of {failed + counts.images} images could not be used (--strict); they are listed in {errors}. "
            f"The others are prepared in {out}."
        )
    seconds, new = time.monotonic() - began, counts.images - counts.skipped
    return {
        "out": str(out), "images": counts.images, "failed": failed, "skipped": counts.skipped,
        "seconds": round(seconds, 3), "images_per_second": round(new / seconds, 1) if new else 0.0,
        "errors": str(errors) if errors else None, "whole": whole, "dtype": config.dtype,
        **(_totals(manifest, jobs) if manifest else {}),
    }  # fmt: skip


def own_annotators(specs: Sequence[ConditionSpec], seed: int) -> tuple[Annotator, ...]:
    """The annotators of those conditions that sctool can make. Raises `UsageError` for settings of others."""
    for spec in specs:
        if spec.settings and spec.name not in ANNOTATORS:
            make_annotators(str(spec))
    known = [str(spec) for spec in specs if spec.name in ANNOTATORS]
    return make_annotators(known, seed) if known else ()


def make_recipe(config: PrepareConfig, specs: tuple[ConditionSpec, ...], source: Source, offline: bool) -> Recipe:
    """What all jobs share."""
    rule = family_of(config.base, offline).prompt_rule(config.trigger, config.caption)
    return Recipe(
        base=config.base,
        precision=str(autoencoder_dtype(best_device())),
        size=config.size or resolution(config.base, offline),
        dtype=config.dtype,
        flip=config.flip,
        conds=specs,
        prompt=rule,
        batch=config.batch,
        offline=offline,
        root=os.path.abspath(source.root) if source.root else None,
        maps=config.maps,
    )


def settings_of(
    config: PrepareConfig, recipe: Recipe, specs: Sequence[ConditionSpec], annotators: Sequence[Annotator],
    source: Source, backbone: Backbone,
) -> dict[str, Any]:  # fmt: skip
    """All that decides the bytes of a shard besides its images; the first keys are those that users know."""
    made = {annotator.name: annotator.id for annotator in annotators}
    return {
        "kind": "prepared",
        "source": config.src if config.src == "photos" else str(Path(config.src).resolve()),
        "maps": config.maps and str(Path(config.maps).resolve()),
        "conditions": [made.get(spec.name, {"name": spec.name}) for spec in specs],
        "size": recipe.size,
        "dtype": config.dtype,
        "flip": config.flip,
        "trigger": config.trigger,
        "caption": config.caption,
        "seed": config.seed,
        "batch": config.batch,
        "autoencoder": list(backbone.latents_id),
        "text encoder": [] if backbone.family.by_class else list(backbone.conditioning_id),
        "layout": source.kind,
        "opencv": cv2.__version__,
    }


def list_jobs(template: PrepareJob, source: Source, shards: Sequence[Any], limit: int | None) -> list[PrepareJob]:
    """One job a shard; of a folder, one every `FOLDER_SHARD` images."""
    if shards:
        jobs = shard_jobs(template, list(shards), limit)
    else:
        jobs = folder_jobs(template, source, limit, FOLDER_SHARD)
    return [job for job in jobs if isinstance(job, PrepareJob)]


def make_manifest(
    config: PrepareConfig, recipe: Recipe, source: Source, backbone: Backbone, jobs: Sequence[PrepareJob]
) -> Manifest:
    """The manifest of a set whose jobs are all finished."""
    markers = [job.read_marker() for job in jobs]
    infos = tuple(
        ShardInfo(
            job.name,
            marker["rows"],
            marker["files"][f"{job.name}.tar"],
            marker["files"][index_name(job.name)],
            marker["source"][:16],
            file_stamp(job.tar) if job.is_shard else None,
        )
        for job, marker in zip(jobs, markers, strict=True)
        if marker["rows"]
    )
    side = recipe.size // backbone.vae_scale
    by_class = backbone.family.by_class
    conditions: dict[str, dict[str, Any]] = {spec.name: {} for spec in recipe.conds}
    for name in conditions:
        notes = [marker["conditions"][name] for marker in markers if name in marker["conditions"]]
        conditions[name] = merged_notes(notes)
    return Manifest(
        source=config.src,
        root=recipe.root,
        base=config.base,
        autoencoder=backbone.vae_hash,
        conditioner=() if by_class else (backbone.conditioner_hash,),
        precisions={"autoencoder": recipe.precision, "text": "torch.float32"},
        size=recipe.size,
        latent=(backbone.latent_channels, side, side),
        dtype=config.dtype,
        flip=config.flip,
        by_class=by_class,
        trigger=config.trigger,
        caption=config.caption,
        conditions=conditions,
        labels=tuple(sorted({label for marker in markers for label in marker["labels"]})),
        error_db={} if config.dtype == "fp32" else _errors_in_db([marker["squares"] for marker in markers]),
        shards=infos,
    )


def merged_notes(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How maps were made, over all shards: a setting that differs between them is replaced by `<setting>_varies`."""
    merged = dict(notes[0]) if notes else {}
    for note in notes[1:]:
        varying = {key for key in note if key.endswith("_varies")}
        varying |= {f"{key}_varies" for key in merged if not key.endswith("_varies") and merged[key] != note.get(key)}
        merged = {key: value for key, value in merged.items() if f"{key}_varies" not in varying}
        merged |= dict.fromkeys(sorted(varying), True)
    return merged


def _errors_in_db(squares: Sequence[dict[str, list[float]]]) -> dict[str, float]:
    """10 log10 of the sum of squares over that of the errors, of latents and of text rows."""
    result = {}
    for what in ("latents", "text"):
        signal, error = (math.fsum(one[what][i] for one in squares) for i in (0, 1))
        if signal and error:
            result[what] = round(10 * math.log10(signal / error), 1)
    return result


def _announce(plan: DiskPlan, out: Path, config: PrepareConfig, say: Any) -> None:
    """Says what will be written. Raises `SctoolError` if the disk has less free."""
    if not plan.images:
        return
    say(
        f"about {plan.images} images still to prepare: {human(plan.bytes)} in {out} ({plan.per_image / 1e3:.1f} kB an "
        f"image, {plan.per_caption / 1e3:.1f} kB for each of about {plan.captions} captions)"
    )
    smaller = "" if config.dtype != "fp32" else ", --dtype bf16 for half of it"
    require_space(out, plan.bytes, "preparing", f"Free some space, choose another --out{smaller}, or a --limit.")


def _workers(wanted: int | None, gpu: bool) -> int:
    if wanted is not None:
        return wanted
    return WORKERS_PER_GPU * max(1, len(gpus())) if gpu else len(os.sched_getaffinity(0))


def _refuse_nothing(config: PrepareConfig, out: Path, counts: Counts, errors: Path | None) -> None:
    if not counts.images:
        first = f" First fault: {errors.read_text().splitlines()[0]}" if errors else ""
        raise SctoolError(f"no image of '{config.src}' could be prepared in {out}.{first}")


def _totals(manifest: Manifest, jobs: Sequence[PrepareJob]) -> dict[str, Any]:
    """Figures of a whole set."""
    markers = [job.read_marker() for job in jobs]
    return {
        "shards": len(manifest.shards), "bytes": manifest.bytes, "error_db": manifest.error_db,
        "train": manifest.count("train"), "held_out": manifest.count("validation", "test"),
        "captions": sum(marker["captions"] for marker in markers),
        "captions_too_long": sum(marker["too_long"] for marker in markers),
        "without_prompt": sum(marker["without_prompt"] for marker in markers),
    }  # fmt: skip
