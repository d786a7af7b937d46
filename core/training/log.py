"""What a training reports: rows of metrics.jsonl and TensorBoard, the mean loss between rows, the closing summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..errors import Diverged
from ..runs import Run


@dataclass(frozen=True)
class StepFigures:
    """One row of the log: the mean loss since the row before, and the step's learning rate and gradient norm.

    With tasks the loss is their mean, the norm is over all weights, and `tasks` has both of each, named loss/TASK and
    grad_norm/TASK.
    """

    step: int
    steps_averaged: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    tasks: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """As it is logged."""
        figures = {"loss": self.loss, "lr": self.lr, "grad_norm": self.grad_norm, "seconds": self.seconds}
        return {**figures, **self.tasks}


@dataclass(frozen=True)
class Summary:
    """What a finished training reports; `last` is None where nothing was left to train."""

    steps: int
    precision: str
    peak_memory_gb: float
    last: StepFigures | None = None
    validation: dict[str, float] = field(default_factory=dict)
    """Figures of the last validation, named val/..."""

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object."""
        last = {} if self.last is None else {"step": self.last.step, "loss": self.last.loss, "lr": self.last.lr}
        norm = {} if self.last is None else {"grad_norm": self.last.grad_norm, **self.last.tasks}
        closing = {"steps": self.steps, "peak_memory_gb": self.peak_memory_gb, "precision": self.precision}
        return {**last, **norm, **self.validation, **closing}


class LossMeter:
    """Losses of the steps since the last row, on this process; survives a resume, so that rows are the same."""

    def __init__(self, accelerator: Accelerator, losses: Sequence[float | list[float]]) -> None:
        self.accelerator = accelerator
        self.recent = [torch.tensor(loss, device=accelerator.device).reshape(-1) for loss in losses]

    def add(self, loss: Tensor) -> None:
        """Adds one step's losses (T,), one for each task; one in all for a run without tasks."""
        self.recent.append(loss)

    def since_last_row(self) -> list[list[float]]:
        """The losses of the steps since the last row, averaged over processes. All processes must call it."""
        if not self.recent:
            return []
        return self.accelerator.reduce(torch.stack(self.recent), "mean").tolist()  # pyright: ignore

    def mean(self) -> tuple[list[float], int]:
        """The means (T) of those and the number of steps, and a new row begins. All processes must call it."""
        value, count = self.accelerator.reduce(torch.stack(self.recent), "mean").mean(0), len(self.recent)  # pyright: ignore
        self.recent.clear()
        return value.tolist(), count


def refuse_divergence(loss: float, step: int, run: Run) -> None:
    """Raises `Diverged` when the loss is not finite."""
    if not math.isfinite(loss):
        raise Diverged(
            f"the loss became {loss} near step {step}; {run.path} keeps its last good state. "
            "Start again under another --name with a lower lr or precision=fp32."
        )


class Logger:
    """metrics.jsonl and TensorBoard, on the main process alone."""

    def __init__(self, run: Run, active: bool) -> None:
        self.run, self.writer = run, None
        if active:
            from torch.utils.tensorboard.writer import SummaryWriter

            self.writer = SummaryWriter(str(run.path / "tb"))

    def row(self, step: int, values: dict[str, float]) -> None:
        """Writes one row; every number becomes a TensorBoard scalar."""
        if self.writer is None:
            return
        self.run.log({"step": step, **values})
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        """Flushes TensorBoard's file."""
        if self.writer:
            self.writer.close()
