"""The contract of a family: how its bases are read, conditioned, called and sampled. Importing it imports no torch.

A new kind of base (a class-conditional transformer, a flow-matching model) is one more subclass and one more row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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

    def prepare(self, denoiser: nn.Module) -> None:  # noqa: B027 - most need nothing
        """Brings a denoiser into the form that this project uses, with the same weights and outputs."""

    def stored(self, denoiser: nn.Module) -> AbstractContextManager[Any]:
        """The denoiser in the form that diffusers stores, inside; as `prepare` made it, outside."""
        return nullcontext()

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

    # ------------------------------------------------------------------------------------------- where tuners act

    parts: ClassVar[Mapping[str, str]] = {}
    """Named groups of linear and convolutional layers: a regular expression over layer names for each."""
    adapted: ClassVar[tuple[str, ...]] = ()
    """The parts that layer methods adapt when none are chosen."""
    grouped: ClassVar[str] = ""
    """A regular expression for layers that are one fused layer in the original, told apart by their first group."""
    bottleneck: ClassVar[int] = 32
    """The width of DiffScaler's low-rank branch when none is chosen."""

    def token_layers(self, denoiser: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        """The modules that make tokens (B, L, D) of latents and give tokens back at the end; None without tokens."""
        return None

    # ------------------------------------------------------------------------------------------------ conditioning

    guidance: ClassVar[float] = 7.5
    """The classifier-free guidance when none is given: that of the family's diffusers pipeline."""
    by_class: ClassVar[bool] = False
    """Conditioned on class labels instead of text."""

    def labels(self, pipe: Any) -> tuple[str, ...]:
        """The class labels that the base knows; () for bases that are conditioned on text."""
        return ()

    def added(self, pipe: Any, prompts: Iterable[str]) -> tuple[str, ...]:
        """The labels among `prompts` that the base does not know, sorted: classes for a tuner to add."""
        return ()

    def table_id(self, pipe: Any, classes: Sequence[str]) -> tuple[str, ...]:
        """Identity of the class table: rows of another one must not be mixed with these."""
        return ()

    def prompt_rule(self, trigger: str, template: str) -> Prompt:
        """The prompt of an image; a family that is conditioned on classes returns the class label instead."""
        return PromptRule(trigger, template)

    @abstractmethod
    def encode_prompts(self, pipe: Any, prompts: list[str], classes: Sequence[str] = ()) -> Rows:
        """Conditioning rows of prompts, one row each. The null row is that of the empty prompt.

        `classes` are labels that a tuner adds to those of a class-conditional base.
        """

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
    def output(
        self, denoiser: nn.Module, latents: Tensor, t: Tensor, rows: Mapping[str, Tensor],
        channel: Mapping[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        """All that the denoiser returns for noisy latents (B, C, h, w) at timesteps (B,): (B, C or 2C, h, w).

        The second half of the channels, where there is one, is a learned variance. `channel` is what the tuners get
        through the denoiser's open channel; see `sites.wiring`.
        """

    def predict(
        self, denoiser: nn.Module, latents: Tensor, t: Tensor, rows: Mapping[str, Tensor],
        hints: Mapping[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """What the denoiser predicts (B, C, h, w), without a learned variance; `hints` are (B, 3, H, W) in 0..1."""
        channel = {"hint": hints} if hints else None
        return self.output(denoiser, latents, t, rows, channel)[:, : latents.shape[1]]

    @abstractmethod
    def sample(
        self, pipe: Any, noise: Tensor, rows: Rows, null: Rows, config: SampleConfig,
        channel: Mapping[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        """Latents (B, C, h, w) drawn from `noise` with the scheduler that `pipe` has, by the pipeline or an equal loop.

        `rows` has a conditioning row per image, `null` one for guidance; all on the denoiser's device and in its
        precision. The size is that of the noise; steps and guidance, which is given, are the config's. `channel` as for
        `output`.
        """

    def noising(self, pipe: Any) -> Noising:
        """The forward process and training target of the base."""
        from ..noising import Noising

        return Noising(pipe.scheduler.config)
