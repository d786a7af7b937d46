"""The denoisers of well-known bases as diffusers configs: enough to count and measure without their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import unknown
from .bases import EMBEDDED, downsampling_factor, family_of_base, find_base, read_config
from .families import Family, family_of_denoiser
from .students import Student, read_student

if TYPE_CHECKING:
    from torch import nn

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
    "dit-xl-2": {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "sample_size": 32,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    },
}


@dataclass(frozen=True)
class Architecture:
    """A base's shapes: its denoiser's diffusers config and its autoencoder's downsampling factor."""

    name: str
    config: Mapping[str, Any]
    vae_scale: int
    student: Student | None = None

    @property
    def family(self) -> Family:
        """The family that its denoiser is of."""
        return family_of_denoiser(self.config)

    def denoiser(self, device: str = "meta") -> nn.Module:
        """The denoiser; on the meta device it has shapes and no storage, elsewhere random weights."""
        import torch

        with torch.device(device):
            denoiser = self.family.build_denoiser(self.config)
            return (self.student.shaped(denoiser, self.name) if self.student else denoiser).eval()


def architecture(base: str) -> Architecture:
    """The shapes of `base`: a known name, an embedded base, a folder or a downloaded hub id. Reads no weights.

    Raises `UsageError` for anything else, naming the nearest.
    """
    if base in KNOWN:
        return Architecture(base, KNOWN[base], 8)
    if base not in EMBEDDED and "/" not in base and not Path(base).expanduser().exists():
        raise unknown("base", base, [*KNOWN, *EMBEDDED])
    folder = find_base(base, offline=True)
    family = family_of_base(folder, base)
    denoiser, vae = (read_config(folder, part, base) for part in (family.denoiser_part, "vae"))
    return Architecture(base, denoiser, downsampling_factor(vae), read_student(folder))
