"""Depth by a transformers model: near is white, each image normalised to 0..255 by itself, as ControlNet does."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from .base import Params
from .networks.models import ModelAnnotator, ModelSettings, Transformer, load_transformer
from .networks.weights import default

ARCHITECTURES = ("DepthAnythingForDepthEstimation", "DPTForDepthEstimation", "ZoeDepthForDepthEstimation")
FLAT = 1e-4
"""Depth whose range is below this share of its largest value counts as flat."""
NEAREST = 0.1
"""Metres. Nearer values are overshoots of the resampling; one such pixel would darken all others."""


class DepthSettings(ModelSettings):
    """Which network estimates depth."""

    model: str = Field(
        default("depth").name,
        description="depth-anything-v2-small, dpt-hybrid, dpt-large, zoedepth, ..., a folder or a hub id",
    )


class Depth(ModelAnnotator):
    """Relative inverse depth (H, W): 255 for the nearest, 0 for the farthest point of the image; 0 if it is flat."""

    name = "depth"
    version = "depth-1"
    Settings = DepthSettings

    @property
    def network(self) -> Transformer:
        """The depth network, loaded once per process."""
        what = f"--cond depth:model={self.network_settings.model}"
        return load_transformer(what, self.weights, self.dtype, ARCHITECTURES)

    def maps(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, Params]]:
        """As in the base class; the params say whether the network returned metres, which were inverted."""
        metric = is_metric(self.network.config)
        return [(normalise(depth, metric), {"metric": metric}) for depth in self.predictions(images)]

    def predictions(self, images: list[np.ndarray]) -> list[Any]:
        """The network's raw output, float32 (H, W) tensors on the device, at each image's size."""
        network = self.network
        kind = network.config.model_type
        # DPT accepts only its square, whatever its processor's settings say.
        values = network.pixel_values(images, **({"keep_aspect_ratio": False} if kind == "dpt" else {}))
        predictions: dict[int, Any] = {}
        for group in self.batches([value.shape for value in values]):
            outputs = network([values[i] for i in group])
            sizes = [images[i].shape[:2] for i in group]
            # Zoe's processor pads images, and needs their sizes to remove the padding.
            options = {"source_sizes" if kind == "zoedepth" else "target_sizes": sizes}
            results = network.processor.post_process_depth_estimation(outputs, **options)
            predictions.update({i: result["predicted_depth"] for i, result in zip(group, results, strict=True)})
        return [predictions[i] for i in range(len(images))]


def is_metric(config: Any) -> bool:
    """Whether a network returns metres (far is large) rather than relative inverse depth (near is large)."""
    return config.model_type == "zoedepth" or getattr(config, "depth_estimation_type", "relative") == "metric"


def normalise(depth: Any, metric: bool) -> np.ndarray:
    """uint8 (H, W) of a float tensor (H, W): minimum to 0, maximum to 255, truncated as in ControlNet.

    Metres are first inverted, to the quantity that the relative networks predict. Depth that varies only by a network's
    rounding counts as flat and becomes 0; normalising it would show noise.
    """
    if metric:
        depth = 1 / depth.clamp(min=NEAREST)
    low, high = depth.aminmax()
    span = high - low
    if span <= FLAT * max(abs(low), abs(high)):
        return np.zeros(tuple(depth.shape), np.uint8)
    return ((depth - low) / span * 255).clamp(0, 255).byte().cpu().numpy()
