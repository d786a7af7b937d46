"""What a training run would do, before it does it: sites, counts, memory, cache, steps (`sctool train --dry-run`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..backbones.loading import Backbone, autoencoder_dtype, load_backbone
from ..config import MemoryLevel, TrainConfig
from ..data.prepared import cache_plan
from ..data.records import Source
from ..data.streaming.folder import Rows
from ..devices import best_device, choose_precision, torch_dtype
from ..tasks import task_configs
from ..tuners import check_routing
from .lanes import TaskSet
from .memory import Estimate, Footprint, Part, chosen_level, estimate
from .recipe import check_mask
from .setup import added_classes, build_tuner
from .splits import split_records


def plan_run(
    config: TrainConfig, source: Source, held_out: Source | None = None, *, offline: bool = False
) -> dict[str, Any]:
    """The figures of a run without tasks; see `plan_tasks`."""
    return plan_tasks(config, {None: TaskSet(source, held_out)}, offline=offline)


def plan_tasks(config: TrainConfig, sets: Mapping[str | None, TaskSet], *, offline: bool = False) -> dict[str, Any]:
    """The figures of a run without running it; all sizes in bytes. `sets` as for `train_tasks`.

    With tasks, the figures of each are in "tasks" and those of the whole run are their sums.
    Memory is weights, gradients, AdamW's two moments and the activations at the peak of a step (counted exactly for
    eager mode on fake tensors); the workspace of the device's libraries comes on top.
    """
    check_routing(config)
    device = torch.device(best_device())
    precision = choose_precision(config.precision, device)
    backbone = load_backbone(config.base, vae_dtype=autoencoder_dtype(device), offline=offline)  # as the cache has it
    check_mask(config, backbone)
    size = config.size or backbone.resolution
    backbone.check_size(size)
    width = torch.finfo(torch_dtype(precision)).bits // 8
    configs = task_configs(config)
    parts = {task: _part(own, sets[task], backbone, task) for task, own in configs.items()}

    def estimated(level: MemoryLevel) -> Estimate:
        return estimate(config, parts, size, level, width)

    level, found = chosen_level(config.memory, estimated)
    found = found or estimated(level)
    plans = {task: _plan_task(own, sets[task], parts[task], size, found.parts[task]) for task, own in configs.items()}
    whole = _together(plans) if config.tasks else plans[None]
    frozen = sum(p.numel() for p in backbone.denoiser.parameters())
    return {
        "method": config.method,
        "base": config.base,
        "frozen": frozen,
        "precision": precision,
        "device": str(device),
        "size": size,
        "steps": config.steps,
        "batch": config.batch * config.accumulate * len(plans),
        "memory": found.total,
        "memory_level": level,
        **whole,
        "total": frozen + sum(plan["total"] - frozen for plan in plans.values()),
    }


def _part(config: TrainConfig, part: TaskSet, backbone: Backbone, task: str | None) -> Part:
    """What is trained of one task."""
    backbone = backbone.with_classes(added_classes(config, part.source, part.held_out, backbone, task))
    return Part(backbone, build_tuner(config, backbone, task), config.conditions)


def _plan_task(config: TrainConfig, part: TaskSet, own: Part, size: int, footprint: Footprint) -> dict[str, Any]:
    """The figures of one task."""
    training, validation = split_records(part.source, part.held_out, config)
    backbone, tuner = own.backbone, own.tuner
    rule = backbone.family.prompt_rule(config.trigger, config.caption)
    frozen = sum(p.numel() for p in backbone.denoiser.parameters())
    trained = sum(p.numel() for p in tuner.parameters() if p.requires_grad)
    return {
        "cond": list(config.conditions),
        "sites": tuner.describe_sites(),
        "classes_added": list(backbone.classes),
        "trainable": trained,
        "stored": sum(value.numel() for value in tuner.state_dict().values()),
        "total": frozen + trained - tuner.replaced(),
        "images": len(training),
        "held_out": len(validation),
        "epochs": round(config.steps * config.batch * config.accumulate / max(1, len(training)), 2),
        "activations_per_image": footprint.saved,
        "peak_per_image": footprint.peak,
        "cache": prepared_plan(training, backbone)
        if isinstance(training, Rows)
        else cache_plan(training, backbone, size=size, conds=config.conditions, flip=config.flip, prompt=rule),
    }


def prepared_plan(rows: Rows, backbone: Backbone) -> dict[str, Any]:
    """What `cache_plan` says, for a set that is prepared already. Raises `UsageError` where it is for another base."""
    rows.folder.check_base(backbone.id, backbone.vae_hash, (backbone.conditioner_hash,), backbone.family.by_class)
    made = rows.folder.manifest
    return {
        "folder": str(rows.folder.folder), "prepared": True, "dtype": made.dtype, "error_db": made.error_db,
        "images": len(rows), "images_to_encode": 0, "bytes": made.bytes, "bytes_to_add": 0, "left_out": 0,
    }  # fmt: skip


def _together(plans: Mapping[str | None, dict[str, Any]]) -> dict[str, Any]:
    """Each task's figures under "tasks", and those of the whole run: sums, and the mean image's activations."""
    sums = {key: sum(plan[key] for plan in plans.values()) for key in ("trainable", "stored", "images", "held_out")}
    per_image = ("activations_per_image", "peak_per_image")
    means = {key: sum(plan[key] for plan in plans.values()) // len(plans) for key in per_image}
    return {"tasks": dict(plans), **sums, **means}


def captions(cache: dict[str, Any]) -> str:
    """What the user should know of the captions; "" where every image has one that is read to its end."""
    if cache.get("prepared"):
        return ""
    counts = {
        f"made from class labels ({cache['caption_example']})": cache["captions_from_labels"],
        "empty": cache["captions_empty"],
        "longer than the text encoder reads": cache["captions_too_long"],
    }
    parts = [f"{number} {what}" for what, number in counts.items() if number]
    return f"; captions: {', '.join(parts)}" if parts else ""


def added(classes: list[str]) -> str:
    """The classes that the tuner adds to the base's; "" for none."""
    return f"; {len(classes)} classes added: {', '.join(classes)}" if classes else ""


def show_plan(plan: dict[str, Any]) -> str:
    """The plan as lines for a person; with tasks, those of each follow those of the run."""
    share, saved = 100 * plan["trainable"] / plan["frozen"], plan["activations_per_image"] / 1e6
    peak = plan["peak_per_image"] / 1e6
    lines = [
        f"method     {plan['method']}{_control(plan)}",
        f"base       {plan['base']} at {plan['size']} px",
        f"weights    {plan['trainable']:,} trained, {plan['frozen']:,} frozen ({share:.2f} %)",
        f"work       {plan['steps']} steps of {plan['batch']} images, {plan['precision']} on {plan['device']}",
        f"memory     {plan['memory_level']}, about {plan['memory'] / 1e9:.2f} GB "
        f"({saved:.1f} MB of saved activations per image, {peak:.1f} MB at the peak)",
    ]
    for name, task in plan.get("tasks", {}).items():
        lines += [f"task       {name}{_control(task)}, {task['trainable']:,} weights", *_show_task(task)]
    return "\n".join(lines if "tasks" in plan else [*lines, *_show_task(plan)])


def _control(plan: dict[str, Any]) -> str:
    return f", controlled by {', '.join(plan['cond'])}" if plan.get("cond") else ""


def _show_task(plan: dict[str, Any]) -> list[str]:
    """Sites, data and cache of a run without tasks, or of a task."""
    cache = plan["cache"]
    stored = f"{cache['bytes'] / 1e6:.1f} MB in {cache['folder']}"
    still = f"{cache['bytes_to_add'] / 1e6:.1f} MB of it still to write"
    images = f"{plan['images']} images for training, {plan['epochs']} epochs, {plan['held_out']} held out"
    return [
        f"tuned      {'; '.join(plan['sites'])}{added(plan['classes_added'])}",
        f"data       {images}{captions(cache)}",
        f"prepared   {stored}, {cache['dtype']}" if cache.get("prepared") else f"cache      {stored}, {still}",
    ]
