"""The methods, by name. Importable without torch: a row loads its code when asked.

A new method is one file here, one row in `TUNERS` and one config class in `core/config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..config import Config, FullConfig, SCEditConfig, TrainConfig, build
from ..errors import UsageError, unknown

if TYPE_CHECKING:
    from .base import Tuner


@dataclass(frozen=True)
class Variant:
    """A method with settings as its paper counts it; `conditions` is how many condition maps it is controlled by."""

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    conditions: int = 0


@dataclass(frozen=True)
class Method:
    """A method: its settings, where its class is, what it does, who proposed it, and its variants in the paper."""

    config: type[Config]
    module: str
    cls: str
    summary: str
    paper: str
    takes_conditions: bool
    """Whether it can be controlled by condition maps."""
    lr: float
    """The learning rate when none is given."""
    lr_source: str
    """Where that learning rate comes from."""
    variants: tuple[Variant, ...]

    def load(self) -> type[Tuner]:
        """The tuner class; imports torch."""
        return getattr(import_module(self.module, __package__), self.cls)


SCEDIT_VARIANTS = (
    Variant("SC-Tuner"),
    Variant("SC-Tuner, ratio 1/5", {"ratio": 0.2}),
    Variant("SC-Tuner, ratio 1/10", {"ratio": 0.1}),
    Variant("SC-Tuner, skips 0,11", {"skips": [0, 11]}),
    Variant("SC-Tuner, skips 0,3,6,9,11", {"skips": [0, 3, 6, 9, 11]}),
    Variant("SC-Tuner, conv", {"operator": "conv"}),
    Variant("SC-Tuner, ResPrefix", {"operator": "resprefix"}),
    Variant("CSC-Tuner, kernel 1", {"kernel": 1}, 1),
    Variant("CSC-Tuner, kernel 3", {"kernel": 3}, 1),
    Variant("CSC-Tuner, skips 0,3,4,6,7,9,11", {"skips": [0, 3, 4, 6, 7, 9, 11]}, 1),
    Variant("CSC-Tuner, dual conv", {"dual": True}, 1),
    Variant("CSC-Tuner, zero heads", {"cascade": "zero-heads"}, 1),
    Variant("CSC-Tuner, 2 conditions", {}, 2),
)
"""The settings of SCEdit's tables 1, 2, 5 and 6, and our heads."""

TUNERS: dict[str, Method] = {
    "full": Method(
        FullConfig, ".full", "Full", "trains every weight of the denoiser", "baseline", False,
        1e-4, "DiT's own (Peebles & Xie 2023, section 4)",
        (Variant("full fine-tuning"),),
    ),
    "scedit": Method(
        SCEditConfig, ".scedit", "SCEdit",
        "edits the skip connections: SC-Tuner without conditions, CSC-Tuner with them",
        "Jiang et al. 2023, arXiv 2312.11392", True,
        1e-4, "twice the paper's 5e-5, for single GPUs and short runs", SCEDIT_VARIANTS,
    ),
}  # fmt: skip


def find_method(name: str) -> Method:
    """The row of that name. Raises `UsageError` naming the nearest method for an unknown one."""
    if name not in TUNERS:
        raise unknown("method", name, TUNERS)
    return TUNERS[name]


def tuner_class(name: str) -> type[Tuner]:
    """The class of method `name`. Raises `UsageError` naming the nearest method for an unknown one."""
    return find_method(name).load()


def with_learning_rate(config: TrainConfig) -> TrainConfig:
    """The config with its method's learning rate where it gives none. Raises `UsageError` for an unknown method."""
    return config if config.lr is not None else config.model_copy(update={"lr": find_method(config.method).lr})


def method_config(name: str, values: Mapping[str, Any]) -> Config:
    """The settings of method `name`, validated. Raises `UsageError` for an unknown method or key, or a wrong value."""
    return build(find_method(name).config, values, f"{name} ")


def check_routing(config: TrainConfig) -> None:
    """Raises `UsageError` for tasks with a method that cannot tell the samples of a batch apart. Imports torch then."""
    if config.tasks and not tuner_class(config.method).routes:
        raise UsageError(
            f"--tasks: method {config.method} changes the denoiser for a whole batch, which tasks cannot share. "
            "Train each in a run of its own."
        )
