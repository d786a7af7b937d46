"""Exact sizes of students of a base, counted on the meta device: no weights are loaded or made."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backbones.architectures import Architecture
from ..backbones.thin import make_thin
from ..errors import DoesNotFit
from .factorising import layers_to_divide
from .pruning import SIZES, pruned
from .ranks import by_ratio

RATIO = 0.4225
"""The paper's: 58 % fewer parameters."""

TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "sd21": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
}
"""CLIP's and OpenCLIP's, as diffusers has them."""


@dataclass(frozen=True)
class StudentCount:
    """A student's denoiser in parameters, and `total` with text encoder and autoencoder where those are known."""

    label: str
    parameters: int
    total: int | None


def other_parts(base: Architecture) -> int | None:
    """The parameters of text encoder and autoencoder of a known base; None for others."""
    if base.name not in TEXT_ENCODERS:
        return None
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODERS[base.name]))
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    return _count(text) + _count(vae)


def student_counts(base: Architecture) -> list[StudentCount]:
    """The base itself, low-rank students of the paper's ratio, and BK-SDM's.

    Those that do not fit the base, or are no smaller, are left out.
    """
    denoiser, rest = base.denoiser(), other_parts(base)
    students: dict[str, nn.Module] = {"the base": denoiser}
    for form in ("flat", "spatial"):
        ranks = by_ratio(layers_to_divide(denoiser), RATIO, form)
        students[f"low-rank, ratio {RATIO}, {form}"] = make_thin(copy.deepcopy(denoiser), ranks, form)
    for size in SIZES:
        try:
            students[f"BK-SDM, {size}"] = pruned(denoiser, base.family, size)
        except DoesNotFit:
            continue
    own = _count(denoiser)
    counts = {label: _count(student) for label, student in students.items()}
    return [
        StudentCount(label, count, None if rest is None else count + rest)
        for label, count in counts.items()
        if count < own or label == "the base"
    ]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
