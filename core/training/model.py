"""Denoiser and tuners as they are trained: attached, frozen parts in the form that takes least time or memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from ..backbones.upsampling import fold_upsampling
from ..config import MemoryLevel
from ..lean.levels import economize
from ..sites.attaching import TunedBackbone
from ..tuners.base import Tuner

GRAPHS = 64
"""Graphs that the compiler may make of a block: one for each width and grid, and each block with a tuner in it."""


def build_model(
    denoiser: nn.Module, *tuners: Tuner, tasks: Sequence[str | None] | None = None, level: MemoryLevel = "normal"
) -> TunedBackbone:
    """Denoiser and tuners as they are trained, until the model's attachment is detached.

    Upsampling is folded, and modules are exchanged for those of the memory level, after attaching: what is trained or
    looked at must stay as it is.
    """
    model = TunedBackbone(denoiser, *tuners, tasks=tasks)
    model.attachment.also(fold_upsampling(denoiser))
    model.attachment.also(economize(denoiser, level))
    for tuner in tuners if level != "plain" else ():
        tuner.keep_less()
        if level == "minimum":
            tuner.recompute()
    return model


def compile_blocks(denoiser: nn.Module, **options: Any) -> int:
    """Compiles every transformer block of `denoiser`, for blocks alike once; returns their number."""
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    blocks = [module for module in denoiser.modules() if isinstance(module, BasicTransformerBlock)]
    for block in blocks:
        block.compile(**options)
    return len(blocks)
