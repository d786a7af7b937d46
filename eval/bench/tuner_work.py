"""The work of a table of tuners: training them on frozen bases, drawing with them, counting and timing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.config import TrainConfig
from ...core.files import sha256
from ...core.runs import Run
from ..heldout import sample_heldout
from .cost import count_parameters, measure_costs, time_arms
from .workshop import Workshop


class TunerWork:
    """See `workshop.Work`."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop

    def train(self, run: Run, config: TrainConfig) -> None:
        """Trains the run to the end; goes on from its last resume state."""
        from ...core.training import train as training

        shop = self.shop
        training.train(
            config, run, shop.source, held_out=shop.held_out, map_meta=shop.maps, offline=shop.offline,
            quiet=shop.quiet,
        )  # fmt: skip

    def result(self, run: Run) -> str:
        """The hash of the tuner."""
        return sha256(run.tuner)

    def draw(self, run: Run, parent: Path, seed: int) -> None:
        """Draws with the tuner into parent/tuned."""
        self.draw_with(run, parent, seed, None)

    def draw_with(self, run: Run, parent: Path, seed: int, base: str | None) -> None:
        """Draws the table's captions for `seed` into a folder in `parent`, with another base where one is given."""
        shop, settings = self.shop, self.shop.settings
        sample_heldout(
            run, count=settings.count, sampling=settings.sampling, seed=settings.first_image(seed),
            which=(settings.form.drawn,), quiet=shop.quiet, offline=shop.offline, out=parent, repeat=True, base=base,
        )  # fmt: skip

    def count(self) -> dict[str, dict[str, int]]:
        """Parameters of bases and arms."""
        return count_parameters(self.shop)

    def costs(self, seed: int, configs: Mapping[str, TrainConfig]) -> dict[str, Any]:
        """Times in turns, and peak memory one by one."""
        return measure_costs(self.shop, configs)

    def time(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """A few steps in turns, and one batch of images each."""
        return time_arms(self.shop, names)
