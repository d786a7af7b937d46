"""What a training run would do, before it does it: sites, counts, memory, cache, steps (`sctool train --dry-run`)."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..backbones.loading import Backbone, load_backbone
from ..backbones.upsampling import fold_upsampling
from ..config import TrainConfig
from ..data.prepared import cache_plan
from ..data.prompts import PromptRule
from ..data.records import Source
from ..devices import choose_precision, torch_dtype
from ..measure import saved_bytes
from ..sites.wiring import TunedBackbone, skips
from .train import build_tuner, split_records


def activation_bytes(model: TunedBackbone, backbone: Backbone, conds: tuple[str, ...], size: int) -> int:
    """Bytes of activations saved for backward per image, counted on the meta device in float32."""
    side = size // backbone.vae_scale
    config = model.denoiser.config
    text: dict[str, torch.Tensor] = {"prompt_embeds": torch.empty(1, 77, config.cross_attention_dim, device="meta")}
    if backbone.family == "sdxl":
        text |= {"pooled": torch.empty(1, 1280, device="meta"), "time_ids": torch.empty(1, 6, device="meta")}
    hints = {name: torch.empty(1, 3, size, size, device="meta") for name in conds}
    latents = torch.empty(1, config.in_channels, side, side, device="meta")
    return saved_bytes(model, lambda: model(latents, torch.zeros(1, device="meta"), text, hints or None))


def plan(
    config: TrainConfig, source: Source, held_out: Source | None = None, *, offline: bool = False
) -> dict[str, Any]:
    """The figures of a run without running it; all sizes in bytes.

    Memory is weights, gradients, AdamW's two moments and the activations kept for backward (counted exactly for eager
    mode on the meta device); the workspace of the device's libraries comes on top.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(config.precision, device)
    backbone = load_backbone(config.base, offline=offline)
    size = config.size or backbone.resolution
    training, validation = split_records(source, held_out, config)
    tuner = build_tuner(config, backbone)
    trainable = sum(p.numel() for p in tuner.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in backbone.denoiser.parameters())
    width = torch.finfo(torch_dtype(precision)).bits // 8
    meta = TunedBackbone(copy.deepcopy(backbone.denoiser).to("meta"), copy.deepcopy(tuner).to("meta"))
    if tuner.kind == "skips":
        fold_upsampling(meta.denoiser)
    if config.checkpointing:
        meta.denoiser.enable_gradient_checkpointing()
    activations = activation_bytes(meta, backbone, config.conditions, size) * width // 4
    held = frozen + sum(buffer.numel() for buffer in meta.denoiser.buffers())
    whole = activations * config.batch + held * width + trainable * 4 * (4 + bool(config.ema))
    sites = [f"skip {s.index} ({s.channels})" for s in getattr(tuner, "sites", [])] or [f"all {frozen:,} weights"]
    return {
        "method": config.method,
        "cond": list(config.conditions),
        "base": config.base,
        "sites": sites,
        "skips_of_base": len(skips(backbone.denoiser)),
        "trainable": trainable,
        "frozen": frozen,
        "precision": precision,
        "device": str(device),
        "size": size,
        "pictures": len(training),
        "held_out": len(validation),
        "steps": config.steps,
        "batch": config.batch * config.accumulate,
        "epochs": round(config.steps * config.batch * config.accumulate / max(1, len(training)), 2),
        "activations_per_picture": activations,
        "memory": whole,
        "cache": cache_plan(
            training,
            backbone,
            size=size,
            conds=config.conditions,
            flip=config.flip,
            prompt=PromptRule(config.trigger, config.caption),
        ),
    }


def show_plan(figures: dict[str, Any]) -> str:
    """The plan as lines for a person."""
    f = figures
    control = f", controlled by {', '.join(f['cond'])}" if f["cond"] else ""
    c = f["cache"]
    cache = f"{c['bytes'] / 1e6:.1f} MB in {c['folder']}, {c['bytes_to_add'] / 1e6:.1f} MB of it still to write"
    share, saved = 100 * f["trainable"] / f["frozen"], f["activations_per_picture"] / 1e6
    return "\n".join(
        [
            f"method     {f['method']}{control}",
            f"base       {f['base']} at {f['size']} px, {f['skips_of_base']} skips",
            f"tuned      {'; '.join(f['sites'])}",
            f"weights    {f['trainable']:,} trained, {f['frozen']:,} frozen ({share:.2f} %)",
            f"data       {f['pictures']} pictures for training, {f['held_out']} held out",
            f"work       {f['steps']} steps of {f['batch']} = {f['epochs']} epochs, {f['precision']} on {f['device']}",
            f"memory     about {f['memory'] / 1e9:.2f} GB ({saved:.1f} MB a picture for backward)",
            f"cache      {cache}",
        ]
    )
