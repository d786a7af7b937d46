"""The committed pages of benchmarks have the texts that their scripts write; only the figures may differ."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sctool.core.fast import KEYS

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"benchmark_{name}"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return script("training")


def test_the_ways_of_drawing_that_fast_sampling_is_compared_to() -> None:
    fast = script("fast")
    assert fast.spread("0.3.9", 20) == (0, 3, 9)
    assert fast.spread("4", 20) == (0, 5, 10, 15)
    assert fast.spread("4^2", 20) == (0, 1, 5, 11)
    way = fast.parse("deepcache:dpm++:20:3", 3.0, 8)
    assert (way.name, way.config.scheduler, way.config.steps, way.interval) == ("deepcache-dpm++-20-3", "dpm++", 20, 3)
    assert way.config.key_steps == ()
    assert fast.parse("fast", 3.0, 8).config.key_steps == KEYS
    assert fast.parse("ddim:10:2", 3.0, 8).config.key_steps == (0, 5)


def test_an_images_cost_is_the_sum_over_its_calls() -> None:
    sampling = script("sampling")
    cost = sampling.Cost(first=5, step=3, between=2)
    assert cost.image(sampling.Way("base", "DDIM", 50)) == 5 + 49 * 3
    assert cost.image(sampling.Way("base", "DPM-Solver++", 20, fast=True)) == 5 + 8 * 3 + 11 * 2
    assert cost.image(sampling.Way(sampling.DEEPCACHE, "DPM-Solver++", 20)) == 5 + 6 * 3 + 13 * 2
    rows = sampling.images_table({"base": cost}, {}).splitlines()
    assert rows[2].startswith("| base: DDIM, 50 steps | 152 | 1.00x")
    assert any("DeepCache" in row and "not installed" in row for row in rows)


def test_the_page_of_a_training_steps_cost(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_figures(text: str) -> str:
        return re.sub(r"[\d.,]*\d", "#", re.sub(r"torch \S+\n", "torch\n", text))

    monkeypatch.setattr(training, "processor", lambda: "AMD EPYC")
    figures = {
        name: {"trainable": 1, "gflop": 1.0 if name == training.FULL else 0.5, "saved_mb": 1.0}
        for name in training.METHODS
    }
    seconds = {name: [0.5 if name == training.TUNER else 1.0] for name in training.METHODS}
    protocol = training.measured_how(False, "bf16", 64, 5)
    arguments = ["--repeats", "5", "--out", "docs/benchmarks-training.md"]
    page = training.report(figures, seconds, protocol, arguments)
    committed = (ROOT / "docs" / "benchmarks-training.md").read_text()
    assert without_figures(page) == without_figures(committed)
