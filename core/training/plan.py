"""What a training run would do, before it does it: sites, counts, memory, cache, steps (`sctool train --dry-run`)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from ..backbones.loading import Backbone, autoencoder_dtype, load_backbone
from ..config import TrainConfig
from ..data.prepared import cache_plan
from ..data.records import Source
from ..data.streaming.folder import Rows
from ..devices import best_device, choose_precision, torch_dtype
from ..measure import saved_bytes
from ..sites.attaching import TunedBackbone
from ..tasks import task_configs
from ..tuners import check_routing
from ..tuners.base import Tuner
from .lanes import TaskSet
from .recipe import check_mask
from .setup import added_classes, build_model, build_tuner
from .splits import split_records

ADAM_STATES = 4  # float32 numbers per trained weight: the weight, its gradient, AdamW's two moments


def activation_bytes(model: TunedBackbone, backbone: Backbone, conditions: tuple[str, ...], size: int) -> int:
    """Bytes of activations saved for backward per image, counted in float32 on the meta device."""
    side = size // backbone.vae_scale
    latents = torch.empty(1, backbone.latent_channels, side, side, device="meta")
    rows = backbone.family.dummy_rows(model.denoiser.config, 1, "meta")
    hints = {name: torch.empty(1, 3, size, size, device="meta") for name in conditions}
    return saved_bytes(model, lambda: model(latents, torch.zeros(1, device="meta"), rows, hints or None))


def meta_model(backbone: Backbone, tuner: Tuner, checkpointing: bool) -> TunedBackbone:
    """The model on the meta device, as it is trained on one sample of a task."""
    twins = (copy.deepcopy(module).to("meta") for module in (backbone.denoiser, tuner))
    return build_model(*twins, checkpointing=checkpointing)


def plan_run(
    config: TrainConfig, source: Source, held_out: Source | None = None, *, offline: bool = False
) -> dict[str, Any]:
    """The figures of a run without tasks; see `plan_tasks`."""
    return plan_tasks(config, {None: TaskSet(source, held_out)}, offline=offline)


def plan_tasks(config: TrainConfig, sets: Mapping[str | None, TaskSet], *, offline: bool = False) -> dict[str, Any]:
    """The figures of a run without running it; all sizes in bytes. `sets` as for `train_tasks`.

    With tasks, the figures of each are in "tasks" and those of the whole run are their sums.
    Memory is weights, gradients, AdamW's two moments and the activations saved for backward (counted exactly for eager
    mode on the meta device); the workspace of the device's libraries comes on top.
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
    plans, held = {}, 0
    for task, own in configs.items():
        plans[task], numbers = _plan_task(own, sets[task], backbone, size, width, task)
        held = max(held, numbers)
    whole = _together(plans) if config.tasks else plans[None]
    frozen = sum(p.numel() for p in backbone.denoiser.parameters())
    activations = sum(plan["activations_per_image"] for plan in plans.values())
    trained = whole["trainable"] * 4 * (ADAM_STATES + bool(config.ema))
    return {
        "method": config.method,
        "base": config.base,
        "frozen": frozen,
        "precision": precision,
        "device": str(device),
        "size": size,
        "steps": config.steps,
        "batch": config.batch * config.accumulate * len(plans),
        "memory": activations * config.batch + held * width + trained,
        **whole,
        "total": frozen + sum(plan["total"] - frozen for plan in plans.values()),
    }


def _plan_task(
    config: TrainConfig, part: TaskSet, backbone: Backbone, size: int, width: int, task: str | None
) -> tuple[dict[str, Any], int]:
    """The figures of one task, and how many numbers the denoiser holds; `width` is the bytes of one."""
    training, validation = split_records(part.source, part.held_out, config)
    backbone = backbone.with_classes(added_classes(config, part.source, part.held_out, backbone, task))
    tuner = build_tuner(config, backbone, task)
    model = meta_model(backbone, tuner, config.checkpointing)
    rule = backbone.family.prompt_rule(config.trigger, config.caption)
    frozen = sum(p.numel() for p in backbone.denoiser.parameters())
    held = frozen + sum(buffer.numel() for buffer in model.denoiser.buffers())
    own = sum(p.numel() for p in tuner.parameters() if p.requires_grad)
    figures = {
        "cond": list(config.conditions),
        "sites": tuner.describe_sites(),
        "classes_added": list(backbone.classes),
        "trainable": own,
        "stored": sum(value.numel() for value in tuner.state_dict().values()),
        "total": frozen + own - tuner.replaced(),
        "images": len(training),
        "held_out": len(validation),
        "epochs": round(config.steps * config.batch * config.accumulate / max(1, len(training)), 2),
        "activations_per_image": activation_bytes(model, backbone, config.conditions, size) * width // 4,
        "cache": prepared_plan(training, backbone)
        if isinstance(training, Rows)
        else cache_plan(training, backbone, size=size, conds=config.conditions, flip=config.flip, prompt=rule),
    }
    return figures, held


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
    activations = sum(plan["activations_per_image"] for plan in plans.values()) // len(plans)
    return {"tasks": dict(plans), **sums, "activations_per_image": activations}


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
    lines = [
        f"method     {plan['method']}{_control(plan)}",
        f"base       {plan['base']} at {plan['size']} px",
        f"weights    {plan['trainable']:,} trained, {plan['frozen']:,} frozen ({share:.2f} %)",
        f"work       {plan['steps']} steps of {plan['batch']} images, {plan['precision']} on {plan['device']}",
        f"memory     about {plan['memory'] / 1e9:.2f} GB ({saved:.1f} MB of saved activations per image)",
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
