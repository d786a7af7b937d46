"""What a kind of training has of its own: the base whose weights or tuners are trained, the loss, and what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..backbones.loading import Backbone, load_backbone
from ..checkpoint import save_in_diffusers, save_tuner
from ..config import TrainConfig
from ..devices import choose_precision, torch_dtype
from ..errors import UsageError
from ..runs import Run
from .card import write_card
from .objective import DiffusionObjective, Objective
from .training import Training

if TYPE_CHECKING:
    from ..sites.attaching import TunedBackbone
    from .log import Summary


class Recipe:
    """Training tuners on a frozen base. Distillation has a subclass."""

    def load(self, config: TrainConfig, device: torch.device, offline: bool) -> tuple[Backbone, str]:
        """The base in the run's precision, and that precision. Raises `UsageError` for settings that do not fit it."""
        return load_for_training(config, device, offline)

    def reference(self, backbone: Backbone) -> Backbone:
        """The base that previews are compared to, before tuners are attached."""
        return backbone

    def besides(self, precision: str) -> int:
        """Bytes of the device that the training holds beside the base and what is trained."""
        return 0

    def begin(self, run: Run) -> None:
        """Called when the run is about to take steps: from now on it is the latest one."""
        run.become_latest()

    def objective(self, ordinary: DiffusionObjective, model: TunedBackbone) -> Objective:
        """The loss."""
        return ordinary

    def finish(self, training: Training, summary: Summary) -> None:
        """Writes the result; called in the main process, with averaged weights where there are any."""
        t = training
        for lane in t.lanes:
            save_tuner(
                lane.run.tuner, lane.tuner, lane.backbone, maps=lane.set.map_meta, task=lane.name, run=t.run.name
            )
            for condition, model in lane.tuner.in_diffusers().items():
                save_in_diffusers(lane.run.in_diffusers(condition), model, condition, lane.backbone, lane.set.map_meta)
        write_card(t.run, t.config, t.backbone, t.lanes, summary)


def load_for_training(config: TrainConfig, device: torch.device, offline: bool) -> tuple[Backbone, str]:
    """The base in the run's precision, and that precision. Raises `UsageError` for a mask on a base without tokens."""
    precision = choose_precision(config.precision, device)
    backbone = load_backbone(config.base, dtype=torch_dtype(precision), device=device, offline=offline)
    check_mask(config, backbone)
    return backbone, precision


def check_mask(config: TrainConfig, backbone: Backbone) -> None:
    """Raises `UsageError` for a mask on a base without tokens."""
    if config.mask and backbone.family.token_layers(backbone.denoiser) is None:
        raise UsageError(f"mask={config.mask} leaves out tokens, but {config.base} has none: it is not a transformer.")
