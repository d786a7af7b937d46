"""What a table compares: arms, one budget for all of them, seeds, and how images are drawn. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...core.config import SampleConfig, TrainConfig
from ...core.errors import UsageError
from ...core.resolving import resolve_config
from ..features.names import named_weights
from .form import Arm, Form

FEWEST_SEEDS = 3
"""Seeds below which there is no interval."""
RATE_SEED = 1000
"""The seed of the runs that choose a learning rate: never one of the table's."""
VALIDATIONS = 5
"""Points of a held-out loss curve."""


@dataclass(frozen=True)
class Measuring:
    """How images are measured, as the flags of these names of `sctool evaluate`."""

    features: str = "auto"
    weights: tuple[str, ...] = ()
    clip_model: str | None = None
    clip_weights: str | None = None
    evaluators: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """The arms of a table and everything that decides their runs.

    `flags` and `pairs` are settings of all runs, `own` those of single methods, as `core.config` reads them. `rates`
    are the learning rates tried for each arm first, in runs of `rate_steps` steps (None: as long as the others).
    """

    form: Form
    arms: Mapping[str, Arm]
    """By name, in the table's order."""
    seeds: int
    flags: Mapping[str, Any]
    pairs: tuple[str, ...]
    own: Mapping[str, tuple[str, ...]]
    lr: Mapping[str, float]
    rates: tuple[float, ...]
    rate_steps: int | None
    count: int
    sampling: SampleConfig
    measuring: Measuring = Measuring()

    def config(self, arm: str, seed: int, lr: float | None = None, steps: int | None = None) -> TrainConfig:
        """The run of an arm with `seed`; at rate `lr` where given, else at the arm's given or usual rate."""
        one = self.arms[arm]
        flags = {**self.flags, "seed": seed, "lr": self.lr.get(one.own), "sample_every": 0, "keep": 1}
        pairs = [*self.pairs, *self.form.recipe(one.own), *self.own.get(one.own, ())]
        config = self.form.config(one, flags, pairs)
        update: dict[str, Any] = {"steps": steps or config.steps}
        update["validate_every"] = math.ceil(update["steps"] / VALIDATIONS)
        if lr is not None:
            update["lr"] = lr
        return config.model_copy(update=update)

    @property
    def first(self) -> TrainConfig:
        """The first arm's run with seed 0, for what is the same in all runs."""
        return self.config(next(iter(self.arms)), 0)

    @property
    def base(self) -> str:
        """The first base: it decides what is the same for all."""
        return next(iter(self.arms.values())).base

    @property
    def bases(self) -> dict[str, str]:
        """The bases by what they are called in the table: the form's word where there is one, else ends of paths."""
        bases = list(dict.fromkeys(arm.base for arm in self.arms.values()))
        return {self.form.base: bases[0]} if len(bases) == 1 else dict(zip(short_names(bases), bases, strict=True))

    @property
    def tuned(self) -> tuple[str, ...]:
        """The arms whose learning rate is chosen among `rates`: those without one of their own."""
        given = {*self.lr, *(name for name, pairs in self.own.items() if any(p.startswith("lr=") for p in pairs))}
        return tuple(name for name, arm in self.arms.items() if arm.own not in given) if self.rates else ()

    def first_image(self, seed: int) -> int:
        """The seed of the first image drawn with the model of `seed`: no two seeds share an image's noise."""
        return seed * self.count


def make_settings(
    form: Form,
    *,
    names: Sequence[str],
    bases: Sequence[str] = ("mini",),
    seeds: int,
    flags: Mapping[str, Any],
    pairs: Sequence[str] = (),
    lr: Sequence[str] = (),
    rates: Sequence[float] = (),
    rate_steps: int | None = None,
    count: int = 200,
    sample_steps: int | None = None,
    guidance: float | None = None,
    measuring: Measuring | None = None,
) -> Settings:
    """The settings that a command line means; every arm's configuration is validated.

    names: methods, or whatever the form's arms are called. `lr` holds METHOD=RATE, `pairs` KEY=VALUE for all runs and
    METHOD:KEY=VALUE for one method's. Raises `UsageError` for unknown names and keys, for settings that would make a
    comparison unfair, and for rates without use.
    """
    measuring = measuring or Measuring()
    _check_list(names, f"--{form.arms}", form.example)
    _check_list(bases, "--base", "mini")
    shared, own = _sorted_pairs(form, pairs, names)
    form.check_names(names, own)
    if not 1 <= seeds <= RATE_SEED:
        raise UsageError(f"--seeds {seeds}: give 1 to {RATE_SEED}; {FEWEST_SEEDS} or more for intervals.")
    if count < 2:
        raise UsageError(f"--count {count}: a distance of image sets needs at least 2 images.")
    if rate_steps is not None and not rates:
        raise UsageError("--rate-steps is the length of the runs that --rates makes; add --rates, or leave it out.")
    if wrong := [rate for rate in rates if not rate > 0]:
        raise UsageError(f"--rates {wrong[0]:g}: a learning rate is more than 0.")
    named_weights(measuring.weights, measuring.features)
    given = dict(_rate(form, text, names) for text in lr)
    settings = Settings(
        form, make_arms(names, bases), seeds, dict(flags), tuple(shared), own, given, tuple(sorted(set(rates))),
        rate_steps, count, SampleConfig(), measuring,
    )  # fmt: skip
    for arm in settings.arms:
        form.check_config(settings.config(arm, 0))
    if rates and not settings.tuned:
        raise UsageError("--rates has no use: every row has a learning rate of its own. Leave one of them out.")
    guidance = settings.first.guidance if guidance is None else guidance
    sampling = resolve_config(SampleConfig, flags={"steps": sample_steps, "guidance": guidance})
    return replace(settings, sampling=sampling)


def make_arms(names: Sequence[str], bases: Sequence[str]) -> dict[str, Arm]:
    """An arm for each name on each base; with several bases it is called "NAME on BASE".

    Run folders of the first base do not name it, so that adding a base keeps the runs that are there.
    """
    arms: dict[str, Arm] = {}
    for label, base in zip(short_names(bases), bases, strict=True):
        for name in names:
            shown = f"{name} on {label}" if len(bases) > 1 else name
            folder = name if base == bases[0] else f"{name}@{folder_name(label)}"
            arms[shown] = Arm(shown, name, base, folder)
    return arms


def short_names(bases: Sequence[str]) -> list[str]:
    """The shortest ends of the bases' paths, of equally many parts, that tell them apart."""
    parts = [Path(base).parts for base in bases]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return list(bases)


def folder_name(name: str) -> str:
    """A name as that of one folder."""
    return re.sub(r"[^\w.@-]+", "-", name).strip("-")


def _check_list(values: Sequence[str], flag: str, example: str) -> None:
    if not values:
        what = flag.removeprefix("--").removesuffix("s")
        raise UsageError(f"{flag} names no {what}, e.g. {flag} {example}.")
    if twice := {value for value in values if list(values).count(value) > 1}:
        raise UsageError(f"{flag} names {', '.join(sorted(twice))} twice.")


def _sorted_pairs(
    form: Form, pairs: Sequence[str], names: Sequence[str]
) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The pairs of all runs, and those of single methods without the method's name."""
    shared: list[str] = []
    own: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        name, colon, key = pair.partition("=")[0].rpartition(":")
        if not colon:
            if reason := form.refused.get(key.split(".")[0]):
                raise UsageError(f"{pair} cannot be set for all runs: {reason}.")
            shared.append(pair)
            continue
        form.refuse_unknown(name, names, pair)
        form.check_own(pair, name, key.split(".")[0])
        own[name] = (*own.get(name, ()), pair.removeprefix(f"{name}:"))
    return shared, own


def _rate(form: Form, text: str, names: Sequence[str]) -> tuple[str, float]:
    """METHOD=RATE."""
    name, equals, value = text.partition("=")
    try:
        rate = float(value)
    except ValueError:
        rate = math.nan
    if not equals or not rate > 0:
        raise UsageError(f"--lr {text} is not METHOD=RATE with a rate above 0, e.g. --lr {names[0]}=1e-4.")
    form.refuse_unknown(name, names, f"--lr {text}")
    return name, rate
