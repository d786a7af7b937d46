"""What a table still has to do, and about how long it takes; nothing is written (`--dry-run`)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...core.config import TrainConfig
from ...core.runs import Run
from .collecting import chosen_configs, few_seeds, refuse_all_changed
from .measuring import available
from .rates import Tuned, rate_configs
from .running import base_drawing_piece, drawing_piece, training_piece
from .settings import FEWEST_SEEDS
from .workshop import Workshop


@dataclass(frozen=True)
class RowPlan:
    """The work of one arm, or of a base: runs with those for its learning rate, optimizer steps, images."""

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


def plan_table(shop: Workshop) -> dict[str, Any]:
    """The plan as one JSON value. Raises as `make_table` does before it trains."""
    settings, form = shop.settings, shop.settings.form
    counts = shop.work.count()
    metrics, notes = available(shop)
    tuned = _finished_rates(shop)
    refuse_all_changed(shop, tuned if len(tuned) == len(settings.tuned) else None)
    works: dict[str, list[_Work]] = {arm: [] for arm in settings.arms}
    for (arm, rate), config in rate_configs(settings).items():
        works[arm].append(_work(shop, shop.rate_run(arm, rate), config, images=0))
    for (arm, seed), config in chosen_configs(shop, tuned).items():
        works[arm].append(_work(shop, shop.run(arm, seed), config, seed=seed, images=settings.count))
    plans = _timed(shop, works)
    image_s = min((plan.image_s for plan in plans.values() if plan.image_s), default=0.0)
    plans |= {name: _base_plan(shop, name, image_s) for name in settings.bases}
    first = settings.first
    return {
        "table": form.name,
        "bases": settings.bases,
        "data": first.data,
        "cond": list(first.cond),
        "steps": first.steps,
        "batch": first.batch * first.accumulate,
        "seeds": settings.seeds,
        "rates": list(settings.rates),
        "images": settings.count,
        "metrics": list(metrics),
        "trainable": {arm: counts[arm]["trainable"] for arm in settings.arms},
        "rows": {name: {**asdict(plan), "seconds_left": plan.seconds_left} for name, plan in plans.items()},
        "seconds_left": sum(plan.seconds_left for plan in plans.values()),
        "notes": [*([few_seeds(settings.seeds)] if settings.seeds < FEWEST_SEEDS else []), *notes],
    }


def _finished_rates(shop: Workshop) -> dict[str, Tuned]:
    """The choices of learning rates that are complete."""
    losses: dict[str, dict[float, float | None]] = {}
    for (arm, rate), config in rate_configs(shop.settings).items():
        result = training_piece(shop.rate_run(arm, rate), config).result()
        losses.setdefault(arm, {})[rate] = None if result is None else result.get("loss", float("inf"))
    return {
        arm: Tuned({rate: loss for rate, loss in tried.items() if loss is not None})
        for arm, tried in losses.items()
        if None not in tried.values()
    }


def _work(shop: Workshop, run: Run, config: TrainConfig, *, images: int, seed: int = 0) -> _Work:
    trained, drawn = training_piece(run, config).result(), None
    done = max((int(state.name[5:]) for state in run.states()), default=0)
    if trained and "diverged" in trained:
        return _Work(0, 0, None, config.steps, None)
    if trained and images:
        drawn = drawing_piece(shop, run, seed).result()
    return _Work(0 if trained else config.steps - done, 0 if drawn else images, trained, config.steps, drawn)


def _timed(shop: Workshop, works: Mapping[str, list[_Work]]) -> dict[str, RowPlan]:
    """The plans, with the times of finished runs, or measured now for arms that have none."""
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
        shop.progress.note(f"timing a few steps and images of {', '.join(unknown)}")
    timed = shop.work.time(unknown) if unknown else {}
    nothing = (0.0, 0.0)
    return {
        name: RowPlan(
            runs=len(own),
            runs_left=sum(bool(w.steps_left or w.images_left) for w in own),
            steps_left=sum(w.steps_left for w in own),
            images_left=sum(w.images_left for w in own),
            step_s=steps[name] or timed.get(name, nothing)[0],
            image_s=images[name] or timed.get(name, nothing)[1],
            measured=name in unknown,
        )
        for name, own in works.items()
    }


def _base_plan(shop: Workshop, name: str, image_s: float) -> RowPlan:
    """A base's images take as long as those of the fastest arm."""
    seeds = range(shop.settings.seeds)
    left = [_base_is_drawn(shop, name, seed) for seed in seeds].count(False)
    return RowPlan(len(seeds), left, 0, left * shop.settings.count, 0.0, image_s, False)


def _base_is_drawn(shop: Workshop, name: str, seed: int) -> bool:
    """Whether the base's images for this seed are there; they are drawn like any run's that was trained on it."""
    arms = [arm.name for arm in shop.settings.arms.values() if arm.base == shop.settings.bases[name]]
    runs = [run for run in (shop.run(arm, seed) for arm in arms) if (run.path / "config.yaml").is_file()]
    return bool(runs) and base_drawing_piece(shop, name, seed, runs[0]).result() is not None


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
    width = max(10, *map(len, plan["rows"]))
    cond = f", with {', '.join(plan['cond'])} maps" if plan["cond"] else ""
    lines = [
        f"{'base':<{width}} {', '.join(plan['bases'].values())}; data {plan['data']}{cond}",
        f"{'work':<{width}} {plan['steps']} steps of {plan['batch']} images with {plan['seeds']} seeds{rates}; "
        f"{plan['images']} images drawn of each run",
    ]
    for name, row in plan["rows"].items():
        count = f"{plan['trainable'][name]:,} trained; " if name in plan["trainable"] else ""
        left = (
            f"{row['runs_left']} of {row['runs']} runs left, about {duration(row['seconds_left'])}"
            if row["runs_left"]
            else f"all {row['runs']} runs done"
        )
        step = f"{row['step_s']:.3g} s a step, " if row["steps_left"] else ""
        times = f" ({step}{row['image_s']:.3g} s an image)" if row["runs_left"] else ""
        lines.append(f"{name:<{width}} {count}{left}{times}")
    total = duration(plan["seconds_left"])
    lines.append(f"{'time':<{width}} about {total} of training and drawing; measuring comes on top")
    return "\n".join([*lines, *plan["notes"]])
