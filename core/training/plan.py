"""What a training run would do, before it does it: sites, counts, memory, cache, steps (`sctool train --dry-run`)."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..backbones.loading import Backbone, autoencoder_dtype, load_backbone
from ..config import TrainConfig
from ..data.prepared import cache_plan
from ..data.records import Source
from ..devices import best_device, choose_precision, torch_dtype
from ..measure import saved_bytes
from ..sites.attaching import TunedBackbone
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


def plan_run(
    config: TrainConfig, source: Source, held_out: Source | None = None, *, offline: bool = False
) -> dict[str, Any]:
    """The figures of a run without running it; all sizes in bytes.

    Memory is weights, gradients, AdamW's two moments and the activations saved for backward (counted exactly for eager
    mode on the meta device); the workspace of the device's libraries comes on top.
    """
    device = torch.device(best_device())
    precision = choose_precision(config.precision, device)
    backbone = load_backbone(config.base, vae_dtype=autoencoder_dtype(device), offline=offline)  # as the cache has it
    size = config.size or backbone.resolution
    backbone.check_size(size)
    training, validation = split_records(source, held_out, config)
    backbone.classes = added_classes(config, source, held_out, backbone)
    tuner = build_tuner(config, backbone)
    trainable = sum(p.numel() for p in tuner.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in backbone.denoiser.parameters())
    width = torch.finfo(torch_dtype(precision)).bits // 8
    twins = (copy.deepcopy(module).to("meta") for module in (backbone.denoiser, tuner))
    model = build_model(*twins, config.checkpointing)
    activations = activation_bytes(model, backbone, config.conditions, size) * width // 4
    held = frozen + sum(buffer.numel() for buffer in model.denoiser.buffers())
    memory = activations * config.batch + held * width + trainable * 4 * (ADAM_STATES + bool(config.ema))
    global_batch = config.batch * config.accumulate
    return {
        "method": config.method,
        "cond": list(config.conditions),
        "base": config.base,
        "sites": tuner.describe_sites(),
        "classes_added": list(backbone.classes),
        "trainable": trainable,
        "frozen": frozen,
        "precision": precision,
        "device": str(device),
        "size": size,
        "images": len(training),
        "held_out": len(validation),
        "steps": config.steps,
        "batch": global_batch,
        "epochs": round(config.steps * global_batch / max(1, len(training)), 2),
        "activations_per_image": activations,
        "memory": memory,
        "cache": cache_plan(
            training,
            backbone,
            size=size,
            conds=config.conditions,
            flip=config.flip,
            prompt=backbone.family.prompt_rule(config.trigger, config.caption),
        ),
    }


def captions(cache: dict[str, Any]) -> str:
    """What the user should know of the captions; "" where every image has one that is read to its end."""
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
    """The plan as lines for a person."""
    control = f", controlled by {', '.join(plan['cond'])}" if plan["cond"] else ""
    cache = plan["cache"]
    share, saved = 100 * plan["trainable"] / plan["frozen"], plan["activations_per_image"] / 1e6
    return "\n".join(
        [
            f"method     {plan['method']}{control}",
            f"base       {plan['base']} at {plan['size']} px",
            f"tuned      {'; '.join(plan['sites'])}{added(plan['classes_added'])}",
            f"weights    {plan['trainable']:,} trained, {plan['frozen']:,} frozen ({share:.2f} %)",
            f"data       {plan['images']} images for training, {plan['held_out']} held out{captions(cache)}",
            f"work       {plan['steps']} steps of {plan['batch']} images = {plan['epochs']} epochs, "
            f"{plan['precision']} on {plan['device']}",
            f"memory     about {plan['memory'] / 1e9:.2f} GB ({saved:.1f} MB of saved activations per image)",
            f"cache      {cache['bytes'] / 1e6:.1f} MB in {cache['folder']}, "
            f"{cache['bytes_to_add'] / 1e6:.1f} MB of it still to write",
        ]
    )
