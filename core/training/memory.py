"""The memory that a training will need, counted on fake tensors, and the level of memory that fits a card."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..backbones.loading import Backbone
from ..config import LEVELS, MemoryLevel, TrainConfig, card_bytes
from ..errors import UsageError
from ..measure import LiveBytes
from ..tuners.base import Tuner
from .model import build_model

ADAM_STATES = 4
"""float32 numbers per trained weight: the weight, its gradient, AdamW's two moments."""
RESERVE = 1.5e9
"""Bytes of a card that the driver, libraries' workspaces and fragmentation take (assumed: 1 to 2 GB)."""
AUTOCAST = 1.35
"""Activations under autocast over those in half precision alone, whose norms are not in float32 (SD 1.5, SC-Tuner)."""


@dataclass(frozen=True)
class Part:
    """What is trained of a run, or of one of its tasks."""

    backbone: Backbone
    tuner: Tuner
    conditions: tuple[str, ...]


@dataclass(frozen=True)
class Footprint:
    """Bytes for one image: saved for backward, and at the peak of a step; and how many numbers the denoiser holds."""

    saved: int
    peak: int
    held: int


@dataclass(frozen=True)
class Estimate:
    """What a run needs at a level: its parts' footprints, and the bytes of all together."""

    level: MemoryLevel
    parts: dict[str | None, Footprint]
    total: int

    def __str__(self) -> str:
        return f"memory={self.level}, about {self.total / 1e9:.2f} GB"


def footprint(part: Part, size: int, level: MemoryLevel, width: int = 4) -> Footprint:
    """Counts a step on one image of `size` pixels, in float32 and eager mode; given in numbers of `width` bytes."""
    backbone = part.backbone
    with FakeTensorMode():
        model = build_model(*(fake_twin(module) for module in (backbone.denoiser, part.tuner)), level=level)
        for parameter in model.parameters():
            if parameter.requires_grad:  # gradients are counted with the weights
                parameter.register_post_accumulate_grad_hook(_drop)
        side = size // backbone.vae_scale
        latents = torch.empty(1, backbone.latent_channels, side, side)
        rows = backbone.family.dummy_rows(model.denoiser.config, 1, "cpu")
        hints = {name: torch.empty(1, 3, size, size) for name in part.conditions}
        with LiveBytes() as live:
            output = model(latents, torch.zeros(1), rows, hints or None)
            gc.collect()
            saved = live.now - output.untyped_storage().nbytes()
            output.square().mean().backward()
        held = sum(tensor.numel() for tensor in (*backbone.denoiser.parameters(), *model.denoiser.buffers()))
    share = width / 4 * (AUTOCAST if part.tuner.needs_autocast and width < 4 else 1)
    return Footprint(int(saved * share), int(live.peak * share), held)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def fake_twin(module: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """A copy with weights that have no storage, in `dtype`; to be called under a `FakeTensorMode`."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=dtype if buffer.is_floating_point() else buffer.dtype)
    return copy.deepcopy(module, memo)


def estimate(
    config: TrainConfig, parts: Mapping[str | None, Part], size: int, level: MemoryLevel, width: int, processes: int = 1
) -> Estimate:
    """What each of `processes` needs: weights in `width` bytes, gradients, AdamW, and activations at their peak.

    Every image of a batch is in one forward pass, as are the batches of all parts.
    """
    each = {name: footprint(part, size, level, width) for name, part in parts.items()}
    trained = sum(p.numel() for part in parts.values() for p in part.tuner.parameters() if p.requires_grad)
    activations = sum(one.peak for one in each.values()) * (config.batch // processes)
    states = trained * 4 * (ADAM_STATES + bool(config.ema))
    return Estimate(level, each, activations + max(one.held for one in each.values()) * width + states)


def chosen_level(
    memory: str, estimated: Callable[[MemoryLevel], Estimate], extra: int = 0
) -> tuple[MemoryLevel, Estimate | None]:
    """The level that `memory` names, or for a card's memory the first that fits, and its estimate.

    `extra` are bytes besides, as a teacher's. Raises `UsageError` where nothing fits.
    """
    card = card_bytes(memory)
    if card is None:
        return next(level for level in LEVELS if level == memory), None
    last = None
    for level in LEVELS[1:]:
        last = estimated(level)
        if last.total + extra + RESERVE <= card:
            return level, last
    assert last is not None
    raise UsageError(
        f"memory={memory}: the run needs about {(last.total + extra + RESERVE) / 1e9:.1f} GB even with "
        f"memory={last.level}. Lower batch (accumulate makes up for it) or size."
    )
