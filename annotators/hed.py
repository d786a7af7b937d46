"""Soft edges by HED, as ControlNet makes them (lllyasviel, annotator/hed; SCEdit's "HED" with `invert`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from ..core.devices import best_device, torch_dtype
from .base import Params
from .networks.models import ModelAnnotator, ModelSettings, load_once, to_device
from .networks.weights import default


class EdgeSettings(ModelSettings):
    """Which network finds the edges."""

    model: str = Field(default("hed").name, description="hed, pidinet, or a .pth or .safetensors file of one of them")


class HedSettings(EdgeSettings):
    """The network and how its edges are stored."""

    safe: bool = Field(False, description="only the levels 0, 127 and 255, as in ControlNet's safe mode")
    invert: bool = Field(False, description="black edges on white, as in SCEdit's code")


class EdgeAnnotator(ModelAnnotator):
    """An annotator based on a network's soft edges."""

    half = "bf16"  # HED reads 0..255 without normalisation: its activations overflow fp16

    @property
    def network(self) -> Any:
        """The edge network, loaded once per process."""
        from .networks.edge_networks import load_edges

        def load() -> Any:
            return load_edges(self.weights.path).to(best_device(), torch_dtype(self.dtype))

        return load_once(load, self.weights, self.dtype, best_device())

    def edges(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """float32 (H, W) in 0..1 of each uint8 (H, W, 3) image, at its own size."""
        from .networks.edge_networks import soft_edges

        edges: dict[int, np.ndarray] = {}
        for group in self.batches([(*image.shape[2:], *image.shape[:2]) for image in images]):
            batch = soft_edges(self.network, to_device([images[i] for i in group]))
            edges.update(zip(group, batch.cpu().numpy(), strict=True))
        return [edges[i] for i in range(len(images))]


class Hed(EdgeAnnotator):
    """Soft edges (H, W), white on black, 0..255."""

    name = "hed"
    version = "hed-1"
    Settings = HedSettings

    def maps(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, Params]]:
        """As in the base class."""
        settings = self.settings
        assert isinstance(settings, HedSettings)
        maps = [to_bytes(safe_step(edge) if settings.safe else edge) for edge in self.edges(images)]
        return [(255 - map if settings.invert else map, {}) for map in maps]


def safe_step(edge: np.ndarray, steps: int = 2) -> np.ndarray:
    """Edges 0..1 quantised to `steps` + 1 levels (ControlNet's annotator/util.py)."""
    return (edge * (steps + 1)).astype(np.int32).astype(np.float32) / steps


def to_bytes(edge: np.ndarray) -> np.ndarray:
    """Edges 0..1 as uint8; truncated, not rounded, as published."""
    return (edge * 255).clip(0, 255).astype(np.uint8)
