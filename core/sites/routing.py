"""Which samples of a batch a tuner acts on: those of its task, where the denoiser's call says whose each sample is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SctoolError, UsageError, unknown

Tasks = Sequence[str | None]
"""The task of every sample of a batch; None for the base alone."""


@dataclass(frozen=True)
class Samples:
    """Places in a batch of `batch` samples; `rows` is None for all of them.

    Samples that follow each other are sliced, so that what is taken of a tensor is a view; others are copied.
    """

    rows: slice | Tensor | None = None
    count: int = 1
    batch: int = 0
    task: str | None = None
    tasks: tuple[str | None, ...] = ()

    def of(self, x: Tensor) -> Tensor:
        """These samples of x (B, ...). Raises `SctoolError` where the first dimension of x is not the batch."""
        if self.rows is None:
            return x
        if x.dim() == 0 or len(x) != self.batch:
            shape = tuple(x.shape)
            raise SctoolError(f"task '{self.task}' cannot act on a value of shape {shape}: it is no batch of samples.")
        return x[self.rows]

    def added(self, out: Tensor, delta: Tensor, x: Tensor) -> Tensor:
        """`out` plus `delta` at these samples. Writes into `out` only where it is not the unedited `x` itself."""
        if self.rows is None:
            return out + delta
        out = x.clone() if out is x else out
        out[self.rows] = out[self.rows] + delta
        return out

    def of_maps(self, maps: Tensor) -> Tensor:
        """These samples' maps: `maps` holds one for all samples, one each, or those of the batch without repetition."""
        if self.rows is None or len(maps) == 1:
            return maps
        period = math.lcm(len(maps), len(self.tasks))
        every = maps.repeat(period // len(maps), *[1] * (maps.dim() - 1))
        places = [i for i in range(period) if self.tasks[i % len(self.tasks)] == self.task]
        return every[_index(places, maps.device)]

    def of_inputs(self, value: Any) -> Any:
        """These samples of every tensor in `value`, in any nesting, that has an entry a sample; others as they are."""
        if isinstance(value, dict):
            return {name: self.of_inputs(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.of_inputs(one) for one in value]
        batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.batch
        return self.of(value) if batched else value

    def overlap(self, other: Samples) -> bool:
        """Whether a sample belongs to both."""
        return self.task is None or other.task is None or self.task == other.task


EVERY = Samples()
"""All samples of a batch, whatever their number."""


def samples_of(task: str | None, tasks: tuple[str | None, ...], batch: int, device: torch.device) -> Samples:
    """The samples of `task` in a batch that repeats `tasks`, as guidance does."""
    places = [i for i in range(batch) if tasks[i % len(tasks)] == task]
    rows = None if len(places) == batch else _index(places, device)
    return Samples(rows, len(places), batch, task, tasks)


def check_tasks(tasks: Any, known: set[str], batch: int) -> tuple[str | None, ...]:
    """The tasks of a call. Raises `UsageError` for a name not in `known`, and for a wrong number of names."""
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise UsageError(f"task={tasks!r}: pass a list with one task name, or None, for each sample.")
    for name in tasks:
        if name is not None and name not in known:
            raise unknown("task", str(name), known or ("none, no tuner was attached with a task",))
    if not tasks or batch % len(tasks):
        raise UsageError(f"{len(tasks)} task names for {batch} latents; pass one for each image.")
    return tuple(tasks)


def _index(places: list[int], device: torch.device) -> slice | Tensor:
    """A slice where the places follow each other."""
    first = places[0] if places else 0
    if places == list(range(first, first + len(places))):
        return slice(first, first + len(places))
    return torch.tensor(places, device=device)
