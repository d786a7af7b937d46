"""Depth by a transformers model: near is white, each picture stretched to 0..255 by itself, as ControlNet does."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from .base import Params
from .networks.models import ModelAnnotator, ModelSettings, Transformer, load_transformer
from .networks.weights import default

ARCHITECTURES = ("DepthAnythingForDepthEstimation", "DPTForDepthEstimation", "ZoeDepthForDepthEstimation")
FLAT = 1e-4
"""Depth that varies by less than this share of itself is flat."""
NEAREST = 0.1
"""Metres; what resampling puts nearer than this is an overshoot, and one such pixel would darken all others."""


class DepthSettings(ModelSettings):
    """Which network sees depth."""

    model: str = Field(
        default("depth").name,
        description="depth-anything-v2-small, dpt-hybrid, dpt-large, zoedepth, ..., a folder or a hub id",
    )


class Depth(ModelAnnotator):
    """Relative inverse depth (H, W): 255 the nearest, 0 the farthest point of the picture; 0 where all is equal."""

    name = "depth"
    version = "depth-1"
    Settings = DepthSettings

    @property
    def network(self) -> Transformer:
        """The depth network, loaded once a process."""
        what = f"--cond depth:model={self.network_settings.model}"
        return load_transformer(what, self.weights, self.dtype, ARCHITECTURES)

    def maps(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, Params]]:
        """As in the contract; the params say whether the network's metres were inverted."""
        metric = is_metric(self.network.config)
        return [(normalised(depth, metric), {"metric": metric}) for depth in self.predictions(images)]

    def predictions(self, images: list[np.ndarray]) -> list[Any]:
        """The network's own values, float32 (H, W) tensors on the device, at each picture's size."""
        network = self.network
        kind = network.config.model_type
        # DPT takes no other shape than its square, whatever its processor's settings say.
        values = network.pixel_values(images, **({"keep_aspect_ratio": False} if kind == "dpt" else {}))
        found: dict[int, Any] = {}
        for group in self.passes([value.shape for value in values]):
            outputs = network([values[i] for i in group])
            sizes = [images[i].shape[:2] for i in group]
            # Zoe's processor pads pictures, and takes that away again by their sizes.
            named = {"source_sizes" if kind == "zoedepth" else "target_sizes": sizes}
            made = network.processor.post_process_depth_estimation(outputs, **named)
            found.update({i: one["predicted_depth"] for i, one in zip(group, made, strict=True)})
        return [found[i] for i in range(len(images))]


def is_metric(config: Any) -> bool:
    """Whether a network gives metres (far is large) and not relative inverse depth (near is large)."""
    return config.model_type == "zoedepth" or getattr(config, "depth_estimation_type", "relative") == "metric"


def normalised(depth: Any, metric: bool) -> np.ndarray:
    """uint8 (H, W) of a float tensor (H, W): least to 0, greatest to 255, fractions cut off as in ControlNet.

    Metres are first inverted, which gives the quantity that the relative networks predict. Depth that varies by no
    more than a network's rounding is flat, 0 everywhere; stretching it would show noise.
    """
    if metric:
        depth = 1 / depth.clamp(min=NEAREST)
    low, high = depth.aminmax()
    span = high - low
    if span <= FLAT * max(abs(low), abs(high)):
        return np.zeros(tuple(depth.shape), np.uint8)
    return ((depth - low) / span * 255).clamp(0, 255).byte().cpu().numpy()
