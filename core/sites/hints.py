"""Condition maps on their way to the tuners: what fits, what has changed, and how guidance repeats it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError


def mark(tensor: Tensor) -> tuple[int, int]:
    """Changes when another tensor comes or this one is written to; inference tensors keep no version."""
    return id(tensor), -1 if tensor.is_inference() else tensor._version


def checked(name: str, hint: Tensor, latents: Tensor, vae_scale: int) -> Tensor:
    """The hint (B, 3, H, W) as the latents' dtype; uint8 becomes 0..1. Raises `UsageError` if it does not fit."""
    if hint.dim() != 4 or hint.shape[1] != 3:
        raise UsageError(f"hint '{name}' has shape {tuple(hint.shape)}; a hint is an RGB batch (B, 3, H, W).")
    height, width = (side * vae_scale for side in latents.shape[-2:])
    if tuple(hint.shape[-2:]) != (height, width):
        have = f"{hint.shape[-1]}x{hint.shape[-2]}"
        raise UsageError(f"hint '{name}' is {have} pixels but the picture is {width}x{height}; resize the hint to it.")
    check_batch(name, hint, latents)
    scale = 255 if hint.dtype == torch.uint8 else 1
    return hint.to(latents.device, latents.dtype) / scale


def check_batch(name: str, hint: Tensor, latents: Tensor) -> None:
    """Raises `UsageError` unless the hints are one, one a latent, or divide the latents (guidance doubles them)."""
    if len(latents) % max(len(hint), 1) or len(hint) == 0:
        raise UsageError(f"hint '{name}' holds {len(hint)} maps for {len(latents)} latents; give 1, or one a picture.")


def tiled(features: dict[str, dict[int, Tensor]], batch: int) -> dict[str, dict[int, Tensor]]:
    """Features of b hints for `batch` latents; guidance stacks [unconditional, conditional], so all of them repeat."""
    return {
        name: {index: c if len(c) in (1, batch) else c.repeat(batch // len(c), 1, 1, 1) for index, c in levels.items()}
        for name, levels in features.items()
    }
