"""Making a table: everything that is not done yet is trained, drawn and measured, seed by seed.

Every arm sees the same images in the same order with the same noise, since both are functions of the seed
(core/training/batches.py), and draws the same captions from the same noise. Only learning rates and an arm's own
settings differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.config import TrainConfig
from ...core.runs import Run
from .aggregate import INTERVAL, PAIRED, seed_figure
from .cost import device_name
from .form import OWN
from .measuring import TO_BASE, available, measure, measure_to_base, shared_protocol
from .pieces import Piece
from .rates import Tuned, rate_configs, tune_rates
from .reference import IMAGES, real_statistics
from .running import BASE, draw_base, draw_run, drawn_images, held_out_loss, train_run
from .settings import FEWEST_SEEDS
from .table import COSTS, Row, Table
from .workshop import Workshop, refuse_changed

COST_NAMES = {
    "step_s": ("training step (s)", "lower"),
    "sample_step_s": ("sampling step (s)", "lower"),
    "peak_bytes": ("peak memory", "lower"),
}


def chosen_configs(shop: Workshop, tuned: Mapping[str, Tuned]) -> dict[tuple[str, int], TrainConfig]:
    """The table's runs by arm and seed, all arms of a seed before the next seed."""
    rates = {arm: choice.rate for arm, choice in tuned.items()}
    settings = shop.settings
    return {
        (arm, seed): settings.config(arm, seed, lr=rates.get(arm))
        for seed in range(settings.seeds)
        for arm in settings.arms
    }


def refuse_all_changed(shop: Workshop, tuned: Mapping[str, Tuned] | None = None) -> None:
    """Raises `UsageError` for the first run that exists with other settings.

    Without `tuned`, the runs whose learning rate is yet to be chosen are left out.
    """
    for (arm, rate), config in rate_configs(shop.settings).items():
        refuse_changed(shop.rate_run(arm, rate), config)
    for (arm, seed), config in chosen_configs(shop, tuned or {}).items():
        if tuned is not None or arm not in shop.settings.tuned:
            refuse_changed(shop.run(arm, seed), config)


def make_table(shop: Workshop) -> Table:
    """Trains, draws and measures what is not done yet, and returns the table.

    Raises `UsageError` for an arm that does not fit its base and for runs with other settings, both before anything
    is trained.
    """
    settings = shop.settings
    parameters = shop.work.count()
    refuse_all_changed(shop)
    metrics, notes = available(shop)
    for note in notes:
        shop.progress.note(note)
    if settings.seeds < FEWEST_SEEDS:
        shop.progress.note(few_seeds(settings.seeds))
    real = real_statistics(shop)  # before hours of training: it needs the weights of the features
    tuned = tune_rates(shop)
    refuse_all_changed(shop, tuned)
    collected = _Collected(shop, tuned, parameters, real, metrics, notes)
    for seed in range(settings.seeds):
        collected.seed(seed)
    return collected.table()


def few_seeds(seeds: int) -> str:
    """What a reader must know of a table with too few seeds."""
    return f"--seeds {seeds}: no interval and no winner; give at least {FEWEST_SEEDS}."


class _Collected:
    """The values of a table as they come in, seed by seed."""

    def __init__(
        self, shop: Workshop, tuned: dict[str, Tuned], parameters: Mapping[str, dict[str, int]], real: Path,
        metrics: tuple[str, ...], notes: list[str],
    ) -> None:  # fmt: skip
        self.shop, self.tuned, self.real, self.metrics, self.notes = shop, tuned, real, metrics, list(notes)
        self.form, self.configs = shop.settings.form, chosen_configs(shop, tuned)
        self.bases = {name: Row(name, parameters[name]) for name in shop.settings.bases}
        self.rows = {name: self._row(name, parameters[name]) for name in shop.settings.arms}
        self.measured: dict[str, list[dict[str, Any]]] = {}
        """Every measured figure by key."""
        self.cost_protocol: dict[str, Any] = {}

    @property
    def all_rows(self) -> dict[str, Row]:
        return {**self.bases, **self.rows}

    def _row(self, name: str, parameters: dict[str, int]) -> Row:
        settings, config = self.shop.settings, self.configs[name, 0].model_dump(mode="json")
        arm = settings.arms[name].own
        pairs = [pair.partition("=") for pair in (*self.form.recipe(arm), *settings.own.get(arm, ()))]
        written = {key.split(".")[0]: value for key, _, value in pairs}
        own = {k: text if config.get(k) is None else config[k] for k, text in written.items() if k != "lr"}
        return Row(name, parameters, config["lr"], own)

    # -------------------------------------------------------------------------------------------------- running

    def seed(self, seed: int) -> None:
        """Costs, then training, drawing and measuring with every arm, then the bases' images."""
        shop, settings = self.shop, self.shop.settings
        if not self.form.timed_after:
            self._add_costs(seed, list(settings.arms))
        trained: dict[str, Run] = {}
        for arm in settings.arms:
            config, run = self.configs[arm, seed], shop.run(arm, seed)
            shop.progress.note(f"{arm}, seed {seed} ({seed + 1} of {settings.seeds})")
            if "diverged" in train_run(shop, run, config):
                self.rows[arm].diverged.append(seed)
                continue
            trained[arm] = run
            if self.form.loss:
                self.rows[arm].add("loss", seed, held_out_loss(run, config.steps))
            self._measure(self.rows[arm], seed, draw_run(shop, run, seed), drawn_images(shop, run))
        self._add_bases(seed, trained)
        if self.form.timed_after and trained:
            self._add_costs(seed, list(trained))

    def _measure(self, row: Row, seed: int, drawn: Piece, samples: Path) -> None:
        self._add(row, seed, measure(self.shop, drawn, samples, self.real, self.metrics))

    def _add_bases(self, seed: int, trained: Mapping[str, Run]) -> None:
        """The images of every base on which an arm was trained, and where wanted how far that arm's are from them."""
        shop = self.shop
        for name, base in shop.settings.bases.items():
            runs = {arm: run for arm, run in trained.items() if shop.settings.arms[arm].base == base}
            if not runs:
                continue
            drawn, samples = draw_base(shop, name, seed, next(iter(runs.values()))), shop.base_images(name, seed) / BASE
            self._measure(self.bases[name], seed, drawn, samples)
            for arm, run in runs.items() if self.form.to_base else ():
                own = draw_run(shop, run, seed)
                self._add(self.rows[arm], seed, measure_to_base(shop, own, drawn_images(shop, run), drawn, samples))

    def _add_costs(self, seed: int, arms: list[str]) -> None:
        shop = self.shop
        configs = {arm: self.configs[arm, seed] for arm in arms}

        def work() -> dict[str, Any]:
            shop.progress.note(f"timing all {self.form.arms} in turns, seed {seed}")
            return shop.work.costs(seed, configs)

        identity: dict[str, Any] = {name: config.model_dump(mode="json") for name, config in configs.items()}
        identity |= {"device": device_name(shop.device), "figures": COSTS, "sampling": shop.settings.sampling.batch}
        costs = Piece(shop.out / f"cost-seed{seed}.json", identity).do(work)
        self.cost_protocol = costs["protocol"]
        for name, cost in costs["rows"].items():
            for key, value in cost.items():
                self.all_rows[name].add(key, seed, value)

    def _add(self, row: Row, seed: int, measured: dict[str, Any]) -> None:
        for key, figure in measured["figures"].items():
            row.add(key, seed, figure["value"])
            self.measured.setdefault(key, []).append(figure)
        self.notes += [note for note in measured["notes"] if note not in self.notes]

    # ------------------------------------------------------------------------------------------------ the result

    def table(self) -> Table:
        """The rows with their figures over the seeds."""
        described = self._described()
        for row in self.all_rows.values():
            for key, (label, better, protocol) in described.items():
                if key in row.values and (not row.diverged or key in COSTS):
                    row.figures[key] = seed_figure(key, label, better, row.values[key], protocol)
        protocol = self._protocol({key: protocol for key, (_, _, protocol) in described.items()})
        bases, rows = list(self.bases.values()), list(self.rows.values())
        return Table(self.form, protocol, bases, rows, self.tuned, self._notes())

    def _described(self) -> dict[str, tuple[str, str, dict[str, Any]]]:
        """Name, better direction and protocol of every figure, in the table's order.

        Raises `SctoolError` where any two of a figure were measured differently.
        """
        own_models = len(self.bases) > 1 or self.form.to_base
        described = {}
        for key, found in self.measured.items():
            protocol = shared_protocol([figure["protocol"] for figure in found], own_models=own_models)
            described[key] = (found[0]["name"], found[0]["better"], protocol)
        if self.form.loss:
            described["loss"] = ("held-out loss", "lower", {"images": "held out", "step": "the last"})
        return described | {key: (*names, self.cost_protocol) for key, names in COST_NAMES.items()}

    def _protocol(self, figures: dict[str, Any]) -> dict[str, Any]:
        settings = self.shop.settings
        configs = [settings.config(arm, 0).model_dump(mode="json") for arm in settings.arms]
        left_out = (*OWN, "method", "base", "seed")
        shared = {
            key: value
            for key, value in configs[0].items()
            if key not in left_out and all(config.get(key) == value for config in configs)
        }
        return {
            "seeds": list(range(settings.seeds)),
            "bases": settings.bases,
            "training": {**shared, "size": self.shop.size},
            "interval": INTERVAL,
            "differences": PAIRED,
            "samples": settings.count,
            "sampling": settings.sampling.model_dump(mode="json"),
            "prompts": "held-out captions or classes in order, repeated with further seeds where there are fewer; "
            "data without marked splits holds out other images with each seed",
            "reference": IMAGES,
            **{key: protocol for key, protocol in figures.items() if key not in (*COSTS, "loss", TO_BASE)},
            "cost": self.cost_protocol,
        }

    def _notes(self) -> list[str]:
        notes = list(self.notes)
        if self.shop.settings.seeds < FEWEST_SEEDS:
            notes.insert(0, few_seeds(self.shop.settings.seeds))
        for row in self.rows.values():
            if row.diverged:
                seeds = ", ".join(map(str, row.diverged))
                notes.append(f"{row.name} diverged with seed {seeds}, so it has no figures of quality.")
        for arm, tuned in self.tuned.items():
            if tuned.at_the_edge:
                notes.append(f"{arm}: {tuned.rate:g} is the last of the rates tried; wider --rates may do better.")
        return notes
