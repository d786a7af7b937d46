"""What a base's layers are given while it draws, and how far its untrained student's answers are from its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbones.loading import Backbone
from .factorising import input_moments

PROMPTS: tuple[str, ...] = (
    "", "a photo", "red and blue", "a portrait of an old man", "", "two dogs on a beach", "a white dress on a hanger",
    "a city street at night", "a bowl of fruit on a table", "a drawing of a house by the sea", "a black leather shoe",
    "a mountain under a cloudy sky", "an abstract pattern", "people sitting in a cafe", "a close-up of a flower",
    "a cat looking out of a window",
)  # fmt: skip
TOGETHER = 4
"""Images that are drawn at a time, for the memory's sake."""


@dataclass(frozen=True)
class Answer:
    """What a base predicts (B, C, h, w) for noisy latents (B, C, h, w) at timesteps (B,), and their conditioning."""

    noisy: Tensor
    t: Tensor
    rows: Mapping[str, Tensor]
    prediction: Tensor


def answers(backbone: Backbone, count: int = len(PROMPTS), rounds: int = 8, seed: int = 1) -> Iterator[Answer]:
    """The base's answers while it draws `count` images from noise in `rounds` steps, `TOGETHER` at a time.

    Every image has timesteps of its own: layers that see the timestep alone are then given count x rounds inputs, not
    `rounds`. Of a class-conditional base the images are of classes from all over its list, and of none.
    """
    family, noising, device = backbone.family, backbone.noising(), backbone.device
    side, generator = backbone.resolution // backbone.vae_scale, torch.Generator().manual_seed(seed)
    prompts = _prompts(backbone, count)

    def normal() -> Tensor:
        return torch.randn(TOGETHER, backbone.latent_channels, side, side, generator=generator).to(device)

    for first in range(0, count, TOGETHER):
        rows = backbone.encode_prompts(prompts[first : first + TOGETHER])
        rows = {name: value.to(device) for name, value in rows.items()}
        rows |= family.size_rows(TOGETHER, backbone.resolution, device)
        noisy, offset = normal(), torch.rand(TOGETHER, generator=generator)
        for number in range(rounds):  # from noise to images: the base's own estimate, noised again
            t = ((1 - (number + offset) / rounds) * noising.levels).long().clamp(0, noising.levels - 1).to(device)
            prediction = family.predict(backbone.denoiser, noisy, t, rows).float()
            yield Answer(noisy, t, rows, prediction)
            clean = noising.clean(noisy, prediction, t)
            noisy = noising.add_noise(clean, normal(), (t - noising.levels // rounds).clamp(min=0))


def _prompts(backbone: Backbone, count: int) -> list[str]:
    if not backbone.family.by_class:
        return (list(PROMPTS) * count)[:count]
    labels = ["", *backbone.labels]
    return [labels[number * len(labels) // count] for number in range(count)]


def calibrate(backbone: Backbone, names: Iterable[str]) -> dict[str, Tensor]:
    """E[x x^T] of the layers' inputs while the base draws."""
    return input_moments(backbone.denoiser, names, lambda: deque(answers(backbone), maxlen=0))


@torch.no_grad()
def start_error(backbone: Backbone, student: nn.Module) -> float:
    """The mean of |f - f_T|^2 / |f_T|^2 over draws that calibration has not seen: 0 for the teacher, 1 for zeros."""
    errors = []
    for one in answers(backbone, 2 * TOGETHER, 4, seed=2):
        ours = backbone.family.predict(student, one.noisy, one.t, one.rows).float()
        difference = (ours - one.prediction).square().flatten(1).sum(1)
        errors.append(difference / one.prediction.square().flatten(1).sum(1))
    return torch.cat(errors).mean().item()
