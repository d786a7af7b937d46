"""What the two methods share: a tuner file as it acts on a model, and the layers in it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEY = "sctool"
"""The folder in models/, and the tuners' name among a model's patches."""
Hints = dict[str, tuple[Tensor, float]]
"""By condition: images (b, H, W, 3) in 0..1, and their weight."""
Options = dict[str, Any]
"""ComfyUI's `transformer_options`: what patches know of the U-Net's call under way."""


class Tuner:
    """A tuner file with its strength, as it acts on one model. ComfyUI moves it to and from the GPU by `to`."""

    def __init__(self, name: str, meta: dict[str, Any], weights: dict[str, Tensor], strength: float) -> None:
        self.name, self.meta, self.weights, self.strength = name, meta, weights, strength

    def fit(self, unet: nn.Module, config: dict[str, Any], hints: Hints) -> None:
        """Finds the places that it edits in ComfyUI's U-Net. Raises `ValueError` where it does not fit."""
        raise NotImplementedError

    def misfit(self, where: str, there: Any, here: Any) -> ValueError:
        """The error for a place of another width."""
        base = self.meta.get("base", {}).get("id", "another base")
        return ValueError(
            f"{self.name} was made for {base} and does not fit this model: {where} is {there} in the file and {here} "
            "here. Load the base that it was trained on."
        )

    def to(self, device: Any) -> Tuner:
        """Moves the weights. A dtype is ignored: weights stay float32 and are cast where they are used.

        In place, for a sampler may hold a copy of the list of patches that was made before the model was moved.
        """
        if isinstance(device, torch.device):
            self.weights = {name: weight.to(device) for name, weight in self.weights.items()}
        return self

    def __deepcopy__(self, memo: dict) -> Tuner:
        """For a clone of the model: the same weights for now, moved apart, as a clone that ends moves its own away."""
        return copy.copy(self)


def apply(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1) -> Tensor:
    """A layer on x, its weights cast to x's dtype: a convolution, or a matrix on the channels, of (B, C, h, w) or
    (..., C)."""
    weight, bias = weight.to(x), None if bias is None else bias.to(x)
    if x.dim() != 4:
        return F.linear(x, weight, bias)
    weight = weight[:, :, None, None] if weight.dim() == 2 else weight
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)
