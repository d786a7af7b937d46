"""The committed pages of benchmarks have the texts that their scripts write; only the figures may differ."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def training() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_training", ROOT / "benchmarks" / "training.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
