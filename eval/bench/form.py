"""What makes one table differ from another: its rows and their settings, its figures, its words. Imports no torch.

`Form` is a table of tuners on frozen bases, as `transfer` and `control` are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...core.config import TrainConfig
from ...core.errors import UsageError, unknown
from ...core.resolving import resolve_config
from ...core.tuners import TUNERS, find_method, method_config, with_learning_rate
from .papers import Paper

OWN = ("tuner", "lr", "weight_decay", "betas", "max_grad_norm", "schedule", "warmup", "ema")
"""Settings that may differ between arms; all others decide the budget or the data and are the same for all."""
SET_HERE = {
    "method": "name methods with --methods",
    "base": "name bases with --base",
    "seed": "their number is --seeds",
    "init": "every arm starts from the untouched base",
    "validate_every": "the held-out loss is always measured at the end",
    "sample_every": "images are drawn after training, --count of them",
    "tasks": "every run has one task",
}
"""Settings that every table decides, and what to do instead."""


@dataclass(frozen=True)
class Arm:
    """What one row is made of: runs of one method, or with one set of settings, on one base, a run per seed."""

    name: str
    """Its name in the table."""
    own: str
    """Whose settings it has, as they are written: METHOD:KEY=VALUE."""
    base: str
    folder: str
    """The name of its run folders, before the seed."""


class Form:
    """What one table is; subclasses say what differs."""

    name: ClassVar[str]
    title: ClassVar[str]
    """Of the table, with {bases} and {data}."""
    work: ClassVar[str] = "tuner_work.TunerWork"
    """Module and class here of what trains and draws its runs; see `workshop.Work`."""
    papers: ClassVar[tuple[Paper, ...]] = ()
    arms: ClassVar[str] = "methods"
    """What its rows are called, and the flag that names them."""
    example: ClassVar[str] = "full,scedit"
    """Of that flag."""
    base: ClassVar[str] = "base"
    """What the row of a single base is called."""
    drawn: ClassVar[str] = "tuned"
    """The name of the folders of drawn images."""
    clip: ClassVar[bool] = False
    """Whether the CLIP score is a figure of the table."""
    loss: ClassVar[bool] = True
    """Whether the held-out loss is, which must then mean the same for every arm."""
    to_base: ClassVar[bool] = False
    """Whether the distance to the base's images is."""
    timed_after: ClassVar[bool] = False
    """Whether costs can only be measured when the seed's runs are trained."""
    refused: ClassVar[Mapping[str, str]] = {
        **SET_HERE,
        "lr": "learning rates belong to methods: --lr METHOD=RATE",
        "tuner": "a method's settings are written METHOD:tuner.KEY=VALUE",
    }
    """Settings that may not be written for all runs, and what to do instead."""

    # ------------------------------------------------------------------------------------------------- settings

    def check_names(self, names: Sequence[str], own: Mapping[str, tuple[str, ...]]) -> None:
        """Raises `UsageError` for a row's name that does not fit the table; `own` are the settings written by name."""
        for name in names:
            find_method(name)

    def refuse_unknown(self, name: str, names: Sequence[str], where: str) -> None:
        """Raises `UsageError` for a name that is not among `names`; `where` it was written."""
        if name not in names and name not in TUNERS:
            raise unknown("method", name, names, f" It is in '{where}'.")
        if name not in names:
            raise UsageError(f"{where}: {name} is not among --{self.arms} {','.join(names)}.")

    def check_own(self, pair: str, name: str, key: str) -> None:
        """Raises `UsageError` for a setting of one arm, `pair`, that must be the same for all of them."""
        if key not in OWN:
            raise UsageError(
                f"{pair}: only {', '.join(OWN)} may differ between {self.arms}. "
                f"For all of them: {pair[len(name) + 1 :]}"
            )

    def recipe(self, name: str) -> tuple[str, ...]:
        """The settings that a name stands for, as KEY=VALUE."""
        return ()

    def config(self, arm: Arm, flags: Mapping[str, Any], pairs: Iterable[str]) -> TrainConfig:
        """A run's configuration, with its learning rate."""
        flags = {**flags, "method": arm.own, "base": arm.base}
        return with_learning_rate(resolve_config(TrainConfig, flags=flags, pairs=pairs))

    def check_config(self, config: TrainConfig) -> None:
        """Raises `UsageError` for an arm's configuration that the table cannot compare."""
        method_config(config.method, config.tuner)
