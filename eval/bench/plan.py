"""What a table still has to do, and about how long it takes; nothing is written (`--dry-run`)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...core.config import TrainConfig
from ...core.measure import in_turns
from ...core.runs import Run
from .cost import Contender, count_parameters
from .rates import Tuned, rate_configs
from .running import FOLDER, base_folder, drawing_piece, training_piece
from .settings import FEWEST_SEEDS
from .transfer import BASE, chosen_configs, few_seeds, refuse_all_changed
from .workshop import Workshop

REPEATS = 3
"""Steps of each method that are timed."""
PATIENCE = 20.0
"""Seconds after which no further repeat is begun."""


@dataclass(frozen=True)
class MethodPlan:
    """The work of one method, or of the base: runs with those for its learning rate, optimizer steps, images."""

    runs: int
    runs_left: int
    steps_left: int
    images_left: int
    step_s: float
    """Seconds of a step; 0 where none is left."""
    image_s: float
    """Seconds of drawing an image; 0 where none is left."""
    measured: bool
    """Whether these times were measured now; otherwise they are those of finished runs."""

    @property
    def seconds_left(self) -> float:
        """Training and drawing; measuring the images comes on top."""
        return self.steps_left * self.step_s + self.images_left * self.image_s


@dataclass(frozen=True)
class _Work:
    """One run with what is left of it, and its finished pieces."""

    steps_left: int
    images_left: int
    trained: dict[str, Any] | None
    steps: int
    drawn: dict[str, Any] | None


def plan_transfer(shop: Workshop) -> dict[str, Any]:
    """The plan as one JSON value. Raises as `transfer` does before it trains."""
    settings = shop.settings
    counts = count_parameters(shop, {method: settings.config(method, 0) for method in settings.methods})
    tuned = _finished_rates(shop)
    refuse_all_changed(shop, tuned if len(tuned) == len(settings.tuned) else None)
    works: dict[str, list[_Work]] = {method: [] for method in settings.methods}
    for config in rate_configs(settings):
        works[config.method].append(_work(shop, shop.rate_run(config), config, images=0))
    for (method, seed), config in chosen_configs(shop, tuned).items():
        works[method].append(_work(shop, shop.run(config), config, seed=seed, images=settings.count))
    plans = _timed(shop, works)
    plans[BASE] = _base_plan(shop, plans)
    first = settings.config(settings.methods[0], 0)
    total = sum(plan.seconds_left for plan in plans.values())
    return {
        "base": first.base,
        "data": first.data,
        "steps": first.steps,
        "batch": first.batch * first.accumulate,
        "seeds": settings.seeds,
        "rates": list(settings.rates),
        "images": settings.count,
        "trainable": {method: counts[method]["trainable"] for method in settings.methods},
        "methods": {name: {**asdict(plan), "seconds_left": plan.seconds_left} for name, plan in plans.items()},
        "seconds_left": total,
        "notes": [few_seeds(settings.seeds)] if settings.seeds < FEWEST_SEEDS else [],
    }


def _finished_rates(shop: Workshop) -> dict[str, Tuned]:
    """The choices of learning rates that are complete."""
    losses: dict[str, dict[float, float | None]] = {}
    for config in rate_configs(shop.settings):
        result = training_piece(shop.rate_run(config), config).result()
        loss = None if result is None else result.get("loss", float("inf"))
        losses.setdefault(config.method, {})[config.lr or 0] = loss
    return {
        method: Tuned({rate: loss for rate, loss in tried.items() if loss is not None})
        for method, tried in losses.items()
        if None not in tried.values()
    }


def _work(shop: Workshop, run: Run, config: TrainConfig, *, images: int, seed: int = 0) -> _Work:
    trained, drawn = training_piece(run, config).result(), None
    done = max((int(state.name[5:]) for state in run.states()), default=0)
    if trained and "diverged" in trained:
        return _Work(0, 0, None, config.steps, None)
    if trained and images:
        drawn = drawing_piece(shop, run, seed, "tuned", run.path / FOLDER).result()
    return _Work(0 if trained else config.steps - done, 0 if drawn else images, trained, config.steps, drawn)


def _timed(shop: Workshop, works: Mapping[str, list[_Work]]) -> dict[str, MethodPlan]:
    """The plans, with the times of finished runs, or measured now for methods that have none."""
    steps = {name: _median(w.trained["seconds"] / w.steps for w in own if w.trained) for name, own in works.items()}
    images = {
        name: _median(w.drawn["seconds"] / shop.settings.count for w in own if w.drawn) for name, own in works.items()
    }
    unknown = [
        name
        for name, own in works.items()
        if (steps[name] is None and any(w.steps_left for w in own))
        or (images[name] is None and any(w.images_left for w in own))
    ]
    if unknown:
        shop.progress.note("timing a few steps and images of each method")
    contenders = {name: Contender(shop, shop.settings.config(name, 0)) for name in unknown}
    timed = in_turns({name: one.step for name, one in contenders.items()}, REPEATS, PATIENCE)
    drawn = {name: one.draw(shop.settings.sampling) for name, one in contenders.items()}
    return {
        name: MethodPlan(
            runs=len(own),
            runs_left=sum(bool(w.steps_left or w.images_left) for w in own),
            steps_left=sum(w.steps_left for w in own),
            images_left=sum(w.images_left for w in own),
            step_s=steps[name] or timed.get(name, 0.0),
            image_s=images[name] or drawn.get(name, 0.0),
            measured=name in unknown,
        )
        for name, own in works.items()
    }


def _base_plan(shop: Workshop, plans: Mapping[str, MethodPlan]) -> MethodPlan:
    """The base's images take as long as those of the fastest method."""
    seeds = range(shop.settings.seeds)
    drawn = [_base_is_drawn(shop, seed) for seed in seeds]
    image_s = min((plan.image_s for plan in plans.values() if plan.image_s), default=0.0)
    left = drawn.count(False)
    return MethodPlan(len(seeds), left, 0, left * shop.settings.count, 0.0, image_s, False)


def _base_is_drawn(shop: Workshop, seed: int) -> bool:
    """Whether the base's images for this seed are there; they are drawn like any trained run's."""
    runs = (shop.run(shop.settings.config(method, seed)) for method in shop.settings.methods)
    run = next((run for run in runs if run.tuner.is_file()), None)
    return run is not None and drawing_piece(shop, run, seed, BASE, base_folder(shop, seed)).result() is not None


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


# ---------------------------------------------------------------------------------------------------- showing


def duration(seconds: float) -> str:
    """ "45 s", "12 min" or "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def show_plan(plan: Mapping[str, Any]) -> str:
    """The plan as lines for a person."""
    rates = f", after choosing a learning rate among {len(plan['rates'])}" if plan["rates"] else ""
    lines = [
        f"base       {plan['base']}, adapted to {plan['data']}",
        f"work       {plan['steps']} steps of {plan['batch']} images with {plan['seeds']} seeds{rates}; "
        f"{plan['images']} images drawn of each run",
    ]
    for name, method in plan["methods"].items():
        count = f"{plan['trainable'][name]:,} trained; " if name in plan["trainable"] else ""
        left = (
            f"{method['runs_left']} of {method['runs']} runs left, about {duration(method['seconds_left'])}"
            if method["runs_left"]
            else f"all {method['runs']} runs done"
        )
        step = f"{method['step_s']:.3g} s a step, " if method["steps_left"] else ""
        times = f" ({step}{method['image_s']:.3g} s an image)" if method["runs_left"] else ""
        lines.append(f"{name:<10} {count}{left}{times}")
    lines.append(f"time       about {duration(plan['seconds_left'])} of training and drawing; measuring comes on top")
    return "\n".join([*lines, *plan["notes"]])
