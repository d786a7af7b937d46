"""One optimizer step, and the averaged weights beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .batches import StepBatches, batch_share, collate, training_draw
from .setup import Training

WORKERS = 4
"""Processes that load data for a GPU."""


class Trainer:
    """Takes the steps of a training, in order from its `start`."""

    def __init__(self, training: Training) -> None:
        self.training = training
        accelerator, config = training.accelerator, training.config
        self.share = batch_share(config.batch, accelerator.process_index, accelerator.num_processes)
        self.latent_shape = training.data.latent_shape
        self.batches = self._batches()

    def _batches(self) -> Iterator[dict[str, Any]]:
        """This process's batches from the first step on."""
        t, config = self.training, self.training.config
        cuda = t.accelerator.device.type == "cuda"
        order = StepBatches(
            len(t.data.train), config.batch, config.seed, t.start * config.accumulate, config.steps * config.accumulate,
            t.accelerator.process_index, t.accelerator.num_processes,
        )  # fmt: skip
        workers = WORKERS if cuda else 0
        return iter(
            DataLoader(t.data.train, batch_sampler=order, num_workers=workers, collate_fn=collate, pin_memory=cuda)
        )

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        """One optimizer step; the loss on this process and the gradient norm before clipping, two scalars."""
        t, config = self.training, self.training.config
        for group in t.optimizer.param_groups:
            group["lr"] = t.rate(number)
        total = torch.zeros((), device=t.accelerator.device)
        for part in range(config.accumulate):
            micro = number * config.accumulate + part
            draw = training_draw(config, micro, self.latent_shape, t.noising, self.share, t.tokens)
            last = part == config.accumulate - 1
            with t.accelerator.no_sync(t.net) if not last else torch.enable_grad():
                loss = t.objective(t.net, next(self.batches), draw).mean() / config.accumulate
                t.scaler.scale(loss).backward()
            total += loss.detach()
        t.scaler.unscale_(t.optimizer)
        norm = nn.utils.clip_grad_norm_(t.parameters, config.max_grad_norm or math.inf)
        t.scaler.step(t.optimizer)
        t.scaler.update()
        t.optimizer.zero_grad()
        if t.ema:
            t.ema.step(t.parameters)
        return total, norm


class averaged:
    """Context manager: the averaged weights inside, the trained ones outside; nothing without an average."""

    def __init__(self, ema: EMAModel | None, parameters: list[nn.Parameter]) -> None:
        self.ema, self.parameters = ema, parameters

    def __enter__(self) -> None:
        if self.ema:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)

    def __exit__(self, *error: object) -> None:
        if self.ema:
            self.ema.restore(self.parameters)
