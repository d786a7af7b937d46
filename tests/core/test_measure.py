"""What work costs: activations counted once, seconds in turns, memory; devices and precisions by name."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sctool.core import measure
from sctool.core.devices import best_device, choose_precision, torch_dtype
from sctool.core.measure import PeakMemory, in_turns, peak_so_far, saved_bytes


def test_activations_are_counted_once_and_weights_never() -> None:
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(3, 8)
    assert saved_bytes(layer, lambda: layer(x)) == 3 * 8 * 4, "the input, for the weight's gradient"
    assert saved_bytes(layer, lambda: layer(x) + layer(x)) == 3 * 8 * 4, "one storage, saved twice"
    hidden = 3 * 4 * 4
    assert saved_bytes(layer, lambda: layer(x).exp()) == 3 * 8 * 4 + hidden
    with torch.no_grad():
        assert saved_bytes(layer, lambda: layer(x)) == 0
    assert saved_bytes(nn.Identity(), lambda: layer(x)) >= 3 * 8 * 4


def test_backward_still_works_on_what_was_counted() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    outputs = []
    saved_bytes(layer, lambda: outputs.append(layer(x).square().sum()))
    outputs[0].backward()
    assert layer.weight.grad is not None


def clock(monkeypatch: pytest.MonkeyPatch, seconds_per_run: float) -> list[str]:
    """A clock that each piece of work moves on; returns the list of the pieces in the order of their runs."""
    runs: list[str] = []
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: seconds_per_run * len(runs)))
    return runs


def test_work_is_repeated_in_alternating_order_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = clock(monkeypatch, 1.0)
    seconds = {"a": iter([9.0, 1.0, 2.0, 30.0, 4.0, 5.0]), "b": iter([9.0, 10.0, 20.0, 30.0, 40.0, 500.0])}

    def work(name: str) -> float:
        runs.append(name)
        return next(seconds[name])

    medians = in_turns({name: lambda name=name: work(name) for name in seconds})
    assert medians == {"a": 4.0, "b": 30.0}, "of five repeats, the first run not counted"
    assert "".join(runs) == "ab" + "abbaabbaab"


@pytest.mark.parametrize(("repeats", "seconds", "expected"), [(9, 15.0, 4), (9, 60.0, 3), (9, 5.0, 9), (2, 99.0, 2)])
def test_slow_work_is_repeated_three_times_and_then_until_patience_ends(
    repeats: int, seconds: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = clock(monkeypatch, seconds)
    assert in_turns({"a": lambda: runs.append("a") or 1.0}, repeats=repeats, patience=50) == {"a": 1.0}
    assert len(runs) == 1 + expected


@pytest.mark.parametrize(("seconds", "expected"), [(20.0, 4), (20.2, 3)])
def test_patience_is_a_minute(seconds: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = clock(monkeypatch, seconds)
    in_turns({"a": lambda: runs.append("a") or 1.0}, repeats=9)
    assert len(runs) == 1 + expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_that_of_the_work() -> None:
    peak = PeakMemory("cpu")
    assert (peak.kind, PeakMemory("cuda").kind) == ("resident set", "cuda allocated")
    small = peak.of(lambda: None)
    large = peak.of(lambda: torch.ones(64 << 20, dtype=torch.uint8))
    if small is None or large is None:
        pytest.skip("this system cannot reset the high-water mark")
    assert 48 << 20 < large - small < 200 << 20
    assert peak_so_far(torch.device("cpu")) > 64 << 20
    assert peak_so_far(torch.device("cpu")) < 1 << 40


def test_precisions_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [torch_dtype(name) for name in ("fp32", "bf16", "fp16")] == [torch.float32, torch.bfloat16, torch.float16]
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        monkeypatch.setattr(torch.cuda, "is_available", lambda supported=supported: supported)
        assert choose_precision("auto", "cuda") == ("bf16" if supported else "fp16")
        assert choose_precision("auto", torch.device("cpu")) == "fp32"
        assert choose_precision("fp16", "cpu") == "fp16"
        assert best_device() == ("cuda" if supported else "cpu")
