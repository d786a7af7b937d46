"""The one training loop: any tuner, any base, any conditions.

All randomness lies in `batches.py`, resume states in `state.py`, what is looked at on the way in `validate.py`; here
they are put in order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from ..backbones.loading import Backbone, load_backbone
from ..backbones.upsampling import fold_upsampling
from ..checkpoint import load_tuner, save_tuner
from ..config import TrainConfig
from ..data.prepared import PreparedSet, prepare
from ..data.prompts import PromptRule
from ..data.records import Record, Source
from ..devices import choose_precision, torch_dtype
from ..errors import Interrupted, SctoolError, UsageError
from ..measure import peak_so_far
from ..progress import Progress
from ..runs import Run
from ..signals import Stop
from ..sites.wiring import TunedBackbone
from ..tuners import method_config, tuner_class
from ..tuners.base import Tuner
from . import diffusion
from .batches import Draw, StepBatches, collate, draw, sample_losses, shares
from .card import write_card
from .state import load_state, save_state
from .validate import Validator

LOG_EVERY = 10
Measures = Mapping[str, Callable[..., dict[str, float]]]
HELD_OUT = ("validation", "val", "test")


# ------------------------------------------------------------------------------------------------ preparing


def split_records(source: Source, held_out: Source | None, config: TrainConfig) -> tuple[list[Record], list[Record]]:
    """Training and held-out records: a set of its own, else rows marked so in the data, else a seeded tenth at most."""
    if held_out is not None:
        return list(source.records), list(held_out.records)[: config.val_count]
    marked = [name for name in HELD_OUT if any(r.split == name for r in source.records)]
    if marked:
        train = [r for r in source.records if r.split not in HELD_OUT]
        return train, [r for r in source.records if r.split == marked[0]][: config.val_count]
    count = min(config.val_count, len(source.records) // 10)
    order = torch.randperm(len(source.records), generator=diffusion.generator(config.seed, "held out")).tolist()
    chosen = set(order[:count])
    return [r for i, r in enumerate(source.records) if i not in chosen], [source.records[i] for i in sorted(chosen)]


def build_tuner(config: TrainConfig, backbone: Backbone) -> Tuner:
    """The untrained tuner of `config`, or the one in `config.init` to go on from.

    A run that names no settings of the method takes those of `init`. Raises `UsageError` when the two differ.
    """
    settings = method_config(config.method, config.tuner)
    if not config.init:
        torch.manual_seed(config.seed)
        return tuner_class(config.method).build(
            settings, backbone.denoiser, config.conditions, vae_scale=backbone.vae_scale
        )
    tuner = load_tuner(config.init, backbone)
    same = tuner.config == settings or not config.tuner
    if tuner.method != config.method or tuple(tuner.conditions) != tuple(config.conditions) or not same:
        raise UsageError(
            f"init={config.init} holds {tuner.method} with conditions {list(tuner.conditions)} and {tuner.config}; "
            f"this run asks for {config.method} with {list(config.conditions)} and {settings}."
        )
    return tuner


# ------------------------------------------------------------------------------------------------ the loop


def train(
    config: TrainConfig,
    run: Run,
    source: Source,
    *,
    held_out: Source | None = None,
    measures: Measures | None = None,
    map_meta: Mapping[str, Any] | None = None,
    offline: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains `config`'s tuner on `source` into the run folder; the same call again resumes. Gives the last figures.

    `measures` gives for a condition a function (pictures, hints) -> figures that says how well pictures follow their
    hints; `map_meta` says how the condition maps were made and goes into the tuner file.
    Raises `Interrupted` after a saved stop by SIGINT or SIGTERM, `SctoolError` for data that cannot be trained on.
    """
    accelerator = Accelerator()
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    if config.batch % world:
        raise UsageError(f"batch={config.batch} cannot be shared evenly among {world} processes.")
    precision = choose_precision(config.precision, device)
    progress = Progress(quiet or not accelerator.is_main_process)
    backbone = load_backbone(config.base, dtype=torch_dtype(precision), device=device, offline=offline)
    size = config.size or backbone.resolution
    train_records, val_records = split_records(source, held_out, config)

    def prepared(records: list[Record], flip: bool) -> PreparedSet:
        return prepare(
            records, backbone, size=size, conds=config.conditions, flip=flip, device=device,
            prompt=PromptRule(config.trigger, config.caption), progress=progress.note,
        )  # fmt: skip

    with accelerator.main_process_first():
        data = prepared(train_records, config.flip)
        val = prepared(val_records, False) if val_records else None
    if not len(data):
        raise SctoolError(f"--data {config.data} holds no picture to train on; its faults stand above.")
    backbone.free_encoders()

    tuner = build_tuner(config, backbone)
    autocast = tuner.kind == "weights" or precision == "fp16"  # fp32 masters in the forward pass need it
    dtype = torch.float32 if autocast else torch_dtype(precision)
    validator = Validator(config, run, backbone, val, measures or {}, progress) if accelerator.is_main_process else None
    if validator:
        validator.draw_base()
    if tuner.kind == "skips":
        fold_upsampling(backbone.denoiser)
    model = TunedBackbone(backbone.denoiser, tuner).to(device, memory_format=torch.channels_last)
    if config.checkpointing:
        backbone.denoiser.enable_gradient_checkpointing()
    parameters = [p for p in tuner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    rates = get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
    ema = EMAModel(parameters, decay=config.ema) if config.ema else None
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    start = load_state(run, tuner, optimizer, ema, scaler)
    if accelerator.is_main_process:
        run.forget_after(start)
        run.become_latest()  # not before: a training that was refused is no run to sample from
    if config.compile:
        model.compile()
    wrapped = accelerator.prepare_model(model)
    scheduler = backbone.training_scheduler()
    share, latent = shares(config.batch, rank, world), tuple(data[0]["mean"].shape)

    def losses(net: torch.nn.Module, batch: Mapping[str, Any], d: Draw, snr_gamma: float | None) -> torch.Tensor:
        with torch.autocast(device.type, torch_dtype(precision), enabled=autocast and precision != "fp32"):
            return sample_losses(
                net, batch, d, data.null_rows, scheduler, device=device, dtype=dtype, snr_gamma=snr_gamma,
                time_ids=backbone.time_ids(len(d.t), size),
            )  # fmt: skip

    batches = iter(
        DataLoader(
            data,
            batch_sampler=StepBatches(
                len(data),
                config.batch,
                config.seed,
                start * config.accumulate,
                config.steps * config.accumulate,
                rank,
                world,
            ),
            num_workers=4 if device.type == "cuda" else 0,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
        )
    )
    figures: dict[str, Any] = {}

    def save(step: int) -> None:
        if accelerator.is_main_process:
            save_state(run, step, tuner, optimizer, ema, scaler, config.keep)

    def look(step: int) -> None:
        if not validator:
            return
        with averaged(ema, parameters):
            figures.update(validator(step, model, lambda batch, d: losses(model, batch, d, None)))

    with Stop() as stop, progress.training(config.steps, start) as bar:
        logger = Logger(run, accelerator.is_main_process)
        recent: list[torch.Tensor] = []
        clock = time.perf_counter()
        for step in range(start, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * rates.lr_lambdas[0](step)
            total = torch.zeros((), device=device)
            for part in range(config.accumulate):
                micro = step * config.accumulate + part
                d = draw(config, micro, latent, scheduler.config.num_train_timesteps, share)
                last = part == config.accumulate - 1
                with accelerator.no_sync(wrapped) if not last else torch.enable_grad():
                    loss = losses(wrapped, next(batches), d, config.snr_gamma).mean() / config.accumulate
                    scaler.scale(loss).backward()
                total += loss.detach()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if ema:
                ema.step(parameters)
            done = step + 1
            recent.append(total)
            if done % LOG_EVERY == 0 or done == config.steps:
                value = float(accelerator.reduce(torch.stack(recent).mean(), "mean"))
                recent.clear()
                if not math.isfinite(value):
                    raise SctoolError(
                        f"the loss became {value} near step {done}; {run.path} keeps its last good state. "
                        "Start again under another --name with a lower lr or precision=fp32."
                    )
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                figures |= {
                    "step": done,
                    "loss": value,
                    "lr": optimizer.param_groups[0]["lr"],
                    "grad_norm": float(norm),
                }
                logger.row({**figures_of(figures, "step", "loss", "lr", "grad_norm"), "seconds": round(seconds, 4)})
            bar(done, figures.get("loss"), peak_so_far(device) / 1e9)
            wish = agreed_signal(stop.signal, world)
            if done % config.save_every == 0 or wish or done == config.steps:
                save(done)
            if wish and done < config.steps:
                raise Interrupted(
                    f"stopped by {'SIGINT' if wish == 2 else 'SIGTERM'} after step {done}, saved in {run.path}. "
                    "The same command again goes on from there.",
                    wish,
                )
            due = [every for every in (config.validate_every, config.sample_every) if every and done % every == 0]
            if due or (done == config.steps and (config.validate_every or config.sample_every)):
                look(done)
                logger.row({"step": done, **figures_of(figures, "val")})
                clock = time.perf_counter()
        logger.close()
    figures |= {"steps": config.steps, "peak_memory_gb": round(peak_so_far(device) / 1e9, 3), "precision": precision}
    if accelerator.is_main_process:
        with averaged(ema, parameters):
            save_tuner(run.tuner, tuner, backbone, maps=dict(map_meta or {}), run=run.name)
        write_card(run, config, backbone, tuner, figures, len(data), val)
    model.attachment.detach()
    accelerator.wait_for_everyone()
    return figures


class averaged:
    """Context manager: the averaged weights inside, the trained ones outside; nothing without an average."""

    def __init__(self, ema: EMAModel | None, parameters: list[torch.nn.Parameter]) -> None:
        self.ema, self.parameters = ema, parameters

    def __enter__(self) -> None:
        if self.ema:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)

    def __exit__(self, *error: object) -> None:
        if self.ema:
            self.ema.restore(self.parameters)


def agreed_signal(number: int, world: int) -> int:
    """The stop signal that any process got, so that all stop after the same step."""
    if world == 1:
        return number
    flag = torch.tensor([number], device=Accelerator().device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return int(flag)


def figures_of(figures: Mapping[str, Any], *starts: str) -> dict[str, Any]:
    """The figures whose name begins with one of `starts`."""
    return {k: v for k, v in figures.items() if k.startswith(starts) and k != "steps"}


class Logger:
    """metrics.jsonl and TensorBoard, on the main process alone."""

    def __init__(self, run: Run, active: bool) -> None:
        self.run, self.writer = run, None
        if active:
            from torch.utils.tensorboard.writer import SummaryWriter

            self.writer = SummaryWriter(str(run.path / "tb"))

    def row(self, values: dict[str, Any]) -> None:
        """Writes one row; every number but the step becomes a TensorBoard scalar."""
        if self.writer is None:
            return
        self.run.log(values)
        for key, value in values.items():
            if key != "step" and isinstance(value, int | float):
                self.writer.add_scalar(key, value, values["step"])

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        if self.writer:
            self.writer.close()
