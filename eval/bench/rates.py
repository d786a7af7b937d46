"""Each arm's own learning rate: the rate with the lowest held-out loss in runs on a seed that the table lacks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.config import TrainConfig
from ...core.errors import SctoolError
from .running import train_run
from .settings import RATE_SEED, Settings
from .workshop import Workshop


@dataclass(frozen=True)
class Tuned:
    """The rates tried for one arm, each with its held-out loss (infinite where it diverged), and the one chosen."""

    losses: Mapping[float, float]

    @property
    def rate(self) -> float:
        """The rate with the lowest loss; of equals, the smallest."""
        return min(self.losses, key=lambda rate: (self.losses[rate], rate))

    @property
    def at_the_edge(self) -> bool:
        """Whether a rate beyond those tried might be better."""
        return len(self.losses) > 1 and self.rate in (min(self.losses), max(self.losses))

    def to_json(self) -> dict[str, Any]:
        """The losses as a list; null where a run diverged."""
        tried = [{"lr": r, "loss": loss if math.isfinite(loss) else None} for r, loss in sorted(self.losses.items())]
        return {"chosen": self.rate, "tried": tried}


def rate_configs(settings: Settings) -> dict[tuple[str, float], TrainConfig]:
    """The runs that choose learning rates, by arm and rate."""
    return {
        (arm, rate): settings.config(arm, RATE_SEED, lr=rate, steps=settings.rate_steps)
        for arm in settings.tuned
        for rate in settings.rates
    }


def tune_rates(shop: Workshop) -> dict[str, Tuned]:
    """Trains and compares the rates of every arm that has none of its own.

    Raises `SctoolError` for an arm that diverged at every rate.
    """
    losses: dict[str, dict[float, float]] = {}
    for (arm, rate), config in rate_configs(shop.settings).items():
        shop.progress.note(f"trying {arm} at learning rate {rate:g}")
        result = train_run(shop, shop.rate_run(arm, rate), config)
        losses.setdefault(arm, {})[rate] = result.get("loss", math.inf)
    for arm, tried in losses.items():
        if not any(map(math.isfinite, tried.values())):
            own = shop.settings.arms[arm].own
            raise SctoolError(f"{arm} diverged at every rate of --rates; add smaller ones, or {own}:lr=RATE.")
    return {arm: Tuned(tried) for arm, tried in losses.items()}
