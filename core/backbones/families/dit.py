"""DiT (Peebles & Xie 2023, arXiv 2212.09748): a class-conditional transformer over patches of latents.

Folders are diffusers' `DiTPipeline`, e.g. facebook/DiT-XL-2-256. The timestep and class embedders, which DiT has once,
are stored once per block there; `prepare` ties equal copies to one module again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...data.prompts import Prompt
from ...data.records import Record
from ...errors import UsageError, unknown
from .base import Family

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ...config import SampleConfig
    from .base import Rows


@dataclass(frozen=True)
class ClassRule:
    """The class label of an image; `name` for images without one. Picklable."""

    conditioned_on: ClassVar[str] = "class label"

    name: str = ""

    def __call__(self, record: Record) -> str:
        """The label of `record`; "" is the null class."""
        return record.label or self.name


class DiT(Family):
    """Rows: `label` (B,), class ids. The null class follows the base's classes, and a tuner's own follow the null."""

    name = "dit"
    pipeline = "DiTPipeline"
    denoiser_part = "transformer"
    conditioner_parts = ()
    parts = {  # noqa: RUF012 - a constant
        "blocks": r"^transformer_blocks\.\d+\.(?!norm1\.emb\.)",
        "attention": r"\.attn1\.to_(q|k|v|out\.0)$",
        "final_norm": r"^proj_out_1$",
        "whole": "",
    }
    adapted = ("blocks", "final_norm")
    grouped = r"^(transformer_blocks\.\d+\.attn1)\.to_[qkv]$"
    by_class = True
    guidance = 4.0
    bottleneck = 64

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """A `DiTTransformer2DModel`."""
        return config.get("_class_name") == "DiTTransformer2DModel"

    def check(self, config: Mapping[str, Any], latent_channels: int, base: str) -> None:
        """Refuses transformers without a class table, and those that take more than noisy latents."""
        if config.get("num_embeds_ada_norm") is None:
            raise UsageError(f"--base {base}: its transformer has no class table (num_embeds_ada_norm in its config).")
        if config.get("in_channels", latent_channels) != latent_channels:
            raise UsageError(
                f"--base {base}: its transformer takes {config['in_channels']} input channels, not only the "
                f"{latent_channels} of the noisy latents."
            )

    def build_denoiser(self, config: Mapping[str, Any]) -> nn.Module:
        """A `DiTTransformer2DModel`, its embedders tied."""
        from diffusers import DiTTransformer2DModel

        denoiser = DiTTransformer2DModel.from_config(dict(config))
        _tie(denoiser)
        return denoiser

    def prepare(self, denoiser: Any) -> None:
        """Ties the blocks' embedders to the first block's where all are equal; others stay as they are."""
        first = denoiser.transformer_blocks[0].norm1.emb
        if all(_equal(first, block.norm1.emb) for block in denoiser.transformer_blocks[1:]):
            _tie(denoiser)

    def stored(self, denoiser: Any) -> AbstractContextManager[None]:
        """Embedders of its own in each block."""
        return untied(denoiser)

    def size_multiple(self, config: Mapping[str, Any], vae_scale: int) -> int:
        """Latents must divide into patches."""
        return max(8, vae_scale * config["patch_size"])

    def token_layers(self, denoiser: Any) -> tuple[nn.Module, nn.Module]:
        """The patch embedding and the final linear layer."""
        return denoiser.pos_embed, denoiser.proj_out_2

    # ------------------------------------------------------------------------------------------------ conditioning

    def labels(self, pipe: Any) -> tuple[str, ...]:
        """The labels of model_index.json, in the order of their ids."""
        return tuple(sorted(pipe.labels, key=lambda label: pipe.labels[label]))

    def added(self, pipe: Any, prompts: Iterable[str]) -> tuple[str, ...]:
        """All labels that are neither the base's nor one of its ids."""
        null = pipe.transformer.config.num_embeds_ada_norm
        labels = set(prompts)
        ids = {label for label in labels if label.isdecimal() and int(label) <= null}
        return tuple(sorted(labels - set(pipe.labels) - ids - {""}))

    def table_id(self, pipe: Any, classes: Sequence[str]) -> tuple[str, ...]:
        """All labels with their ids."""
        return (json.dumps(class_ids(pipe, classes), sort_keys=True),)

    def prompt_rule(self, trigger: str, template: str) -> Prompt:
        """An image's class label; `trigger` names the class of images without one."""
        return ClassRule(trigger)

    def encode_prompts(self, pipe: Any, prompts: list[str], classes: Sequence[str] = ()) -> Rows:
        """{"label": (B,)} for class labels, or for ids written as digits; "" is the null class.

        `classes` have the ids after the null class. Raises `UsageError` for a class that is not there.
        """
        import torch

        known = class_ids(pipe, classes)
        return {"label": torch.tensor([class_id(prompt, known, pipe, classes) for prompt in prompts])}

    def too_long(self, pipe: Any, prompt: str) -> bool:
        """Labels are never too long."""
        return False

    def dummy_rows(self, config: Mapping[str, Any], batch: int, device: str | torch.device) -> Rows:
        """The first class."""
        import torch

        return {"label": torch.zeros(batch, dtype=torch.long, device=device)}

    # ------------------------------------------------------------------------------------- predicting and sampling

    def output(
        self, denoiser: nn.Module, latents: Tensor, t: Tensor, rows: Mapping[str, Tensor],
        channel: Mapping[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        """As in the contract; computed in the denoiser's precision. A class that no tuner adds is the null class."""
        options: dict[str, Any] = {"cross_attention_kwargs": dict(channel)} if channel else {}
        last = _last_row(denoiser)
        labels = rows["label"] if last is None else rows["label"].clamp(max=last)
        return denoiser(latents.to(denoiser.dtype), t, labels, return_dict=False, **options)[0]

    def sample(
        self, pipe: Any, noise: Tensor, rows: Rows, null: Rows, config: SampleConfig,
        channel: Mapping[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        """As in the contract. `DiTPipeline` takes neither noise nor a channel for tuners, so the loop is here."""
        import torch
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

        guidance = self.guidance if config.guidance is None else config.guidance
        scheduler, denoiser, guided = pipe.scheduler, pipe.transformer, guidance > 1
        scheduler.set_timesteps(config.steps, device=noise.device)
        latents, label = noise * scheduler.init_noise_sigma, rows["label"]
        if guided:
            label = torch.cat([null["label"].expand(len(noise)), label])
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, t)
            out = self.output(denoiser, inputs, t.expand(len(inputs)), {"label": label}, channel)
            out = out[:, : latents.shape[1]]
            if guided:
                unconditional, conditional = out.chunk(2)
                out = unconditional + guidance * (conditional - unconditional)
                if config.rescale:
                    out = rescale_noise_cfg(out, conditional, config.rescale)
            latents = scheduler.step(out, t, latents, return_dict=False)[0]
        return latents


def _last_row(denoiser: Any) -> int | None:
    """The last id of the class table that nobody extends; None where a tuner adds classes."""
    table = denoiser.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    return None if table._forward_pre_hooks else table.num_embeddings - 1


def class_ids(pipe: Any, classes: Sequence[str]) -> dict[str, int]:
    """Ids by label: the base's, then those of added `classes`, which follow the null class."""
    null = pipe.transformer.config.num_embeds_ada_norm
    return {**pipe.labels, **{label: null + 1 + number for number, label in enumerate(classes)}}


def class_id(prompt: str, known: Mapping[str, int], pipe: Any, classes: Sequence[str]) -> int:
    """The id of a label or of digits; that of the null class for "". Raises `UsageError` for others."""
    null = pipe.transformer.config.num_embeds_ada_norm
    if not prompt:
        return null
    if prompt in known:
        return known[prompt]
    if prompt.isdecimal():
        if int(prompt) <= null + len(classes):
            return int(prompt)
        added = f", {null + 1} to {null + len(classes)} of the tuner" if classes else ""
        raise UsageError(f"class {prompt} is out of range: 0 to {null - 1} of the base, {null} for none{added}.")
    if not known:
        raise UsageError(f"class '{prompt}': this base names no labels; give an id from 0 to {null - 1}.")
    raise unknown("class", prompt, known)


# --------------------------------------------------------------------------------------------------- tied embedders


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same weights, bit for bit."""
    import torch

    mine, theirs = one.state_dict(), other.state_dict()
    return one is other or all(torch.equal(mine[name], theirs[name]) for name in mine)


def _tie(denoiser: Any) -> None:
    for block in denoiser.transformer_blocks:
        block.norm1.emb = denoiser.transformer_blocks[0].norm1.emb


@contextmanager
def untied(denoiser: Any) -> Iterator[None]:
    """The denoiser with embedders of its own in each block, as diffusers stores it; tied again afterwards."""
    import copy

    first = denoiser.transformer_blocks[0].norm1.emb
    tied = [block for block in denoiser.transformer_blocks[1:] if block.norm1.emb is first]
    for block in tied:
        block.norm1.emb = copy.deepcopy(first)
    try:
        yield
    finally:
        for block in tied:
            block.norm1.emb = first
