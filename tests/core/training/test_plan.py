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
    frozen, activations = figures["frozen"] + folded, figures["activations_per_image"]
    assert figures["memory"] == 2 * activations + 2 * frozen + 4 * trainable * (1 + 1 + 2 + 1)
    assert (figures["images"], figures["held_out"], figures["batch"], figures["steps"]) == (9, 2, 6, 30)
    assert figures["epochs"] == pytest.approx(30 * 6 / 9)
    assert (figures["size"], figures["precision"]) == (32, "bf16")
