"""A training as one value: all that its steps, its validation and its result need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from ..backbones.loading import Backbone
from ..backbones.noising import Noising
from ..config import TrainConfig
from ..runs import Run
from ..sites.attaching import TunedBackbone
from .lanes import Lane
from .objective import Objective


@dataclass
class Training:
    """A training that is ready for step number `start`; `recent` are the losses since the last row of the log."""

    config: TrainConfig
    run: Run
    accelerator: Accelerator
    backbone: Backbone
    lanes: list[Lane]
    model: TunedBackbone
    net: nn.Module
    """The model as steps call it: wrapped for several processes."""
    objective: Objective
    noising: Noising
    parameters: list[nn.Parameter]
    """Those of all lanes."""
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    """The learning rate of a step."""
    ema: EMAModel | None
    scaler: torch.amp.GradScaler
    precision: str
    start: int
    recent: list[list[float]]
    tokens: int = 0
    """Tokens that a transformer makes of a latent; 0 for other denoisers."""

    @property
    def trained(self) -> nn.Module:
        """What resume states hold: the tuner, or all of them."""
        return whole(self.lanes)


def whole(lanes: Sequence[Lane]) -> nn.Module:
    """The tuner of an ordinary run, or those of all tasks as one module."""
    return lanes[0].tuner if lanes[0].name is None else nn.ModuleList(lane.tuner for lane in lanes)
