"""How far a merged tuner is from the tuners that it replaces: the denoiser's output on a fixed batch, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones.loading import Backbone
from ..sites.attaching import channel, tuned
from ..tuners.base import Tuner

SEED = 0
SHARES = (0.99, 0.7, 0.4, 0.1)
"""Of the noise schedule: where the batch's samples are."""
PROMPTS = ("", "a photo", "a drawing of a house by the sea", "red and blue")


@dataclass(frozen=True)
class MergeError:
    """Absolute differences of the denoiser's output, whose values are of the size of 1.

    `effect` is the mean absolute change that the tuners make to the base's output, for comparison.
    """

    largest: float
    mean: float
    effect: float

    @classmethod
    def between(cls, found: Sequence[Tensor], expected: Sequence[Tensor], base: Sequence[Tensor]) -> MergeError:
        """Of outputs `found` instead of `expected`, where the base alone gives `base`."""
        differences = [(ours - theirs).abs() for ours, theirs in zip(found, expected, strict=True)]
        effects = [(ours - theirs).abs().mean().item() for ours, theirs in zip(base, expected, strict=True)]
        return cls(
            max(one.max().item() for one in differences),
            sum(one.mean().item() for one in differences) / len(differences),
            sum(effects) / len(effects),
        )


@dataclass(frozen=True)
class Batch:
    """Noise at four timesteps, conditioning, and every set of hints that is compared."""

    latents: Tensor
    t: Tensor
    rows: Mapping[str, Tensor]
    hints: Sequence[Mapping[str, Tensor] | None]


def fixed_batch(backbone: Backbone, conditions: Sequence[str], classes: Sequence[str] = ()) -> Batch:
    """The same at every call: without hints, with each condition alone, and with all."""
    generator, device = torch.Generator().manual_seed(SEED), backbone.device
    side = backbone.resolution // backbone.vae_scale
    latents = torch.randn(len(SHARES), backbone.latent_channels, side, side, generator=generator)
    steps = backbone.noising().levels
    hints = random_hints(backbone, conditions, generator)
    prompts = [*classes, *backbone.labels][: len(SHARES)] if backbone.family.by_class else list(PROMPTS)
    prompts = (prompts * len(SHARES))[: len(SHARES)]
    rows = {name: value.to(device) for name, value in backbone.with_classes(classes).encode_prompts(prompts).items()}
    rows |= backbone.family.size_rows(len(SHARES), backbone.resolution, device)
    t = torch.tensor([int(share * steps) for share in SHARES], device=device)
    return Batch(latents.to(device), t, rows, hints)


def random_hints(
    backbone: Backbone, conditions: Sequence[str], generator: torch.Generator
) -> list[Mapping[str, Tensor] | None]:
    """None, each condition alone with a map (1, 3, H, W) of random zeros and ones, and all of them together."""
    side = backbone.resolution
    maps = {name: torch.rand(1, 3, side, side, generator=generator).round().to(backbone.device) for name in conditions}
    return [None, *({name: map} for name, map in maps.items()), *([maps] if len(maps) > 1 else [])]


def outputs(backbone: Backbone, batch: Batch, tuners: Sequence[Tuner], weights: Sequence[float]) -> Iterator[Tensor]:
    """The denoiser's output for each set of hints, with the tuners at these strengths."""
    denoiser = backbone.denoiser
    with torch.no_grad(), tuned(denoiser, *tuners, scales=list(weights)):
        for hints in batch.hints:
            known = hints if tuners else None
            maps = {name: value.expand(len(batch.t), -1, -1, -1) for name, value in (known or {}).items()}
            yield backbone.family.output(denoiser, batch.latents, batch.t, batch.rows, channel(maps or None)).float()


def compare(
    backbone: Backbone, expected: Sequence[Tensor], batch: Batch, tuners: Sequence[Tuner], weights: Sequence[float]
) -> MergeError:
    """The error of `tuners` at `weights` against the outputs `expected` of the same batch."""
    found, base = list(outputs(backbone, batch, tuners, weights)), list(outputs(backbone, batch, [], []))
    return MergeError.between(found, expected, base)
