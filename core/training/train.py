"""The training loop: set up, step, and what happens between steps (log, save, validate, stop)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..checkpoint import save_tuner
from ..config import TrainConfig
from ..data.records import Source
from ..errors import Interrupted, SctoolError, UsageError
from ..measure import peak_so_far
from ..progress import Progress
from ..runs import Run
from ..signals import Stop
from .card import write_card
from .log import Logger, LossMeter, StepFigures, Summary, refuse_divergence
from .setup import Training, added_classes, build_tuner, load_for_training, prepare_data, set_up
from .state import save_state
from .trainer import Trainer, averaged
from .validate import Measures, Validator

LOG_EVERY = 10


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
) -> Summary:
    """Trains the config's tuner on `source` into the run folder; the same call again resumes.

    `measures` maps a condition to a function (images, hints) -> figures of how well images follow their hints;
    `map_meta` says how the condition maps were made and goes into the tuner file.
    Raises `Interrupted` after a saved stop by SIGINT or SIGTERM, `SctoolError` for data that cannot be trained on.
    """
    accelerator = Accelerator()
    if config.batch % accelerator.num_processes:
        raise UsageError(f"batch={config.batch} cannot be shared evenly among {accelerator.num_processes} processes.")
    progress = Progress(quiet or not accelerator.is_main_process)
    backbone, precision = load_for_training(config, accelerator.device, offline)
    backbone.classes = added_classes(config, source, held_out, backbone)
    with accelerator.main_process_first():
        data = prepare_data(config, source, held_out, backbone, progress)
    if not len(data.train):  # all processes find the same
        raise SctoolError(f"--data {config.data} has no image to train on; its faults are listed above.")
    backbone.free_encoders()
    tuner = build_tuner(config, backbone)
    validator = None
    if accelerator.is_main_process:
        validator = Validator(config, run, backbone, data.held_out, measures or {}, progress)
        validator.draw_base()  # before the tuner is attached
    training = set_up(config, run, backbone, data, tuner, accelerator, precision)
    if accelerator.is_main_process:
        run.forget_after(training.start)
        run.become_latest()  # not before: a training that was refused is no run to sample from
    with Stop() as stop, progress.training(config.steps, training.start) as bar:
        trainer, between = Trainer(training), BetweenSteps(training, validator, stop, bar)
        with between.logger:
            for number in range(training.start, config.steps):
                between.after(number + 1, *trainer.step(number))
    return finish(training, between, dict(map_meta or {}))


class BetweenSteps:
    """What happens after every step: the log, the bar, resume states, validation, and stopping by a signal."""

    def __init__(
        self,
        training: Training,
        validator: Validator | None,
        stop: Stop,
        bar: Callable[[int, float | None, float], None],
    ) -> None:
        self.training, self.validator, self.stop, self.bar = training, validator, stop, bar
        self.logger = Logger(training.run, training.accelerator.is_main_process)
        self.meter = LossMeter(training.accelerator, training.recent)
        self.last: StepFigures | None = None
        self.validation: dict[str, float] = {}
        self.clock = time.perf_counter()

    def after(self, done: int, loss: Tensor, norm: Tensor) -> None:
        """Called with the number of steps done, and the last one's loss and gradient norm.

        Raises `SctoolError` when the loss is not finite, and `Interrupted` after a saved stop.
        """
        t, config = self.training, self.training.config
        self.meter.add(loss)
        if done % LOG_EVERY == 0 or done == config.steps:
            self._log(done, norm)
        self.bar(done, self.last.loss if self.last else None, peak_so_far(t.accelerator.device) / 1e9)
        signal = agreed_signal(self.stop.signal, t.accelerator)
        if done % config.save_every == 0 or signal or done == config.steps:
            self._save(done)
        if signal and done < config.steps:
            raise Interrupted(
                f"stopped by {'SIGINT' if signal == 2 else 'SIGTERM'} after step {done}, saved in {t.run.path}. "
                "The same command again goes on from there.",
                signal,
            )
        if validation_due(done, config):
            self._validate(done)

    def _log(self, done: int, norm: Tensor) -> None:
        """One row: the mean loss since the last one."""
        loss, count = self.meter.mean()
        refuse_divergence(loss, done, self.training.run)
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        lr = self.training.optimizer.param_groups[0]["lr"]
        self.last = StepFigures(done, count, loss, lr, float(norm), round(seconds, 4))
        row = {"loss": loss, "lr": lr, "grad_norm": self.last.grad_norm, "seconds": self.last.seconds}
        self.logger.row(done, row)

    def _save(self, done: int) -> None:
        t, recent = self.training, self.meter.since_last_row()
        if t.accelerator.is_main_process:
            save_state(t.run, done, t.tuner, t.optimizer, t.ema, t.scaler, t.config.keep, recent)

    def _validate(self, done: int) -> None:
        """Held-out figures and previews of the averaged weights; their time is not a step's."""
        if self.validator:
            t = self.training
            objective = t.objective.unweighted()
            with averaged(t.ema, t.parameters):
                self.validation = self.validator(done, lambda batch, draw: objective(t.model, batch, draw), t.noising)
            self.logger.row(done, self.validation)
        self.clock = time.perf_counter()


def validation_due(done: int, config: TrainConfig) -> bool:
    """Whether figures or previews are wanted after `done` steps: at their intervals, and after the last step."""
    intervals = [every for every in (config.validate_every, config.sample_every) if every]
    return bool(intervals) and (done == config.steps or any(done % every == 0 for every in intervals))


def agreed_signal(number: int, accelerator: Accelerator) -> int:
    """The stop signal that any process got, so that all stop after the same step."""
    if accelerator.num_processes == 1:
        return number
    flag = torch.tensor([number], device=accelerator.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return int(flag)


def finish(training: Training, between: BetweenSteps, map_meta: dict[str, Any]) -> Summary:
    """Writes tuner and model card, and takes the tuner off the denoiser."""
    t = training
    memory = round(peak_so_far(t.accelerator.device) / 1e9, 3)
    summary = Summary(t.config.steps, t.precision, memory, between.last, between.validation)
    if t.accelerator.is_main_process:
        with averaged(t.ema, t.parameters):
            save_tuner(t.run.tuner, t.tuner, t.backbone, maps=map_meta, run=t.run.name)
        write_card(t.run, t.config, t.backbone, t.tuner, summary, t.data)
    t.model.attachment.detach()
    t.accelerator.wait_for_everyone()
    return summary
