"""One optimizer step, and the averaged weights beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .batches import Draw, StepBatches, batch_share, collate, joined, joined_draws, training_draw
from .lanes import Lane
from .training import Training

WORKERS = 4
"""Processes that load data for a GPU."""


class Trainer:
    """Takes the steps of a training, in order from its `start`.

    Each lane has its own order of data, draws, loss and clipping, as in a run of its own; all share the forward pass.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        accelerator, config = training.accelerator, training.config
        self.share = batch_share(config.batch, accelerator.process_index, accelerator.num_processes)
        self.latent_shape = training.lanes[0].data.latent_shape
        self.tasks = [lane.name for lane in training.lanes]
        self.batches = [self._batches(lane) for lane in training.lanes]

    def _batches(self, lane: Lane) -> Iterator[dict[str, Any]]:
        """This process's batches of a lane from the first step on."""
        t, config = self.training, self.training.config
        cuda = t.accelerator.device.type == "cuda"
        order = StepBatches(
            len(lane.data.train), config.batch, config.seed, t.start * config.accumulate,
            config.steps * config.accumulate, t.accelerator.process_index, t.accelerator.num_processes,
            getattr(lane.data.train, "groups", None),
        )  # fmt: skip
        workers = max(1, WORKERS // len(t.lanes)) if cuda else 0
        return iter(
            DataLoader(lane.data.train, batch_sampler=order, num_workers=workers, collate_fn=collate, pin_memory=cuda)
        )

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        """One optimizer step; the lanes' losses on this process and gradient norms before clipping, (T,) each."""
        t, config = self.training, self.training.config
        for group in t.optimizer.param_groups:
            group["lr"] = t.rate(number)
        total = torch.zeros(len(t.lanes), device=t.accelerator.device)
        for part in range(config.accumulate):
            last = part == config.accumulate - 1
            with t.accelerator.no_sync(t.net) if not last else torch.enable_grad():
                losses = self._losses(number * config.accumulate + part) / config.accumulate
                t.scaler.scale(losses.sum()).backward()
            total += losses.detach()
        t.scaler.unscale_(t.optimizer)
        most = config.max_grad_norm or math.inf
        norms = torch.stack([nn.utils.clip_grad_norm_(lane.parameters, most) for lane in t.lanes])
        t.scaler.step(t.optimizer)
        t.scaler.update()
        t.optimizer.zero_grad()
        if t.ema:
            t.ema.step(t.parameters)
        return total, norms

    def _losses(self, micro: int) -> Tensor:
        """The mean loss (T,) of every lane's samples in micro-batch `micro`, from one forward pass over all of them."""
        t = self.training
        batches = [next(batches) for batches in self.batches]
        draws = [self._draw(lane, micro) for lane in t.lanes]
        losses = t.objective(t.net, joined(batches, self.tasks), joined_draws(draws))
        return torch.stack([own.mean() for own in losses.chunk(len(t.lanes))])

    def _draw(self, lane: Lane, micro: int) -> Draw:
        t = self.training
        return training_draw(lane.config, micro, self.latent_shape, t.noising, self.share, t.tokens)


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
