"""What one training step sees: the order of the data and the random draws, all functions of the seed and the step.

Every draw is made for the whole batch and then shared out. So a run that is killed and started again, or distributed
over processes, sees the same numbers as an undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..config import TrainConfig
from .order import BlockOrder, shuffled
from .seeds import generator

if TYPE_CHECKING:
    from ..backbones.noising import Noising


class StepBatches(Sampler[list[int]]):
    """One process's indices of micro-batches `start` to `stop`; every epoch has an order of its own, seeded.

    groups: for a set too large to permute as a whole, the numbers of items that lie together; see `BlockOrder`.
    """

    def __init__(
        self, count: int, batch: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1,
        groups: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.count, self.batch, self.seed, self.groups = count, batch, seed, groups
        self.start, self.stop, self.share = start, stop, batch_share(batch, rank, world)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.start * self.batch // self.count
        order = self._order(epoch)
        for micro in range(self.start, self.stop):
            indices = []
            for position in range(micro * self.batch, (micro + 1) * self.batch):
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = self._order(epoch)
                indices.append(order[position % self.count])
            yield indices[self.share]

    def _order(self, epoch: int) -> list[int] | BlockOrder:
        if self.groups is None:
            return shuffled(self.count, self.seed, epoch)
        return BlockOrder(self.groups, self.seed, epoch)


def batch_share(batch: int, rank: int, world: int) -> slice:
    """The part of a batch that belongs to process `rank` of `world`."""
    return slice(rank * batch // world, (rank + 1) * batch // world)


@dataclass(frozen=True)
class Draw:
    """The random numbers of one micro-batch: posterior and diffusion noise, timesteps, what is dropped."""

    posterior: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    t: Tensor  # (B,)
    drop_caption: Tensor  # (B,) bool
    drop_hint: dict[str, Tensor]  # (B,) bool for each condition
    kept: Tensor | None = None  # (B, K) tokens computed; None for all


def mask_ratio(config: TrainConfig, step: int) -> float:
    """The share of tokens left out of step number `step`: `mask`, then falling to 0 over the last `mask_anneal`.

    It falls with cos^4, as MaskDiT's schedule of that name (arXiv 2306.09305, its code).
    """
    if not config.mask_anneal:
        return config.mask
    left = (config.steps - 1 - step) / max(1, config.mask_anneal * config.steps)
    return config.mask * (math.cos(math.pi / 2 * (1 - left)) ** 4 if left < 1 else 1)


def kept_tokens(config: TrainConfig, micro: int, tokens: int) -> Tensor | None:
    """The tokens (B, K) that each sample of micro-batch `micro` keeps, of `tokens`; None where all are kept."""
    kept = int(tokens * (1 - mask_ratio(config, micro // config.accumulate)))
    if kept >= tokens:
        return None
    order = torch.rand((config.batch, tokens), generator=generator(config.seed, "mask", micro)).argsort(1)
    return order[:, : max(1, kept)].sort(1).values


def training_draw(
    config: TrainConfig, micro: int, latent: Sequence[int], noising: Noising, share: slice, tokens: int = 0
) -> Draw:
    """This process's share of the draws for micro-batch `micro`, with latents of shape `latent` (C, h, w).

    The whole batch is drawn, so the numbers are the same whatever the number of processes. `tokens` is how many a
    transformer makes of a latent; 0 for denoisers without tokens.
    """
    g, count = generator(config.seed, "draw", micro), config.batch
    noise = torch.randn((2, count, *latent), generator=g)
    t = noising.timesteps(count, g)
    chance = torch.rand((1 + len(config.conditions), count), generator=g)
    dropped = dropped_hints(config, chance[1:], torch.rand(count, generator=g))
    kept = kept_tokens(config, micro, tokens) if tokens else None
    return Draw(
        noise[0, share],
        noise[1, share],
        t[share],
        chance[0, share] < config.caption_dropout,
        {name: drop[share] for name, drop in zip(config.conditions, dropped, strict=True)},
        None if kept is None else kept[share],
    )


def dropped_hints(config: TrainConfig, chance: Tensor, fate: Tensor) -> Tensor:
    """Which hints of M conditions are black, bool (M, B), for uniform `chance` (M, B) and `fate` (B,).

    As Uni-ControlNet's code: some images keep all of them, some lose all, and in the others each goes by itself.
    """
    every = (fate >= config.hint_keep_all) & (fate < config.hint_keep_all + config.hint_drop_all)
    return every | ((chance < config.hint_dropout) & (fate >= config.hint_keep_all))


def validation_draw(
    config: TrainConfig, first: int, count: int, latent: Sequence[int], noising: Noising, part: int, of: int
) -> Draw:
    """The draws of held-out images `first` to `first + count`, at timesteps in part `part` of `of` of the schedule.

    They are the same at every validation, and nothing is dropped, so that curves move because the tuner does.
    """
    g = generator(config.seed, "validation", first, part)
    noise = torch.randn((2, count, *latent), generator=g)
    t = noising.timesteps(count, g, part, of)
    never = torch.zeros(count, dtype=torch.bool)
    return Draw(noise[0], noise[1], t, never, dict.fromkeys(config.conditions, never))


def joined(batches: Sequence[dict[str, Any]], tasks: Sequence[str | None]) -> dict[str, Any]:
    """The batches of several tasks as one, whose `task` names each sample's; hints that a task has not are black."""
    if list(tasks) == [None]:
        return batches[0]
    counts = [len(batch["mean"]) for batch in batches]
    shapes = {name: hint.shape[1:] for batch in batches for name, hint in batch["hints"].items()}
    hints = {
        name: torch.cat(
            [
                batch["hints"].get(name, torch.zeros((count, *shape), dtype=torch.uint8))
                for batch, count in zip(batches, counts, strict=True)
            ]
        )
        for name, shape in shapes.items()
    }
    return {
        "mean": torch.cat([batch["mean"] for batch in batches]),
        "std": torch.cat([batch["std"] for batch in batches]),
        "text": {key: torch.cat([batch["text"][key] for batch in batches]) for key in batches[0]["text"]},
        "hints": hints,
        "task": [task for task, count in zip(tasks, counts, strict=True) for _ in range(count)],
    }


def joined_draws(draws: Sequence[Draw]) -> Draw:
    """The draws of several tasks as one."""
    names = dict.fromkeys(name for draw in draws for name in draw.drop_hint)
    return Draw(
        torch.cat([draw.posterior for draw in draws]),
        torch.cat([draw.noise for draw in draws]),
        torch.cat([draw.t for draw in draws]),
        torch.cat([draw.drop_caption for draw in draws]),
        {
            name: torch.cat([draw.drop_hint.get(name, torch.zeros_like(draw.drop_caption)) for draw in draws])
            for name in names
        },
        None if draws[0].kept is None else torch.cat([draw.kept for draw in draws if draw.kept is not None]),
    )


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items of a `PreparedSet` as one batch."""
    return {
        "mean": torch.stack([item["mean"] for item in items]),
        "std": torch.stack([item["std"] for item in items]),
        "text": {key: torch.stack([item["text"][key] for item in items]) for key in items[0]["text"]},
        "hints": {key: torch.stack([item["hints"][key] for item in items]) for key in items[0]["hints"]},
    }
