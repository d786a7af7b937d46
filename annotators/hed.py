"""Soft edges by HED, as ControlNet makes them (lllyasviel, annotator/hed; SCEdit's "HED" with `invert`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from ..core.devices import best_device, torch_dtype
from .base import Params
from .networks.models import ModelAnnotator, ModelSettings, kept, on_device
from .networks.weights import default


class EdgeSettings(ModelSettings):
    """Which network finds the edges."""

    model: str = Field(default("hed").name, description="hed, pidinet, or a .pth or .safetensors file of one of them")


class HedSettings(EdgeSettings):
    """The network and what is made of its edges."""

    safe: bool = Field(False, description="three levels, 0, 127 and 255, as ControlNet's safe mode")
    invert: bool = Field(False, description="black edges on white, as SCEdit's code has them")


class EdgeAnnotator(ModelAnnotator):
    """An annotator made of a network's soft edges."""

    half = "bf16"  # HED reads 0..255 and does not normalise: its activations pass fp16's largest value

    @property
    def network(self) -> Any:
        """The edge network, loaded once a process."""
        from .networks.edge_networks import load_edges

        def load() -> Any:
            return load_edges(self.weights.path).to(best_device(), torch_dtype(self.dtype))

        return kept(load, self.weights, self.dtype, best_device())

    def edges(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """float32 (H, W) in 0..1 of each uint8 (H, W, 3) picture, at its own size."""
        from .networks.edge_networks import soft_edges

        found: dict[int, np.ndarray] = {}
        for group in self.passes([(*image.shape[2:], *image.shape[:2]) for image in images]):
            made = soft_edges(self.network, on_device([images[i] for i in group]))
            found.update(zip(group, made.cpu().numpy(), strict=True))
        return [found[i] for i in range(len(images))]


class Hed(EdgeAnnotator):
    """Soft edges (H, W), white on black, 0..255."""

    name = "hed"
    version = "hed-1"
    Settings = HedSettings

    def maps(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, Params]]:
        """As in the contract."""
        settings = self.settings
        assert isinstance(settings, HedSettings)
        made = [to_bytes(safe_step(edge) if settings.safe else edge) for edge in self.edges(images)]
        return [(255 - map if settings.invert else map, {}) for map in made]


def safe_step(edge: np.ndarray, steps: int = 2) -> np.ndarray:
    """Edges 0..1 cut to `steps` + 1 levels (ControlNet's annotator/util.py)."""
    return (edge * (steps + 1)).astype(np.int32).astype(np.float32) / steps


def to_bytes(edge: np.ndarray) -> np.ndarray:
    """Edges 0..1 as uint8; fractions are cut off, not rounded, as published."""
    return (edge * 255).clip(0, 255).astype(np.uint8)
