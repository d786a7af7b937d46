"""What a table compares: methods, one budget for all of them, seeds, and how images are drawn. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.config import SampleConfig, TrainConfig, resolve_config
from ...core.errors import UsageError, unknown
from ...core.tuners import TUNERS, find_method, method_config, with_learning_rate
from ..features.names import named_weights

FEWEST_SEEDS = 3
"""Seeds below which there is no interval."""
RATE_SEED = 1000
"""The seed of the runs that choose a learning rate: never one of the table's."""
VALIDATIONS = 5
"""Points of a held-out loss curve."""
OWN = ("tuner", "lr", "weight_decay", "betas", "max_grad_norm", "schedule", "warmup", "ema")
"""Settings that may differ between methods; all others decide the budget or the data and are the same for all."""
SET_HERE = {
    "method": "name methods with --methods",
    "seed": "their number is --seeds",
    "lr": "learning rates belong to methods: --lr METHOD=RATE",
    "tuner": "a method's settings are written METHOD:tuner.KEY=VALUE",
    "cond": "this table adapts without condition maps",
    "init": "every method starts from the untouched base",
    "validate_every": "the held-out loss is always measured at the end",
    "sample_every": "images are drawn after training, --count of them",
}
"""Settings that the table decides, and what to do instead."""


@dataclass(frozen=True)
class Settings:
    """The methods of a table and everything that decides their runs.

    `flags` and `pairs` are settings of all runs, `own` those of single methods, as `core.config` reads them. `rates`
    are the learning rates tried for each method first, in runs of `rate_steps` steps (None: as long as the others).
    """

    methods: tuple[str, ...]
    seeds: int
    flags: Mapping[str, Any]
    pairs: tuple[str, ...]
    own: Mapping[str, tuple[str, ...]]
    lr: Mapping[str, float]
    rates: tuple[float, ...]
    rate_steps: int | None
    count: int
    sampling: SampleConfig
    features: str = "auto"
    """Features of the Fréchet distance, as `sctool evaluate --features` takes them."""
    weights: tuple[str, ...] = ()
    """Their weights, as `sctool evaluate --weights` takes them."""

    def config(self, method: str, seed: int, lr: float | None = None, steps: int | None = None) -> TrainConfig:
        """The run of `method` with `seed`; at rate `lr` where given, else at the method's given or usual rate."""
        flags = {**self.flags, "method": method, "seed": seed, "lr": self.lr.get(method), "sample_every": 0, "keep": 1}
        pairs = [*self.pairs, *self.own.get(method, ())]
        config = resolve_config(TrainConfig, flags=flags, pairs=pairs)
        update: dict[str, Any] = {"steps": steps or config.steps}
        update["validate_every"] = math.ceil(update["steps"] / VALIDATIONS)
        if lr is not None:
            update["lr"] = lr
        return with_learning_rate(config.model_copy(update=update))

    @property
    def tuned(self) -> tuple[str, ...]:
        """The methods whose learning rate is chosen among `rates`: those without one of their own."""
        given = {*self.lr, *(method for method, pairs in self.own.items() if any(p.startswith("lr=") for p in pairs))}
        return tuple(method for method in self.methods if method not in given) if self.rates else ()

    def first_image(self, seed: int) -> int:
        """The seed of the first image drawn with the model of `seed`: no two seeds share an image's noise."""
        return seed * self.count


def make_settings(
    *,
    methods: Sequence[str],
    seeds: int,
    flags: Mapping[str, Any],
    pairs: Sequence[str] = (),
    lr: Sequence[str] = (),
    rates: Sequence[float] = (),
    rate_steps: int | None = None,
    count: int = 200,
    sample_steps: int | None = None,
    guidance: float | None = None,
    features: str = "auto",
    weights: Sequence[str] = (),
) -> Settings:
    """The settings that a command line means; every method's configuration is validated.

    `lr` holds METHOD=RATE, `pairs` KEY=VALUE for all runs and METHOD:KEY=VALUE for one method's. Raises `UsageError`
    for unknown methods and keys, for settings that would make a comparison unfair, and for rates without use.
    """
    if not methods:
        raise UsageError("--methods names no method, e.g. --methods full,scedit.")
    if twice := {name for name in methods if list(methods).count(name) > 1}:
        raise UsageError(f"--methods names {', '.join(sorted(twice))} twice.")
    for name in methods:
        find_method(name)
    if not 1 <= seeds <= RATE_SEED:
        raise UsageError(f"--seeds {seeds}: give 1 to {RATE_SEED}; {FEWEST_SEEDS} or more for intervals.")
    if count < 2:
        raise UsageError(f"--count {count}: a distance of image sets needs at least 2 images.")
    if rate_steps is not None and not rates:
        raise UsageError("--rate-steps is the length of the runs that --rates makes; add --rates, or leave it out.")
    if wrong := [rate for rate in rates if not rate > 0]:
        raise UsageError(f"--rates {wrong[0]:g}: a learning rate is more than 0.")
    named_weights(weights, features)
    shared, own = _sorted_pairs(pairs, methods)
    given = dict(_rate(text, methods) for text in lr)
    first = resolve_config(TrainConfig, flags=dict(flags), pairs=shared)
    guidance = first.guidance if guidance is None else guidance
    sampling = resolve_config(SampleConfig, flags={"steps": sample_steps, "guidance": guidance})
    settings = Settings(
        tuple(methods), seeds, dict(flags), tuple(shared), own, given, tuple(sorted(set(rates))), rate_steps, count,
        sampling, features, tuple(weights),
    )  # fmt: skip
    for method in methods:
        config = settings.config(method, 0)
        method_config(method, config.tuner)
    if rates and not settings.tuned:
        raise UsageError("--rates has no use: every method has a learning rate by --lr. Leave one of them out.")
    return settings


def _sorted_pairs(pairs: Sequence[str], methods: Sequence[str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The pairs of all runs, and those of single methods without the method's name."""
    shared: list[str] = []
    own: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        name, colon, key = pair.partition("=")[0].rpartition(":")
        if not colon:
            if reason := SET_HERE.get(key.split(".")[0]):
                raise UsageError(f"{pair} cannot be set for all runs: {reason}.")
            shared.append(pair)
            continue
        _among(name, methods, pair)
        if key.split(".")[0] not in OWN:
            raise UsageError(
                f"{pair}: only {', '.join(OWN)} may differ between methods. For all of them: {pair[len(name) + 1 :]}"
            )
        own[name] = (*own.get(name, ()), pair.removeprefix(f"{name}:"))
    return shared, own


def _rate(text: str, methods: Sequence[str]) -> tuple[str, float]:
    """METHOD=RATE."""
    name, equals, value = text.partition("=")
    try:
        rate = float(value)
    except ValueError:
        rate = math.nan
    if not equals or not rate > 0:
        raise UsageError(f"--lr {text} is not METHOD=RATE with a rate above 0, e.g. --lr {methods[0]}=1e-4.")
    _among(name, methods, f"--lr {text}")
    return name, rate


def _among(name: str, methods: Sequence[str], where: str) -> None:
    """Raises `UsageError` for a method that is not in the table."""
    if name not in TUNERS:
        raise unknown("method", name, methods, f" It is in '{where}'.")
    if name not in methods:
        raise UsageError(f"{where}: {name} is not among --methods {','.join(methods)}.")
