"""Stable Diffusion XL: two text encoders, a pooled text row, and conditioning on size and crop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .sd import StableDiffusion

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .base import Rows

SIZES = 6
"""Numbers of SDXL's size conditioning: original size, crop corner, target size."""


class StableDiffusionXL(StableDiffusion):
    """Rows: `prompt_embeds` (B, L, D), `pooled` (B, P), `time_ids` (B, 6)."""

    name = "sdxl"
    pipeline = "StableDiffusionXLPipeline"
    conditioner_parts = ("text_encoder", "text_encoder_2")
    loading = {}  # noqa: RUF012 - a constant

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """A U-Net with SDXL's pooled text and size conditioning."""
        return config.get("addition_embed_type") == "text_time"

    def encode_prompts(self, pipe: Any, prompts: list[str], classes: Sequence[str] = ()) -> Rows:
        """{"prompt_embeds": (B, L, D), "pooled": (B, P)}."""
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts, device=pipe.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled": pooled}

    def size_rows(self, batch: int, size: int, device: torch.device) -> Rows:
        """{"time_ids": (B, 6)}: original size, crop corner, target size; square images, not cropped."""
        import torch

        ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32, device=device)
        return {"time_ids": ids.repeat(batch, 1)}

    def dummy_rows(self, config: Mapping[str, Any], batch: int, device: str | torch.device) -> Rows:
        """Zeros; the width of the pooled row is what the size conditioning leaves of the projection's input."""
        import torch

        pooled = config["projection_class_embeddings_input_dim"] - SIZES * config["addition_time_embed_dim"]
        return {
            **super().dummy_rows(config, batch, device),
            "pooled": torch.zeros(batch, pooled, device=device),
            "time_ids": torch.zeros(batch, SIZES, device=device),
        }

    def further_arguments(self, rows: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """Pooled text and sizes."""
        return {"added_cond_kwargs": {"text_embeds": rows["pooled"].to(dtype), "time_ids": rows["time_ids"]}}

    def pipeline_conditioning(self, rows: Rows, null: Rows, count: int) -> dict[str, Any]:
        """As for Stable Diffusion, with the pooled row; the pipeline makes the sizes itself."""
        return {
            **super().pipeline_conditioning(rows, null, count),
            "pooled_prompt_embeds": rows["pooled"],
            "negative_pooled_prompt_embeds": null["pooled"].expand(count, -1),
        }
