"""The contract of a family: how its bases are read, conditioned, called and sampled. Importing it imports no torch.

A new kind of base (a class-conditional transformer, a flow-matching model) is one more subclass and one more row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...data.prompts import Prompt, PromptRule

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ...config import SampleConfig
    from ..noising import Noising

Rows = dict[str, "Tensor"]
"""Conditioning: named tensors whose first dimension goes over images."""


class Family(ABC):
    """What the rest of the code asks of a kind of base, and never decides by a family's name."""

    name: ClassVar[str]
    """In tuner files and protocols, e.g. "sd"."""
    pipeline: ClassVar[str]
    """The diffusers pipeline class of its folders."""
    denoiser_part: ClassVar[str]
    """The folder and pipeline component that holds the denoiser."""
    conditioner_parts: ClassVar[tuple[str, ...]]
    """Folders of the conditioning encoders; may be fewer in a given base."""
    loading: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of `DiffusionPipeline.from_pretrained`."""

    # ------------------------------------------------------------------------------------------ from configs alone

    @abstractmethod
    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a denoiser with this config is of the family."""

    @abstractmethod
    def check(self, config: Mapping[str, Any], latent_channels: int, base: str) -> None:
        """Raises `UsageError` for a base that looks like the family but cannot be trained on, before it is loaded."""

    @abstractmethod
    def build_denoiser(self, config: Mapping[str, Any]) -> nn.Module:
        """The denoiser with random weights, on torch's current default device."""

    def latent_size(self, config: Mapping[str, Any]) -> int:
        """The side of the latents that the base was trained on."""
        size = config["sample_size"]
        return size if isinstance(size, int) else size[0]

    def size_multiple(self, config: Mapping[str, Any], vae_scale: int) -> int:
        """What image sides must be divisible by; transformers add their patch size."""
        return max(8, vae_scale)

    def schedulers(self) -> Mapping[str, Any]:
        """The samplers that fit the noise schedule: names as in `SampleConfig` and diffusers' scheduler classes."""
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

        return {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}

    # ------------------------------------------------------------------------------------------------ conditioning

    def prompt_rule(self, trigger: str, template: str) -> Prompt:
        """The prompt of an image; a family that is conditioned on classes returns the class label instead."""
        return PromptRule(trigger, template)

    @abstractmethod
    def encode_prompts(self, pipe: Any, prompts: list[str]) -> Rows:
        """Conditioning rows of prompts, one row each. The null row is that of the empty prompt."""

    @abstractmethod
    def too_long(self, pipe: Any, prompt: str) -> bool:
        """Whether the prompt is longer than the conditioning encoder reads, so that its end would be ignored."""

    def size_rows(self, batch: int, size: int, device: torch.device) -> Rows:
        """Conditioning on the image size in pixels, for `batch` images; {} for bases without it."""
        return {}

    @abstractmethod
    def dummy_rows(self, config: Mapping[str, Any], batch: int, device: str | torch.device) -> Rows:
        """Rows of the right shapes with no meaning, for counting and timing; those of `size_rows` included."""

    # ------------------------------------------------------------------------------------- predicting and sampling

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, latents: Tensor, t: Tensor, rows: Mapping[str, Tensor],
        hints: Mapping[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """What the denoiser predicts (B, C, h, w) for noisy latents (B, C, h, w) at timesteps (B,).

        A learned variance is split off. `hints` (B, 3, H, W) reach the tuners through the denoiser's open channel.
        """

    @abstractmethod
    def sample(
        self, pipe: Any, noise: Tensor, rows: Rows, null: Rows, config: SampleConfig,
        hints: Mapping[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Latents (B, C, h, w) drawn from `noise` with the scheduler that `pipe` has, by the pipeline or an equal loop.

        `rows` has a conditioning row per image, `null` one for guidance; all on the denoiser's device and in its
        precision. The size is that of the noise; steps and guidance are the config's.
        """

    def noising(self, pipe: Any) -> Noising:
        """The forward process and training target of the base."""
        from ..noising import Noising

        return Noising(pipe.scheduler.config)
