"""What a distillation would do, before it does it: parameters and FLOPs before and after, memory, steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..backbones.loading import Backbone, load_backbone
from ..backbones.thin import make_thin
from ..config import MemoryLevel, TrainConfig
from ..data.records import Source
from ..devices import best_device, choose_precision, torch_dtype
from ..training.memory import Estimate, Part, chosen_level, estimate
from ..training.splits import split_records
from ..tuners import method_config, tuner_class
from .making import plan as plan_student
from .pruning import pruned


def flops(denoiser: nn.Module, backbone: Backbone) -> int:
    """FLOPs (two for a multiplication and an addition) of one call for one image, counted on the meta device."""
    family, twin = backbone.family, copy.deepcopy(denoiser).to("meta")
    side = family.latent_size(twin.config)  # type: ignore[arg-type]
    latents = torch.empty(1, backbone.latent_channels, side, side, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        family.output(twin, latents, torch.zeros(1, device="meta"), family.dummy_rows(twin.config, 1, "meta"))  # type: ignore[arg-type]
    return counter.get_total_flops()


def plan_distillation(
    config: TrainConfig, source: Source, held_out: Source | None = None, *, offline: bool = False
) -> dict[str, Any]:
    """The figures of a run without running it; sizes in bytes. Raises `UsageError` as the run would."""
    assert config.distill is not None
    device = torch.device(best_device())
    precision = choose_precision(config.precision, device)
    teacher = load_backbone(config.base, offline=offline)
    own = plan_student(teacher, config.distill)
    twin = copy.deepcopy(teacher.denoiser).to("meta")
    student = (
        pruned(twin, teacher.family, config.distill.prune) if config.distill.prune
        else make_thin(twin, own.ranks, config.distill.form)
    )  # fmt: skip
    before, after = flops(teacher.denoiser, teacher), flops(student, teacher)
    tuner = tuner_class("full").build(method_config("full", {}), student, (), teacher.vae_scale)
    size, width = config.size or teacher.resolution, torch.finfo(torch_dtype(precision)).bits // 8
    teacher_bytes = own.before * width
    with teacher.replaced(student):

        def estimated(level: MemoryLevel) -> Estimate:
            return estimate(config, {None: Part(teacher, tuner, ())}, size, level, width)

        level, found = chosen_level(config.memory, estimated, teacher_bytes)
        found = found or estimated(level)
    training, validation = split_records(source, held_out, config)
    return {
        "base": config.base, "kind": "pruned" if config.distill.prune else "low-rank",
        "layers": own.layers, "low_rank_layers": len(own.ranks),
        "parameters_before": own.before, "parameters_after": own.after,
        "flops_before": before, "flops_after": after,
        "precision": precision, "device": str(device), "size": size, "steps": config.steps,
        "batch": config.batch * config.accumulate, "images": len(training), "held_out": len(validation),
        "memory": found.total + teacher_bytes, "memory_level": level,
    }  # fmt: skip


def show_plan(plan: dict[str, Any]) -> str:
    """The plan as lines for a person."""
    share, work = plan["parameters_after"] / plan["parameters_before"], plan["flops_after"] / plan["flops_before"]
    layers = f", {plan['low_rank_layers']} of {plan['layers']} layers low-rank" if plan["layers"] else ""
    return "\n".join(
        [
            f"teacher    {plan['base']} at {plan['size']} px, {plan['parameters_before']:,} parameters",
            f"student    {plan['kind']}, {plan['parameters_after']:,} parameters ({100 * share:.1f} %){layers}",
            f"FLOPs      {plan['flops_before'] / 1e9:.2f} G to {plan['flops_after'] / 1e9:.2f} G per call and image "
            f"({100 * work:.1f} %)",
            f"work       {plan['steps']} steps of {plan['batch']} images, {plan['precision']} on {plan['device']}",
            f"data       {plan['images']} images for training, {plan['held_out']} held out",
            f"memory     {plan['memory_level']}, about {plan['memory'] / 1e9:.2f} GB",
        ]
    )
