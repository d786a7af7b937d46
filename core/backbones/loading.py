"""A frozen model as one value: denoiser, autoencoder, text encoder, noise scheduler and identity.

Loaded from any diffusers-format folder, a hub id, or the embedded base `mini`. Everything is `requires_grad=False`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ..errors import SctoolError, UsageError
from .bases import content_hash, licence, locate, weight_files

MODEL_TYPES = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}

for _logging in (diffusers_logging, transformers_logging):  # their progress bars would break ours
    _logging.set_verbosity_error()
    _logging.disable_progress_bar()


@dataclass
class Backbone:
    """A frozen diffusion model in diffusers' parts.

    `id` is what the user gave, `hash` the SHA-256 over the denoiser's weight files: two folders with the same
    weights are the same backbone. `family` is "sd" (SD 1.x, 2.x and look-alikes) or "sdxl".
    """

    id: str
    hash: str
    family: str
    licence: str
    vae_hash: str
    text_hash: str
    pipe: DiffusionPipeline = field(repr=False)

    @property
    def denoiser(self) -> torch.nn.Module:
        """The `UNet2DConditionModel`."""
        return self.pipe.unet

    @property
    def vae(self) -> torch.nn.Module:
        """The `AutoencoderKL`."""
        return self.pipe.vae

    @property
    def vae_scale(self) -> int:
        """Pixels to one latent pixel along a side (8 for Stable Diffusion)."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent (4 for Stable Diffusion)."""
        return self.denoiser.config.in_channels

    @property
    def latents_id(self) -> tuple[str, ...]:
        """Identity of the autoencoder and its precision, for cache keys."""
        return self.vae_hash, str(self.vae.dtype)

    @property
    def conditioning_id(self) -> tuple[str, ...]:
        """Identity of the text encoders and their precision, for cache keys."""
        return self.text_hash, str(getattr(self.pipe.text_encoder, "dtype", torch.float32))

    @property
    def resolution(self) -> int:
        """The side, in pixels, that the base was trained at."""
        size = self.denoiser.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.vae_scale

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: "epsilon", "v_prediction" or "sample"."""
        return self.pipe.scheduler.config.prediction_type

    @property
    def device(self) -> torch.device:
        """Where the denoiser lies."""
        return self.denoiser.device

    def training_scheduler(self) -> DDPMScheduler:
        """The forward process q(x_t | x_0) of the base's own noise schedule."""
        return DDPMScheduler.from_config(self.pipe.scheduler.config)

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latent mean and standard deviation, scaled as the denoiser takes them: two float32 (B, C, h, w).

        `pixels` is (B, 3, H, W) in -1..1 with sides divisible by `vae_scale`.
        """
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        shift, scale = getattr(self.vae.config, "shift_factor", None) or 0.0, self.vae.config.scaling_factor
        return ((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures as uint8 (B, 3, H, W) from scaled latents (B, C, h, w)."""
        shift, scale = getattr(self.vae.config, "shift_factor", None) or 0.0, self.vae.config.scaling_factor
        latents = latents.to(self.vae.device, torch.float32) / scale + shift
        pixels = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    @torch.no_grad()
    def encode_prompts(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """The captions as the denoiser takes them: {"prompt_embeds": (B, L, D)} and, for SDXL, "pooled" (B, P)."""
        device = self.pipe.text_encoder.device
        if self.family == "sdxl":
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                captions, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            return {"prompt_embeds": embeds, "pooled": pooled}
        embeds, _ = self.pipe.encode_prompt(captions, device, 1, False)
        return {"prompt_embeds": embeds}

    def too_long(self, prompt: str) -> bool:
        """Whether a text encoder would cut the prompt, because it has more tokens than the encoder reads."""
        tokenizers = [getattr(self.pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
        return any(
            len(tokenizer(prompt, truncation=False).input_ids) > tokenizer.model_max_length
            for tokenizer in tokenizers
            if tokenizer is not None
        )

    def time_ids(self, batch: int, size: int) -> torch.Tensor | None:
        """SDXL's micro-conditioning (original size, crop corner, target size) as (B, 6); None for other bases."""
        if self.family != "sdxl":
            return None
        return torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32, device=self.device).repeat(batch, 1)

    def free_encoders(self) -> None:
        """Drops the text encoders and moves the autoencoder to the CPU, once latents and text are cached."""
        self.vae.to("cpu")
        for name in ("text_encoder", "text_encoder_2"):
            if getattr(self.pipe, name, None) is not None:
                self.pipe.register_modules(**{name: None})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_backbone(
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    offline: bool = False,
) -> Backbone:
    """Loads and freezes a base.

    `base` is "mini", a diffusers-format folder or a hub id. Weights are read from safetensors only. `dtype` is the
    denoiser's; the autoencoder and the text encoders, used once a picture, stay in float32.
    Raises `UsageError` or `SctoolError` that say what is missing.
    """
    folder = locate(base, offline)
    try:
        kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--base {base}: its model_index.json cannot be read ({error}).") from error
    if kind not in MODEL_TYPES:
        raise UsageError(f"--base {base} is a {kind}; supported are {', '.join(MODEL_TYPES)}.")
    files = weight_files(folder, "unet")
    if not files:
        raise UsageError(f"--base {base}: unet/ holds no .safetensors weights. Re-save the base with safetensors.")
    options: dict[str, Any] = {
        "dtype": {"unet": dtype, "default": torch.float32},
        "use_safetensors": True,
        "local_files_only": True,
    }
    if all(".fp16." in f.name for f in files):
        options["variant"] = "fp16"
    if kind == "StableDiffusionPipeline":
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        pipe = DiffusionPipeline.from_pretrained(str(folder), **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise SctoolError(f"--base {base} cannot be loaded: {str(error).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipe.to(device)
    text = [name for name in ("text_encoder", "text_encoder_2") if (folder / name).is_dir()]
    return Backbone(
        id=base,
        hash=content_hash(folder, "unet"),
        family=MODEL_TYPES[kind],
        licence=licence(folder),
        vae_hash=content_hash(folder, "vae"),
        text_hash=content_hash(folder, *text),
        pipe=pipe,
    )
