"""The denoisers of well-known bases as diffusers configs: enough to count and measure without their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, unknown

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

KNOWN: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@dataclass(frozen=True)
class Architecture:
    """A base's shapes: the U-Net's diffusers config and the pixels to one latent pixel along a side."""

    name: str
    config: Mapping[str, Any]
    vae_scale: int

    @property
    def family(self) -> str:
        """Its family, "sd" or "sdxl"."""
        return family(self.config)

    def denoiser(self, device: str = "meta") -> UNet2DConditionModel:
        """The U-Net; on the meta device it has shapes and no storage, elsewhere random weights."""
        import torch
        from diffusers import UNet2DConditionModel

        with torch.device(device):
            return UNet2DConditionModel.from_config(dict(self.config)).eval()


def family(config: Mapping[str, Any]) -> str:
    """ "sdxl" for a U-Net with SDXL's pooled text and size conditioning, else "sd"."""
    return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd"


def architecture(base: str) -> Architecture:
    """The shapes of `base`: sd15, sd21, sdxl, mini, a diffusers folder or a downloaded hub id. Reads no weights.

    Raises `UsageError` for what is none of them, naming the nearest.
    """
    if base in KNOWN:
        return Architecture(base, KNOWN[base], 8)
    if base != "mini" and "/" not in base and not Path(base).expanduser().exists():
        raise unknown("base", base, [*KNOWN, "mini"])
    from .bases import locate

    folder = locate(base, offline=True)
    try:
        unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
        return Architecture(base, unet, 2 ** (len(vae["block_out_channels"]) - 1))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--base {base}: unet/config.json and vae/config.json cannot be read ({error}).") from error
