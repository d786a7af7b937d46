"""A frozen base as one value: denoiser, autoencoder, conditioning encoder, noise schedule and identity.

Loaded from any diffusers-format folder, a hub id, or an embedded base. Everything is `requires_grad=False`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ..errors import SctoolError, UsageError
from .bases import (
    content_hash,
    downsampling_factor,
    family_of_base,
    find_base,
    licence,
    read_config,
    weight_files,
)
from .families import Family
from .students import NAME as STUDENT
from .students import REMEDY, Student, read_student

if TYPE_CHECKING:
    from .families.base import Rows
    from .noising import Noising

for _logging in (diffusers_logging, transformers_logging):  # their progress bars would break ours
    _logging.set_verbosity_error()
    _logging.disable_progress_bar()


@dataclass
class Backbone:
    """A frozen diffusion model in diffusers' parts.

    `id` is what the user gave, `hash` the SHA-256 over the denoiser's weight files: two folders with the same
    weights are the same backbone.
    """

    id: str
    hash: str
    family: Family
    licence: str
    vae_hash: str
    conditioner_hash: str
    pipe: DiffusionPipeline = field(repr=False)
    classes: tuple[str, ...] = ()
    """Labels that a tuner adds to those of a class-conditional base."""
    student: Student | None = None
    """How it was made of another base, its teacher."""

    def with_classes(self, classes: Iterable[str]) -> Backbone:
        """The same base with other added classes; both share all weights."""
        return replace(self, classes=tuple(classes))

    @property
    def ancestors(self) -> tuple[str, ...]:
        """The hashes of the bases that it is a student of, whose tuners it takes."""
        return self.student.ancestors if self.student else ()

    @property
    def denoiser(self) -> nn.Module:
        """The network that is tuned, e.g. a `UNet2DConditionModel`."""
        return getattr(self.pipe, self.family.denoiser_part)

    @contextmanager
    def replaced(self, denoiser: nn.Module) -> Iterator[None]:
        """Another denoiser inside, the base's own outside."""
        own = self.denoiser
        self.pipe.register_modules(**{self.family.denoiser_part: denoiser})
        try:
            yield
        finally:
            self.pipe.register_modules(**{self.family.denoiser_part: own})

    @property
    def vae(self) -> nn.Module:
        """The `AutoencoderKL`."""
        return self.pipe.vae

    @property
    def vae_scale(self) -> int:
        """The autoencoder's downsampling factor (8 for Stable Diffusion)."""
        return downsampling_factor(self.vae.config)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent (4 for Stable Diffusion)."""
        return self.vae.config.latent_channels

    @property
    def resolution(self) -> int:
        """The image side in pixels that the base was trained at."""
        return self.family.latent_size(self.denoiser.config) * self.vae_scale

    def check_size(self, size: int) -> None:
        """Raises `UsageError` for an image side that the base cannot take."""
        multiple = self.family.size_multiple(self.denoiser.config, self.vae_scale)
        if size % multiple:
            below = size // multiple * multiple
            nearest = " or ".join(str(side) for side in (below, below + multiple) if side)
            raise UsageError(f"size={size} is not divisible by {multiple}, as the base requires. Use {nearest}.")

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.denoiser.device

    @property
    def latents_id(self) -> tuple[str, ...]:
        """Identity of the autoencoder and its precision: latents of another must not be mixed with these."""
        return self.vae_hash, str(self.vae.dtype)

    @property
    def conditioning_id(self) -> tuple[str, ...]:
        """Identity of the conditioning encoder and its precision."""
        encoder = getattr(self.pipe, "text_encoder", None)
        dtype = str(encoder.dtype if encoder is not None else torch.float32)
        return self.conditioner_hash, dtype, *self.family.table_id(self.pipe, self.classes)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class labels of a class-conditional base."""
        return self.family.labels(self.pipe)

    def noising(self) -> Noising:
        """The forward process of the base's own noise schedule, and the training target."""
        return self.family.noising(self.pipe)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Latent mean and standard deviation, scaled as the denoiser takes them: two float32 (B, C, h, w).

        `pixels` is (B, 3, H, W) in -1..1 with sides divisible by `vae_scale`.
        """
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        shift, scale = self._latent_scaling
        return ((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images as uint8 (B, 3, H, W) from scaled latents (B, C, h, w)."""
        shift, scale = self._latent_scaling
        latents = latents.to(self.vae.device, torch.float32) / scale + shift
        pixels = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    @property
    def _latent_scaling(self) -> tuple[float, float]:
        return getattr(self.vae.config, "shift_factor", None) or 0.0, self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Rows:
        """Conditioning rows of prompts; see `Family.encode_prompts`."""
        return self.family.encode_prompts(self.pipe, prompts, self.classes)

    def too_long(self, prompt: str) -> bool:
        """Whether the prompt is longer than the conditioning encoder reads, so that its end is ignored."""
        return self.family.too_long(self.pipe, prompt)

    def free_encoders(self) -> None:
        """Drops the conditioning encoders and moves the autoencoder to the CPU, once latents and rows are cached."""
        self.vae.to("cpu", torch.float32)  # CPUs are slow in bfloat16, and from here on it has little to do
        for name in self.family.conditioner_parts:
            if getattr(self.pipe, name, None) is not None:
                self.pipe.register_modules(**{name: None})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def autoencoder_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 on GPUs that have it, float32 elsewhere. Never float16: SDXL's autoencoder overflows in it.

    bfloat16 has float32's range. What it costs in image quality is measured in docs/log.md.
    """
    cuda = torch.device(device).type == "cuda"
    return torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32


def load_backbone(
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    vae_dtype: torch.dtype | None = None,
    offline: bool = False,
    encoders_only: bool = False,
) -> Backbone:
    """Loads and freezes a base: an embedded one by name, a diffusers-format folder or a hub id.

    Weights are read from safetensors only. `dtype` is the denoiser's; the autoencoder's is `autoencoder_dtype` unless
    given; conditioning encoders, used once per caption, stay in float32. With `encoders_only` the denoiser has a shape
    but neither weights nor a hash, which saves most of the memory and the time.
    Raises `UsageError` or `SctoolError` that say what is missing; a base that is not supported is refused before any
    weights are read.
    """
    folder = find_base(base, offline)
    family = family_of_base(folder, base)
    vae_config = read_config(folder, "vae", base)
    family.check(read_config(folder, family.denoiser_part, base), vae_config.get("latent_channels", 4), base)
    files = weight_files(folder, family.denoiser_part)
    if not files:
        raise UsageError(
            f"--base {base}: {family.denoiser_part}/ has no .safetensors weights. Re-save the base with safetensors."
        )
    options: dict[str, Any] = {
        "dtype": {
            family.denoiser_part: dtype,
            "vae": autoencoder_dtype(device) if vae_dtype is None else vae_dtype,
            "default": torch.float32,
        },
        "use_safetensors": True,
        "local_files_only": True,
        **family.loading,
    }
    if all(".fp16." in file.name for file in files):
        options["variant"] = "fp16"
    student = read_student(folder)
    if encoders_only:
        with torch.device("meta"):
            options[family.denoiser_part] = family.build_denoiser(read_config(folder, family.denoiser_part, base))
    elif student and student.ranks:
        options[family.denoiser_part] = load_thin(folder, family, student, base).to(dtype)
    try:
        pipe = DiffusionPipeline.from_pretrained(str(folder), **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise SctoolError(f"--base {base} cannot be loaded: {str(error).splitlines()[0]}") from error
    if not encoders_only:
        family.prepare(getattr(pipe, family.denoiser_part))
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
            if encoders_only and part is not getattr(pipe, family.denoiser_part):
                part.to(device)
    conditioners = [name for name in family.conditioner_parts if (folder / name).is_dir()]
    denoiser_hash = "" if encoders_only else content_hash(folder, family.denoiser_part)
    return Backbone(
        id=base,
        hash=denoiser_hash,
        family=family,
        licence=licence(folder),
        vae_hash=content_hash(folder, "vae"),
        conditioner_hash=content_hash(folder, *conditioners) if conditioners else denoiser_hash,
        pipe=pipe,
        student=student,
    )


def load_thin(folder: Path, family: Family, student: Student, base: str) -> nn.Module:
    """A student's denoiser, its low-rank layers included. Raises `SctoolError` for weights that do not fit."""
    from accelerate import init_empty_weights
    from safetensors.torch import load_file

    with init_empty_weights(include_buffers=False):
        denoiser = student.shaped(family.build_denoiser(read_config(folder, family.denoiser_part, base)), base)
    weights: dict[str, Tensor] = {}
    try:
        for file in weight_files(folder, family.denoiser_part):
            weights |= load_file(file)
        denoiser.load_state_dict(weights, assign=True)
    except Exception as error:  # safetensors and torch have several kinds
        reason = str(error).splitlines()[-1].strip()
        raise SctoolError(
            f"--base {base}: the weights in {family.denoiser_part}/ do not fit {STUDENT} ({reason}). {REMEDY}"
        ) from error
    return denoiser
