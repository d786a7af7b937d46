"""A dry run's figures: what is trained and frozen, memory by its parts, epochs, and the split."""

from __future__ import annotations

from pathlib import Path

import pytest

from sctool.annotators.training_sets import open_training_sets
from sctool.core.config import TrainConfig
from sctool.core.training.plan import plan_run


def plan(base: Path, data: Path, **more: object) -> dict:
    values = {"base": str(base), "data": str(data), **more}
    settings = TrainConfig(**values)  # pyright: ignore[reportArgumentType]
    source, held_out, _ = open_training_sets(settings, 32, quiet=True)
    return plan_run(settings, source, held_out)


def test_memory_is_weights_gradients_moments_average_and_activations(tiny_base: Path, pictures: Path) -> None:
    figures = plan(
        tiny_base, pictures, batch=2, accumulate=3, steps=30, val_count=2, ema=0.9, precision="bf16"
    )  # fmt: skip
    trainable = sum(2 * c * c + 2 * c for c in [8] * 7 + [16] * 5)
    folded = 16 * (2 * 16 * 16 + 8 * 8)  # further weights of the three upsamplers in four phases of 2x2
    assert figures["trainable"] == trainable
    frozen, activations = figures["frozen"] + folded, figures["peak_per_image"]
    assert figures["activations_per_image"] < activations
    assert figures["memory"] == 2 * activations + 2 * frozen + 4 * trainable * (1 + 1 + 2 + 1)
    assert (figures["images"], figures["held_out"], figures["batch"], figures["steps"]) == (9, 2, 6, 30)
    assert figures["epochs"] == pytest.approx(30 * 6 / 9)
    assert (figures["size"], figures["precision"]) == (32, "bf16")


def test_trained_stored_and_total_parameters_are_apart(tiny_base: Path, edges: Path) -> None:
    trained = {}
    for method in ("full", "uni-controlnet", "elr"):
        cond = () if method == "full" else ("canny",)
        figures = plan(tiny_base, edges, method=method, cond=cond)
        trained[method] = figures["trainable"]
        assert figures["stored"] == figures["trainable"]
        replaced = figures["frozen"] if method == "full" else 0
        assert figures["total"] == figures["frozen"] + figures["trainable"] - replaced
    assert "the copy's weights are the base's own" in figures["sites"]
    assert trained["elr"] < trained["uni-controlnet"], "the copy is not the tuner's"
    plain = plan(tiny_base, edges, method="elr", cond=("canny",))["activations_per_image"]
    lean = plan(tiny_base, edges, method="elr", cond=("canny",), memory="minimum")["activations_per_image"]
    assert lean < 0.7 * plain


def test_the_total_of_several_tasks_counts_the_base_once(tiny_base: Path, edges: Path) -> None:
    from sctool.core.tasks import task_configs
    from sctool.core.training.lanes import TaskSet
    from sctool.core.training.plan import plan_tasks

    config = TrainConfig(
        base=str(tiny_base),
        data=str(edges),
        tasks=({"name": "a"}, {"name": "b"}),  # pyright: ignore[reportArgumentType]
    )
    sets = {task: TaskSet(*open_training_sets(own, 32, quiet=True)) for task, own in task_configs(config).items()}
    figures = plan_tasks(config, sets)
    assert figures["total"] == figures["frozen"] + figures["trainable"]
    assert figures["stored"] == figures["trainable"] == 2 * figures["tasks"]["a"]["trainable"]
