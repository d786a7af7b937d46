"""What each tuner costs: times of training and sampling in turns, peak memory one by one, parameters.

Training steps are the trainer's own (forward, backward, clipping, optimizer) at the table's batch, size and precision,
on random latents and hints, so that no data has to be encoded first. A sampling step is as in `eval.profile`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from ..profile import Bench, parameters
from .workshop import Workshop

WARM = 2
"""Steps whose peak memory is measured; the optimizer allocates its moments in the first."""
DRAWN_STEPS = 4
"""Sampler steps of the batch that a plan times."""
PLAN_REPEATS = 3
"""Steps of each arm that a plan times."""
PLAN_PATIENCE = 20.0
"""Seconds after which a plan begins no further repeat."""
SAMPLING_STEP = "one prediction of a batch of {batch} doubled for guidance, hint already encoded, median in turns"


class RandomSet(Dataset):
    """Random latents and hints in the place of a prepared set; every caption is the null prompt."""

    def __init__(self, backbone: Backbone, size: int, length: int, conditions: Sequence[str]) -> None:
        side = size // backbone.vae_scale
        self.length, self.shape = length, (backbone.latent_channels, side, side)
        self.null_rows = {name: row[0].cpu() for name, row in backbone.encode_prompts([""]).items()}
        self.hints = {name: (3, size, size) for name in conditions}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(i)
        hints = {
            name: torch.randint(0, 256, shape, generator=g, dtype=torch.uint8) for name, shape in self.hints.items()
        }
        mean = torch.randn(self.shape, generator=g)
        return {"mean": mean, "std": torch.zeros(self.shape), "text": self.null_rows, "hints": hints}


class Contender:
    """A method on a base of its own, ready for steps."""

    def __init__(self, shop: Workshop, config: TrainConfig) -> None:
        accelerator = Accelerator()
        self.config, self.device = config, accelerator.device
        self.backbone, precision = load_for_training(config, accelerator.device, shop.offline)
        self.backbone.classes = added_classes(config, shop.source, shop.held_out, self.backbone)
        self.random = RandomSet(self.backbone, shop.size, config.batch, config.conditions)
        data: Any = Data(self.random, None)  # pyright: ignore[reportArgumentType]
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
        return seconds_of(lambda: self.trainer.step(next(self.number)), self.device.type)

    def draw(self, sampling: SampleConfig) -> float:
        """Seconds per image of drawing one batch, as if with all of the sampler's steps."""
        backbone, steps = self.backbone, min(DRAWN_STEPS, sampling.steps)
        backbone.vae.to(self.device)
        if self.training.model.tokens is not None:
            self.training.model.tokens.kept = None  # the last training step's mask
        few = sampling.model_copy(update={"steps": steps})
        rows = {key: row.expand(few.batch, *row.shape[1:]) for key, row in self.null_rows.items()}
        hints = {name: torch.rand(few.batch, *shape) for name, shape in self.random.hints.items()}
        work = partial(sample_batch, backbone, rows, self.null_rows, list(range(few.batch)), few, hints)
        return seconds_of(work, self.device.type) / few.batch * sampling.steps / steps


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Seconds that `work` takes, the GPU's part with it."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def measure_costs(
    shop: Workshop, configs: Mapping[str, TrainConfig], repeats: int = REPEATS, patience: float = PATIENCE
) -> dict[str, Any]:
    """{"rows": {arm: {"step_s", "sample_step_s", "peak_bytes"}, base: {"sample_step_s"}}, "protocol"}.

    peak_bytes is None where it cannot be measured.
    """
    memory, peaks = PeakMemory(shop.device), {}
    for name, config in configs.items():  # one alone at a time, so that the others' memory does not count
        contender = Contender(shop, config)
        peaks[name] = memory.of(lambda one=contender: [one.step() for _ in range(WARM)])
        del contender
    contenders = {name: Contender(shop, config) for name, config in configs.items()}
    seconds = in_turns({name: one.step for name, one in contenders.items()}, repeats, patience)
    precision = next(iter(contenders.values())).training.precision
    del contenders
    sampling = sampling_steps(shop, configs, {}, repeats, patience)
    rows: dict[str, dict[str, Any]] = {name: {"sample_step_s": value} for name, value in sampling.items()}
    for name in configs:
        rows[name] |= {"step_s": seconds[name], "peak_bytes": peaks[name]}
    config = next(iter(configs.values()))
    return {
        "rows": rows,
        "protocol": {
            "step": "one optimizer step of the trainer on random latents, median of all rows in turns",
            "memory": memory.kind,
            "precision": precision,
            "batch": config.batch * config.accumulate,
            **sampling_protocol(shop),
        },
    }


def sampling_steps(
    shop: Workshop,
    configs: Mapping[str, TrainConfig],
    students: Mapping[str, str],
    repeats: int = REPEATS,
    patience: float = PATIENCE,
) -> dict[str, float]:
    """Seconds of a sampling step with each config's tuner, with each student (a base), and with each base alone."""

    def bench(base: str, config: TrainConfig | None = None) -> Bench:
        backbone = load_backbone(base, device=shop.device, offline=shop.offline)
        tuner = None
        if config is not None:
            backbone.classes = added_classes(config, shop.source, shop.held_out, backbone)
            tuner = build_tuner(config, backbone).to(shop.device)
        return Bench(backbone, tuner, shop.size, shop.settings.sampling.batch)

    works: dict[str, Callable[[], float]] = {}
    for name, base in {**shop.settings.bases, **students}.items():
        works[name] = partial(bench(base).sample, False)
    for name, config in configs.items():
        works[name] = partial(bench(config.base, config).sample, True)
    return in_turns(works, repeats, patience)


def sampling_protocol(shop: Workshop) -> dict[str, Any]:
    """How and on what `sampling_steps` measures."""
    step = SAMPLING_STEP.format(batch=shop.settings.sampling.batch)
    return {"sampling step": step, "device": device_name(shop.device), "torch": torch.__version__, "size": shop.size}


def time_arms(shop: Workshop, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Seconds of a training step, in turns, and of drawing an image, by arm."""
    contenders = {name: Contender(shop, shop.settings.config(name, 0)) for name in names}
    steps = in_turns({name: one.step for name, one in contenders.items()}, PLAN_REPEATS, PLAN_PATIENCE)
    return {name: (steps[name], one.draw(shop.settings.sampling)) for name, one in contenders.items()}


def count_parameters(shop: Workshop) -> dict[str, dict[str, int]]:
    """What every arm trains and stores, and each base's size, as `eval.profile.parameters` counts.

    Raises `UsageError` naming a method that does not fit its base.
    """
    settings, counts = shop.settings, dict[str, dict[str, int]]()
    for name, base in settings.bases.items():
        backbone = load_backbone(base, offline=shop.offline)
        counts[name] = _base_counts(backbone, shop.size)
        classes = added_classes(settings.first, shop.source, shop.held_out, backbone)
        denoiser = backbone.denoiser.to("meta")
        for arm in (arm for arm in settings.arms.values() if arm.base == base):
            config = settings.config(arm.name, 0)
            own = method_config(config.method, config.tuner)
            try:
                tuner = tuner_class(config.method).build(
                    own, denoiser, config.conditions, backbone.vae_scale, classes
                )  # fmt: skip
            except UsageError as error:
                raise type(error)(f"--methods {arm.own} does not fit --base {base}: {error}") from error
            counts[arm.name] = parameters(denoiser, tuner)
    return counts


def count_bases(shop: Workshop) -> dict[str, dict[str, int]]:
    """The size of each base's denoiser. Raises `UsageError` for a base that cannot take the table's image size."""
    bases = {name: load_backbone(base, offline=shop.offline) for name, base in shop.settings.bases.items()}
    return {name: _base_counts(backbone, shop.size) for name, backbone in bases.items()}


def _base_counts(backbone: Backbone, side: int) -> dict[str, int]:
    backbone.check_size(side)
    size = sum(p.numel() for p in backbone.denoiser.parameters())
    return {"trainable": 0, "stored": 0, "base": size, "total": size}


def device_name(device: str) -> str:
    """What times and memory were measured on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
