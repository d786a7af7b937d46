"""The training loop: set up, step, and what happens between steps (log, save, validate, stop)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import TrainConfig
from ..data.records import Source
from ..errors import Interrupted, UsageError
from ..measure import peak_so_far
from ..progress import Progress
from ..runs import Run
from ..signals import Stop
from .batches import joined
from .lanes import Lane, Measures, TaskSet
from .log import Logger, LossMeter, StepFigures, Summary, refuse_divergence
from .recipe import Recipe
from .setup import open_lanes, set_up
from .state import save_state
from .trainer import Trainer, averaged
from .training import Training
from .validate import Losses, Validator

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
    own = TaskSet(source, held_out, map_meta or {}, measures or {})
    return train_tasks(config, run, {None: own}, offline=offline, quiet=quiet)


def train_tasks(
    config: TrainConfig, run: Run, sets: Mapping[str | None, TaskSet], *, offline: bool = False, quiet: bool = False,
    recipe: Recipe | None = None,
) -> Summary:  # fmt: skip
    """Trains a tuner for each task of the config, `sets` by task; {None: set} for a run without tasks.

    Every task ends as it would in a run of its own with the same seed, up to rounding. `recipe` replaces what tuners
    on a frozen base are trained by. Otherwise as `train`.
    """
    recipe = recipe or Recipe()
    accelerator = Accelerator()
    if config.batch % accelerator.num_processes:
        raise UsageError(f"batch={config.batch} cannot be shared evenly among {accelerator.num_processes} processes.")
    progress = Progress(quiet or not accelerator.is_main_process)
    backbone, precision = recipe.load(config, accelerator.device, offline)
    lanes = open_lanes(config, run, sets, backbone, accelerator, progress)
    validators = []
    if accelerator.is_main_process:
        validators = [
            Validator(
                lane.config, lane.run, lane.backbone, lane.data.held_out, lane.set.measures, progress, lane.set.distance
            )
            for lane in lanes
        ]
        for validator in validators:
            validator.draw_base(recipe.reference(validator.backbone))  # before the tuners are attached
    training = set_up(config, run, backbone, lanes, accelerator, precision, recipe, progress.note)
    if accelerator.is_main_process:
        run.forget_after(training.start)
        recipe.begin(run)  # not before: a training that was refused is no run to sample from
    with Stop() as stop, progress.training(config.steps, training.start) as bar:
        trainer, between = Trainer(training), BetweenSteps(training, validators, stop, bar)
        with between.logger:
            for number in range(training.start, config.steps):
                between.after(number + 1, *trainer.step(number))
    return finish(training, between, recipe)


class BetweenSteps:
    """What happens after every step: the log, the bar, resume states, validation, and stopping by a signal."""

    def __init__(
        self,
        training: Training,
        validators: Sequence[Validator],
        stop: Stop,
        bar: Callable[[int, float | None, float], None],
    ) -> None:
        self.training, self.validators, self.stop, self.bar = training, validators, stop, bar
        self.logger = Logger(training.run, training.accelerator.is_main_process)
        self.meter = LossMeter(training.accelerator, training.recent)
        self.last: StepFigures | None = None
        self.validation: dict[str, float] = {}
        self.clock = time.perf_counter()

    def after(self, done: int, losses: Tensor, norms: Tensor) -> None:
        """Called with the number of steps done, and each lane's loss and gradient norm (T,) in the last one.

        Raises `SctoolError` when the loss is not finite, and `Interrupted` after a saved stop.
        """
        t, config = self.training, self.training.config
        self.meter.add(losses)
        if done % LOG_EVERY == 0 or done == config.steps:
            self._log(done, norms)
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

    def _log(self, done: int, norms: Tensor) -> None:
        """One row: the mean losses since the last one."""
        losses, count = self.meter.mean()
        loss = sum(losses) / len(losses)
        refuse_divergence(loss, done, self.training.run)
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        lr = self.training.optimizer.param_groups[0]["lr"]
        tasks = self._by_task(losses, norms.tolist())
        self.last = StepFigures(done, count, loss, lr, float(norms.norm()), round(seconds, 4), tasks)
        self.logger.row(done, self.last.row())

    def _by_task(self, losses: list[float], norms: list[float]) -> dict[str, float]:
        """Loss and gradient norm of each task; {} for a run without tasks."""
        names = [lane.name for lane in self.training.lanes if lane.name]
        figures = {f"loss/{name}": loss for name, loss in zip(names, losses, strict=False)}
        return figures | {f"grad_norm/{name}": norm for name, norm in zip(names, norms, strict=False)}

    def _save(self, done: int) -> None:
        t, recent = self.training, self.meter.since_last_row()
        if t.accelerator.is_main_process:
            save_state(t.run, done, t.trained, t.optimizer, t.ema, t.scaler, t.config.keep, recent)

    def _validate(self, done: int) -> None:
        """Held-out figures and previews of the averaged weights; their time is not a step's."""
        began = time.perf_counter()
        if self.validators:
            t = self.training
            with averaged(t.ema, t.parameters):
                for validator, lane in zip(self.validators, t.lanes, strict=True):
                    self.validation |= validator(done, self._held_out_losses(lane), t.noising)
            self.logger.row(done, self.validation)
        self.clock += time.perf_counter() - began

    def _held_out_losses(self, lane: Lane) -> Losses:
        """The unweighted loss of each sample of a lane."""
        t = self.training
        objective = t.objective.unweighted()
        return lambda batch, draw: objective(t.model, joined([dict(batch)], [lane.name]), draw)


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


def finish(training: Training, between: BetweenSteps, recipe: Recipe) -> Summary:
    """Writes the result, and takes the tuners off the denoiser."""
    t = training
    memory = round(peak_so_far(t.accelerator.device) / 1e9, 3)
    summary = Summary(t.config.steps, t.precision, memory, between.last, between.validation)
    if t.accelerator.is_main_process:
        with averaged(t.ema, t.parameters):
            recipe.finish(t, summary)
    t.model.attachment.detach()
    t.accelerator.wait_for_everyone()
    return summary
