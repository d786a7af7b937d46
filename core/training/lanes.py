"""A lane: one task of a training with its own config, data and tuner. An ordinary run is one lane without a name.

Lanes share the base and every forward pass, and nothing else: trained together they end as they would alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..backbones.loading import Backbone
from ..config import TrainConfig
from ..data.prepared import PreparedSet
from ..data.records import Source
from ..data.streaming.serving import StreamedSet
from ..runs import Run
from ..tuners.base import Tuner

Measures = Mapping[str, Callable[..., dict[str, float]]]
"""Condition -> function (images, hints) -> figures of how well the images follow their hints."""


Distance = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
"""Function (images, the reference's images) -> figures of how far the one set is from the other."""


@dataclass(frozen=True)
class TaskSet:
    """What a task trains on: its images, those held out, how its maps were made, and what measures its samples."""

    source: Source
    held_out: Source | None = None
    map_meta: Mapping[str, Any] = field(default_factory=dict)
    measures: Measures = field(default_factory=dict)
    distance: Distance | None = None


@dataclass
class Data:
    """The prepared images: those trained on, and those held out, if any."""

    train: PreparedSet | StreamedSet
    held_out: PreparedSet | StreamedSet | None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of a latent."""
        return tuple(self.train[0]["mean"].shape)


@dataclass(frozen=True)
class Lane:
    """A task with all that is its own; `run` and `config` are the task's part of the run and of its settings."""

    name: str | None
    config: TrainConfig
    run: Run
    backbone: Backbone
    """The base with the classes that the task adds."""
    data: Data
    tuner: Tuner
    set: TaskSet

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights that are trained."""
        return [p for p in self.tuner.parameters() if p.requires_grad]
