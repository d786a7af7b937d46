"""DiffScaler's table 1 (Nair et al. 2024): methods adapt one base to one data set with one budget.

Every method sees the same images in the same order with the same noise, since both are functions of the seed
(core/training/batches.py), and draws the same captions from the same noise. Only learning rates and a method's own
settings differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...core.config import TrainConfig
from ...core.errors import SctoolError
from ..report.compare import differing
from ..results import Figure
from .aggregate import INTERVAL, best, not_told_apart, seed_figure
from .cost import count_parameters, device_name, measure_costs
from .pieces import Piece
from .rates import Tuned, rate_configs, tune_rates
from .reference import IMAGES, real_statistics
from .running import held_out_loss, measured_base, measured_run, train_run
from .settings import FEWEST_SEEDS, OWN
from .workshop import Workshop, refuse_changed

BASE = "base"
PAPER_SETS = ("CUB", "Flowers", "FFHQ", "Caltech")
PAPER = {
    "Fine-Tuning": ("674M", 18.30, 20.07, 15.50, 45.99),
    "LoRA": ("47.7M", 30.97, 18.75, 22.46, 52.42),
    "DiffFit": ("0.48M", 19.75, 23.94, 30.00, 54.93),
    "DiffScaler": ("48.7M", 20.19, 18.07, 15.13, 51.46),
}
"""Table 1 of the paper: parameters, then FID by data set."""
PAPER_NOTE = (
    "Another protocol, so not comparable with the figures above: FID at 256 px with DiT-XL/2, 50,000 steps, "
    "5,000 samples, one seed, no intervals."
)
PER_SEED = ("seeds", "prompts_sha256")
"""Parts of a distance's protocol that differ between seeds; between methods nothing may."""


@dataclass
class Row:
    """One method, or the untouched base: its figures over the seeds, by key, and its values by seed."""

    name: str
    parameters: dict[str, int]
    lr: float | None = None
    own: dict[str, Any] = field(default_factory=dict)
    """Settings in which it differs from the defaults, written for it alone."""
    figures: dict[str, Figure] = field(default_factory=dict)
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    diverged: list[int] = field(default_factory=list)
    """Seeds with which its training diverged; it then has no figures of quality."""

    def add(self, key: str, seed: int, value: float | None) -> None:
        """One value of one seed; None where it could not be measured."""
        if value is not None:
            self.values.setdefault(key, {})[seed] = value


@dataclass
class TransferTable:
    """The finished table: a row for the base and one for each method."""

    protocol: dict[str, Any]
    base: Row
    rows: list[Row]
    tuned: dict[str, Tuned]
    notes: list[str]

    def figures(self, key: str) -> dict[str, Figure]:
        """One figure of every method that has it."""
        return {row.name: row.figures[key] for row in self.rows if key in row.figures}

    @property
    def keys(self) -> list[str]:
        """The figures that some row has, in the table's order."""
        return list(dict.fromkeys(key for row in (*self.rows, self.base) for key in row.figures))

    def best(self, key: str) -> str | None:
        """The method that is better than all others in this figure beyond the intervals; None where there is none.

        Where a method diverged or could not be measured, it has lost; the others are still compared.
        """
        return best(self.figures(key))

    def not_told_apart(self, key: str) -> list[tuple[str, str]]:
        """Pairs of rows, the base among them, whose intervals overlap."""
        base = {BASE: self.base.figures[key]} if key in self.base.figures else {}
        return not_told_apart({**base, **self.figures(key)})

    def example(self, key: str) -> Figure:
        """Any row's figure with this key, for its name and direction."""
        return next(row.figures[key] for row in (*self.rows, self.base) if key in row.figures)

    def to_json(self) -> dict[str, Any]:
        """Everything as one JSON value."""
        return {
            "table": "transfer",
            "protocol": self.protocol,
            "base": _row_json(self.base),
            "methods": {row.name: _row_json(row) for row in self.rows},
            "best": {key: self.best(key) for key in self.keys},
            "not_told_apart": {key: self.not_told_apart(key) for key in self.keys},
            "rates": {method: tuned.to_json() for method, tuned in self.tuned.items()},
            "notes": self.notes,
            "paper": {"sets": PAPER_SETS, "fid": PAPER, "note": PAPER_NOTE},
        }


def _row_json(row: Row) -> dict[str, Any]:
    figures = {
        key: {
            "name": figure.name,
            "better": figure.better,
            "mean": figure.value,
            "interval": figure.interval,
            "values": {str(seed): value for seed, value in row.values[key].items()},
            "protocol": figure.protocol,
        }
        for key, figure in row.figures.items()
    }
    return {
        "parameters": row.parameters, "lr": row.lr, "settings": row.own, "figures": figures, "diverged": row.diverged
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------- running


def chosen_configs(shop: Workshop, tuned: Mapping[str, Tuned]) -> dict[tuple[str, int], TrainConfig]:
    """The table's runs by method and seed, all methods of a seed before the next seed."""
    rates = {method: choice.rate for method, choice in tuned.items()}
    settings = shop.settings
    return {
        (method, seed): settings.config(method, seed, lr=rates.get(method))
        for seed in range(settings.seeds)
        for method in settings.methods
    }


def refuse_all_changed(shop: Workshop, tuned: Mapping[str, Tuned] | None = None) -> None:
    """Raises `UsageError` for the first run that exists with other settings.

    Without `tuned`, the runs whose learning rate is yet to be chosen are left out.
    """
    for config in rate_configs(shop.settings):
        refuse_changed(shop.rate_run(config), config)
    for (method, _), config in chosen_configs(shop, tuned or {}).items():
        if tuned is not None or method not in shop.settings.tuned:
            refuse_changed(shop.run(config), config)


def transfer(shop: Workshop) -> TransferTable:
    """Trains, draws and measures what is not done yet, and returns the table.

    Raises `UsageError` for a method that does not fit the base and for runs with other settings, both before anything
    is trained.
    """
    settings = shop.settings
    parameters = count_parameters(shop, {method: settings.config(method, 0) for method in settings.methods})
    refuse_all_changed(shop)
    if settings.seeds < FEWEST_SEEDS:
        shop.progress.note(few_seeds(settings.seeds))
    tuned = tune_rates(shop)
    refuse_all_changed(shop, tuned)
    collected = _Collected(shop, tuned, parameters)
    real = real_statistics(shop)
    for seed in range(settings.seeds):
        collected.seed(seed, real)
    return collected.table()


def few_seeds(seeds: int) -> str:
    """What a reader must know of a table with too few seeds."""
    return f"--seeds {seeds}: no interval and no winner; give at least {FEWEST_SEEDS}."


class _Collected:
    """The values of a table as they come in, seed by seed."""

    def __init__(self, shop: Workshop, tuned: dict[str, Tuned], parameters: Mapping[str, dict[str, int]]) -> None:
        self.shop, self.tuned, self.notes = shop, tuned, list[str]()
        self.configs = chosen_configs(shop, tuned)
        self.rows = {name: self._row(name, parameters[name]) for name in shop.settings.methods}
        size = next(iter(parameters.values()))["base"]
        self.base = Row(BASE, {"trainable": 0, "stored": 0, "base": size, "total": size})
        self.distances: dict[int, dict[str, dict[str, Any]]] = {}
        self.cost_protocol: dict[str, Any] = {}

    def _row(self, name: str, parameters: dict[str, int]) -> Row:
        config = self.configs[name, 0].model_dump(mode="json")
        keys = dict.fromkeys(pair.partition("=")[0].split(".")[0] for pair in self.shop.settings.own.get(name, ()))
        own = {key: config[key] for key in OWN if key in keys and key != "lr"}
        return Row(name, parameters, config["lr"], own)

    def seed(self, seed: int, real: Any) -> None:
        """Costs, then training, drawing and measuring with every method, then the base's images."""
        settings, trained = self.shop.settings, None
        configs = {method: self.configs[method, seed] for method in settings.methods}
        self._add_costs(seed, configs)
        for method, config in configs.items():
            run = self.shop.run(config)
            self.shop.progress.note(f"{method}, seed {seed} ({seed + 1} of {settings.seeds})")
            if "diverged" in train_run(self.shop, run, config):
                self.rows[method].diverged.append(seed)
                continue
            trained = run
            self.rows[method].add("loss", seed, held_out_loss(run, config.steps))
            self._add_distance(self.rows[method], seed, measured_run(self.shop, run, seed, real))
        if trained is not None:
            self._add_distance(self.base, seed, measured_base(self.shop, trained, seed, real))

    def _add_costs(self, seed: int, configs: dict[str, TrainConfig]) -> None:
        def work() -> dict[str, Any]:
            self.shop.progress.note(f"timing the methods in turns, seed {seed}")
            return measure_costs(self.shop, configs)

        identity: dict[str, Any] = {name: config.model_dump(mode="json") for name, config in configs.items()}
        identity["device"] = device_name(self.shop.device)
        costs = Piece(self.shop.out / f"cost-seed{seed}.json", identity).do(work)
        self.cost_protocol = costs["protocol"]
        for name, cost in costs["methods"].items():
            for key, value in cost.items():
                self.rows[name].add(key, seed, value)

    def _add_distance(self, row: Row, seed: int, measured: dict[str, Any]) -> None:
        row.add("distance", seed, measured["value"])
        self.distances.setdefault(seed, {})[row.name] = measured
        self.notes += [note for note in measured["notes"] if note not in self.notes]

    def table(self) -> TransferTable:
        """The rows with their figures over the seeds."""
        name, distance_protocol = self._distance_protocol()
        described = {
            "distance": (name, "lower", distance_protocol),
            "loss": ("held-out loss", "lower", {"images": "held out", "step": "the last"}),
            "step_s": ("step (s)", "lower", self.cost_protocol),
            "peak_bytes": ("peak memory", "lower", self.cost_protocol),
        }
        for row in (*self.rows.values(), self.base):
            for key, (label, better, protocol) in described.items():
                complete = not row.diverged or key in ("step_s", "peak_bytes")
                if key in row.values and complete:
                    row.figures[key] = seed_figure(key, label, better, row.values[key], protocol)
        return TransferTable(self._protocol(), self.base, list(self.rows.values()), self.tuned, self._notes())

    def _distance_protocol(self) -> tuple[str, dict[str, Any]]:
        """Name and protocol of the distances. Raises `SctoolError` where any two were measured differently."""
        found: list[dict[str, Any]] = []
        for by_row in self.distances.values():
            protocols = [measured["protocol"] for measured in by_row.values()]
            _refuse_different(protocols)
            found.append({key: value for key, value in protocols[0].items() if key not in PER_SEED})
        _refuse_different(found)
        first = next((one for by_row in self.distances.values() for one in by_row.values()), None)
        return (first["name"], found[0]) if first else ("distance", {})

    def _protocol(self) -> dict[str, Any]:
        settings = self.shop.settings
        config = self.configs[settings.methods[0], 0].model_dump(mode="json")
        shared = {key: value for key, value in config.items() if key not in (*OWN, "method", "seed")}
        return {
            "seeds": list(range(settings.seeds)),
            "training": {**shared, "size": self.shop.size},
            "interval": INTERVAL,
            "samples": settings.count,
            "sampling": settings.sampling.model_dump(mode="json"),
            "prompts": "held-out captions or classes in order, repeated with further seeds where there are fewer; "
            "data without marked splits holds out other images with each seed",
            "reference": IMAGES,
            "distance": self._distance_protocol()[1],
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
        for method, tuned in self.tuned.items():
            if tuned.at_the_edge:
                notes.append(f"{method}: {tuned.rate:g} is the last of the rates tried; wider --rates may do better.")
        return notes


def _refuse_different(protocols: list[dict[str, Any]]) -> None:
    """Raises `SctoolError` naming the keys in which protocols differ."""
    if protocols and (keys := differing(protocols)):
        differ = ", ".join(f"{key} ({' / '.join(map(str, dict.fromkeys(map(str, v))))})" for key, v in keys.items())
        raise SctoolError(
            f"runs of this table were measured differently: {differ}. Remove the measured.json files in its folders "
            "and run the same command again."
        )
