"""Stable Diffusion 1.x and 2.x and look-alikes: a U-Net that attends to one text encoder's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from .base import Family

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ...config import SampleConfig
    from .base import Rows

TOKENS = 77
"""Rows of a prompt that a CLIP text encoder gives."""


class StableDiffusion(Family):
    """Rows: `prompt_embeds` (B, L, D)."""

    name = "sd"
    pipeline = "StableDiffusionPipeline"
    denoiser_part = "unet"
    conditioner_parts = ("text_encoder",)
    loading = {  # noqa: RUF012 - a constant
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    parts = {  # noqa: RUF012 - a constant
        "down_blocks": r"^down_blocks\.",
        "mid_block": r"^mid_block\.",
        "up_blocks": r"^up_blocks\.",
        "attention": r"\.attn[12]\.to_(q|k|v|out\.0)$",
        "whole": "",
    }
    adapted = ("down_blocks",)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """A text-conditional U-Net without SDXL's extra conditioning."""
        unet = config.get("_class_name", "UNet2DConditionModel") == "UNet2DConditionModel"
        return unet and config.get("addition_embed_type") != "text_time"

    def check(self, config: Mapping[str, Any], latent_channels: int, base: str) -> None:
        """Refuses U-Nets that take more than noisy latents: inpainting (9 channels), depth (5), InstructPix2Pix (8)."""
        channels = config.get("in_channels", latent_channels)
        if channels == latent_channels:
            return
        kind = "an inpainting base" if channels == 2 * latent_channels + 1 else "a base with image inputs of its own"
        raise UsageError(
            f"--base {base} is {kind}: its U-Net takes {channels} input channels, not only the {latent_channels} of "
            "the noisy latents. Use the text-to-image base that it was made from; --cond mask gives it inpainting."
        )

    def build_denoiser(self, config: Mapping[str, Any]) -> nn.Module:
        """A `UNet2DConditionModel`."""
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_config(dict(config))

    def encode_prompts(self, pipe: Any, prompts: list[str], classes: Sequence[str] = ()) -> Rows:
        """{"prompt_embeds": (B, L, D)}."""
        embeds, _ = pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)
        return {"prompt_embeds": embeds}

    def too_long(self, pipe: Any, prompt: str) -> bool:
        """Whether any of the tokenizers would cut the prompt."""
        length = len(prompt.encode()) + 2  # at most one token per byte, and those of start and end
        tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
        return any(
            length > tokenizer.model_max_length
            and len(tokenizer(prompt, truncation=False, verbose=False).input_ids) > tokenizer.model_max_length
            for tokenizer in tokenizers
            if tokenizer is not None
        )

    def dummy_rows(self, config: Mapping[str, Any], batch: int, device: str | torch.device) -> Rows:
        """Zeros."""
        import torch

        return {"prompt_embeds": torch.zeros(batch, TOKENS, config["cross_attention_dim"], device=device)}

    def output(
        self, denoiser: nn.Module, latents: Tensor, t: Tensor, rows: Mapping[str, Tensor],
        channel: Mapping[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        """As in the contract; computed in the denoiser's precision."""
        dtype = denoiser.dtype
        options: dict[str, Any] = {"cross_attention_kwargs": dict(channel)} if channel else {}
        options |= self.further_arguments(rows, dtype)
        embeds = rows["prompt_embeds"].to(dtype)
        return denoiser(latents.to(dtype), t, embeds, return_dict=False, **options)[0]

    def further_arguments(self, rows: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """The denoiser's conditioning besides the prompt."""
        return {}

    def sample(
        self, pipe: Any, noise: Tensor, rows: Rows, null: Rows, config: SampleConfig,
        channel: Mapping[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        """As in the contract."""
        options = {"cross_attention_kwargs": dict(channel)} if channel else {}
        return pipe(
            height=noise.shape[-2] * pipe.vae_scale_factor,
            width=noise.shape[-1] * pipe.vae_scale_factor,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            guidance_rescale=config.rescale,
            latents=noise,
            output_type="latent",
            return_dict=False,
            **self.pipeline_conditioning(rows, null, len(noise)),
            **options,
        )[0]

    def pipeline_conditioning(self, rows: Rows, null: Rows, count: int) -> dict[str, Any]:
        """Conditioning as the pipeline's keyword arguments."""
        return {
            "prompt_embeds": rows["prompt_embeds"],
            "negative_prompt_embeds": null["prompt_embeds"].expand(count, -1, -1),
        }
