"""What a training step of each method costs: time in turns, peak memory one by one, parameters.

The steps are the trainer's own (forward, backward, clipping, optimizer) at the table's batch, size and precision, on
random latents, so that no data has to be encoded first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from ...core.backbones.loading import Backbone, load_backbone
from ...core.config import SampleConfig, TrainConfig
from ...core.errors import UsageError
from ...core.measure import PATIENCE, REPEATS, PeakMemory, in_turns
from ...core.runs import Run
from ...core.sampling import sample_batch
from ...core.training.lanes import Data, Lane, TaskSet
from ...core.training.recipe import load_for_training
from ...core.training.setup import added_classes, build_tuner, set_up
from ...core.training.trainer import Trainer
from ...core.tuners import method_config, tuner_class
from ..profile import parameters
from .workshop import Workshop

WARM = 2
"""Steps whose peak memory is measured; the optimizer allocates its moments in the first."""
DRAWN_STEPS = 4
"""Sampler steps of the batch that a plan times."""


class RandomSet(Dataset):
    """Random latents in the place of a prepared set; every caption is the null prompt."""

    def __init__(self, backbone: Backbone, size: int, length: int) -> None:
        side = size // backbone.vae_scale
        self.length, self.shape = length, (backbone.latent_channels, side, side)
        self.null_rows = {name: row[0].cpu() for name, row in backbone.encode_prompts([""]).items()}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        mean = torch.randn(self.shape, generator=torch.Generator().manual_seed(i))
        return {"mean": mean, "std": torch.zeros(self.shape), "text": self.null_rows, "hints": {}}


class Contender:
    """A method on a base of its own, ready for steps."""

    def __init__(self, shop: Workshop, config: TrainConfig) -> None:
        accelerator = Accelerator()
        self.config, self.device = config, accelerator.device
        self.backbone, precision = load_for_training(config, accelerator.device, shop.offline)
        self.backbone.classes = added_classes(config, shop.source, shop.held_out, self.backbone)
        data: Any = Data(RandomSet(self.backbone, shop.size, config.batch), None)  # pyright: ignore[reportArgumentType]
        self.null_rows = self.backbone.encode_prompts([""])
        self.backbone.free_encoders()
        endless = config.model_copy(update={"steps": 10**9})  # however many are timed
        nowhere = Run(shop.out / "cost")  # no such run: nothing to resume
        tuner = build_tuner(config, self.backbone)
        lane = Lane(None, endless, nowhere, self.backbone, data, tuner, TaskSet(shop.source))
        self.training = set_up(endless, nowhere, self.backbone, [lane], accelerator, precision)
        self.trainer, self.number = Trainer(self.training), count()

    def step(self) -> float:
        """Seconds of one training step."""
        return self._seconds(lambda: self.trainer.step(next(self.number)))

    def draw(self, sampling: SampleConfig) -> float:
        """Seconds per image of drawing one batch, as if with all of the sampler's steps."""
        backbone, steps = self.backbone, min(DRAWN_STEPS, sampling.steps)
        backbone.vae.to(self.device)
        if self.training.model.tokens is not None:
            self.training.model.tokens.kept = None  # the last training step's mask
        few = sampling.model_copy(update={"steps": steps})
        rows = {key: row.expand(few.batch, *row.shape[1:]) for key, row in self.null_rows.items()}
        seeds = list(range(few.batch))
        seconds = self._seconds(lambda: sample_batch(backbone, rows, self.null_rows, seeds, few))
        return seconds / few.batch * sampling.steps / steps

    def _seconds(self, work: Callable[[], object]) -> float:
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure_costs(
    shop: Workshop, configs: Mapping[str, TrainConfig], repeats: int = REPEATS, patience: float = PATIENCE
) -> dict[str, Any]:
    """{"methods": {method: {"step_s", "peak_bytes"}}, "protocol"}; peak_bytes is None where it cannot be measured."""
    memory, peaks = PeakMemory(shop.device), {}
    for name, config in configs.items():  # one alone at a time, so that the others' memory does not count
        contender = Contender(shop, config)
        peaks[name] = memory.of(lambda one=contender: [one.step() for _ in range(WARM)])
        del contender
    contenders = {name: Contender(shop, config) for name, config in configs.items()}
    seconds = in_turns({name: one.step for name, one in contenders.items()}, repeats, patience)
    config = next(iter(configs.values()))
    return {
        "methods": {name: {"step_s": seconds[name], "peak_bytes": peaks[name]} for name in configs},
        "protocol": {
            "step": "one optimizer step of the trainer on random latents, median of methods in turns",
            "memory": memory.kind,
            "device": device_name(shop.device),
            "torch": torch.__version__,
            "precision": next(iter(contenders.values())).training.precision,
            "batch": config.batch * config.accumulate,
            "size": shop.size,
        },
    }


def count_parameters(shop: Workshop, configs: Mapping[str, TrainConfig]) -> dict[str, dict[str, int]]:
    """What every method trains and stores, as `eval.profile.parameters` counts it; nothing is allocated.

    Raises `UsageError` naming a method that does not fit the base.
    """
    first = next(iter(configs.values()))
    backbone = load_backbone(first.base, offline=shop.offline)
    backbone.check_size(shop.size)
    classes = added_classes(first, shop.source, shop.held_out, backbone)
    denoiser = backbone.denoiser.to("meta")
    counts = {}
    for name, config in configs.items():
        settings = method_config(name, config.tuner)
        try:
            tuner = tuner_class(name).build(settings, denoiser, (), backbone.vae_scale, classes)
        except UsageError as error:
            raise type(error)(f"--methods {name} does not fit --base {config.base}: {error}") from error
        counts[name] = parameters(denoiser, tuner)
    return counts


def device_name(device: str) -> str:
    """What times and memory were measured on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
