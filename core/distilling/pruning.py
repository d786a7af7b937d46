"""BK-SDM's students (Kim et al. 2023, arXiv 2305.15798): U-Nets with blocks left out, of stock architecture.

base: each stage of the encoder keeps its first pair of residual and attention block, each stage of the decoder its
first and third. small: also no middle block. tiny: also no innermost stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..backbones.families import Family
from ..backbones.thin import THIN
from ..errors import DoesNotFit, unknown

SIZES = ("base", "small", "tiny")


def pruned_config(config: Mapping[str, Any], size: str) -> dict[str, Any]:
    """The student's diffusers config. Raises `DoesNotFit` for a denoiser that is not such a U-Net."""
    if size not in SIZES:
        raise unknown("size of a pruned student", size, SIZES)
    if "down_block_types" not in config or config.get("layers_per_block") != 2:
        raise DoesNotFit("blocks are removed from U-Nets with two layers per encoder block, as Stable Diffusion's.")
    own: dict[str, Any] = {**config, "layers_per_block": 1}
    own.pop("_use_default_values", None)  # diffusers' note of what was not given, by which it would undo the changes
    if size == "base":
        return own
    own["mid_block_type"] = None
    if size == "small":
        return own
    stages = len(config["block_out_channels"])
    for key in PER_STAGE:
        if isinstance(own.get(key), list | tuple) and len(own[key]) == stages:
            own[key] = list(own[key])[1:] if key == "up_block_types" else list(own[key])[:-1]
    return own


PER_STAGE = (
    "block_out_channels", "down_block_types", "up_block_types", "attention_head_dim", "num_attention_heads",
    "transformer_layers_per_block", "cross_attention_dim", "only_cross_attention", "layers_per_block",
)  # fmt: skip
"""Config keys with a value per stage; the decoder's stages are in reverse."""


def teacher_names(student: nn.Module, size: str) -> dict[str, str]:
    """For every parameter of the student, the teacher's parameter that it starts with."""
    return {name: _theirs(name, size) for name, _ in student.named_parameters()}


def _theirs(name: str, size: str) -> str:
    parts = name.split(".")
    if parts[0] == "up_blocks":
        if size == "tiny":
            parts[1] = str(int(parts[1]) + 1)
        if parts[2] in ("resnets", "attentions") and parts[3] == "1":
            parts[3] = "2"
    return ".".join(parts)


def pruned(teacher: nn.Module, family: Family, size: str) -> nn.Module:
    """The student with its teacher's weights, on the teacher's device and in its dtype."""
    old: Any = teacher
    if any(isinstance(module, THIN) for module in teacher.modules()):
        raise DoesNotFit("blocks are removed from ordinary bases, and this one has low-rank layers; densify it first.")
    config = pruned_config(old.config, size)
    weights = dict(teacher.named_parameters())
    device = next(teacher.parameters()).device
    with torch.device("meta"):
        student = family.build_denoiser(config)
    names = teacher_names(student, size)
    for name, parameter in student.named_parameters():
        if names[name] not in weights or weights[names[name]].shape != parameter.shape:
            raise DoesNotFit(
                f"a pruned student of size {size} does not fit this base: its {name} has no counterpart of that shape. "
                f"{'tiny needs two innermost stages of equal width; take small.' if size == 'tiny' else ''}"
            )
    if device.type == "meta":
        return student
    state = {name: weights[theirs].detach().clone() for name, theirs in names.items()}
    student.load_state_dict(state, assign=True)
    return student.requires_grad_(False).train(teacher.training)


def matching_stages(student: Any, size: str) -> list[tuple[str, str]]:
    """Names of the student's and the teacher's modules whose outputs correspond, for feature distillation.

    The encoder's stages, the middle block and the decoder's stages; tiny's innermost encoder stage ends before the
    teacher's does, and is left out.
    """
    down = [f"down_blocks.{index}" for index in range(len(student.down_blocks))]
    pairs = [(name, name) for name in (down[:-1] if size == "tiny" else down)]
    if student.mid_block is not None:
        pairs.append(("mid_block", "mid_block"))
    shift = size == "tiny"
    return pairs + [(f"up_blocks.{i}", f"up_blocks.{i + shift}") for i in range(len(student.up_blocks))]
