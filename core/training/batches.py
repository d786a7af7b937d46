"""What one training step sees: the order of pictures, the random draws, and the loss of each picture.

Every draw is a function of the seed and the step, made for the whole batch and then shared out. So a run that is
killed and started again, or spread over processes, sees the same numbers as an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch.utils.data import Sampler

from ..config import TrainConfig
from . import diffusion


class StepBatches(Sampler[list[int]]):
    """One process's picture indices of micro-batches `start` to `stop`; an epoch's order is seeded by its number."""

    def __init__(self, count: int, batch: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self.start, self.stop, self.share = start, stop, shares(batch, rank, world)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        orders: dict[int, torch.Tensor] = {}
        for micro in range(self.start, self.stop):
            indices = []
            for position in range(micro * self.batch, (micro + 1) * self.batch):
                epoch, place = divmod(position, self.count)
                if epoch not in orders:
                    orders = {
                        epoch: torch.randperm(self.count, generator=diffusion.generator(self.seed, "order", epoch))
                    }
                indices.append(int(orders[epoch][place]))
            yield indices[self.share]


def shares(batch: int, rank: int, world: int) -> slice:
    """The part of a batch that belongs to process `rank` of `world`."""
    return slice(rank * batch // world, (rank + 1) * batch // world)


@dataclass(frozen=True)
class Draw:
    """The random numbers of one micro-batch: posterior and diffusion noise, time steps, what is dropped."""

    posterior: torch.Tensor  # (B, C, h, w)
    noise: torch.Tensor  # (B, C, h, w)
    t: torch.Tensor  # (B,)
    drop_caption: torch.Tensor  # (B,) bool
    drop_hint: dict[str, torch.Tensor]  # (B,) bool for each condition


def draw(config: TrainConfig, micro: int, latent: Sequence[int], levels: int, share: slice) -> Draw:
    """This process's share of the draws for micro-batch `micro`; the whole batch is drawn, so the share is the same
    numbers whatever the number of processes."""
    g, count = diffusion.generator(config.seed, "draw", micro), config.batch
    noise = torch.randn((2, count, *latent), generator=g)
    t = torch.randint(0, levels, (count,), generator=g)
    chance = torch.rand((1 + len(config.conditions), count), generator=g)
    return Draw(
        noise[0, share],
        noise[1, share],
        t[share],
        chance[0, share] < config.caption_dropout,
        {name: chance[1 + i, share] < config.hint_dropout for i, name in enumerate(config.conditions)},
    )


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items of a `PreparedSet` as one batch."""
    return {
        "mean": torch.stack([i["mean"] for i in items]),
        "std": torch.stack([i["std"] for i in items]),
        "text": {k: torch.stack([i["text"][k] for i in items]) for k in items[0]["text"]},
        "hints": {k: torch.stack([i["hints"][k] for i in items]) for k in items[0]["hints"]},
    }


def sample_losses(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    d: Draw,
    empty: Mapping[str, torch.Tensor],
    scheduler: DDPMScheduler,
    *,
    device: torch.device,
    dtype: torch.dtype,
    snr_gamma: float | None = None,
    time_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The diffusion loss of each picture of a batch, (B,) float32."""
    t, noise = d.t.to(device), d.noise.to(device)
    latents = batch["mean"].to(device).float() + batch["std"].to(device).float() * d.posterior.to(device)
    noisy = scheduler.add_noise(latents, noise, t)
    dropped = d.drop_caption.to(device)
    text = {}
    for key, rows in batch["text"].items():
        mask = dropped.view(-1, *[1] * (rows.dim() - 1))
        text[key] = torch.where(mask, empty[key].to(device, dtype), rows.to(device, dtype))
    if time_ids is not None:
        text["time_ids"] = time_ids
    hints = {}
    for name, rows in batch["hints"].items():
        kept = (~d.drop_hint[name]).to(device).view(-1, 1, 1, 1)
        hints[name] = rows.to(device).to(dtype) / 255 * kept
    prediction = model(noisy.to(dtype), t, text, hints or None)
    return diffusion.loss(prediction, diffusion.target(scheduler, latents, noise, t), scheduler, t, snr_gamma)
