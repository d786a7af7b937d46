"""Training: exact resume after a kill, the same result from two processes, signals, precision, faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sctool.core.backbones.noising import Noising
from sctool.core.config import TrainConfig
from sctool.core.errors import SctoolError, UsageError
from sctool.core.runs import Run, open_run
from sctool.core.training.batches import training_draw
from sctool.core.training.train import BetweenSteps
from sctool.core.training.trainer import Trainer
from sctool.core.tuners import TUNERS

from .crashing import crash_before_step

QUICK = {
    "steps": 8, "batch": 4, "save_every": 3, "validate_every": 0, "sample_every": 0, "lr": 1e-2, "preview_steps": 2,
}  # fmt: skip
NEEDED = [(name, ("canny",) if row.control == "required" else ()) for name, row in TUNERS.items()]
"""Every method with the conditions that it cannot do without."""


def config(base: Path, data: Path, **more: object) -> TrainConfig:
    return TrainConfig(base=str(base), data=str(data), **{**QUICK, **more})  # pyright: ignore[reportArgumentType]


def trained(out: Path, settings: TrainConfig, name: str = "run") -> Run:
    from sctool.annotators.training_sets import open_training_sets
    from sctool.core.training.train import train
    from sctool.eval.heldout import adherence

    run = open_run(out, name, settings)
    source, held_out, made = open_training_sets(settings, 32, quiet=True)
    train(
        settings,
        run,
        source,
        held_out=held_out,
        measures=adherence(settings.conditions, made),
        map_meta=made,
        quiet=True,
    )
    return run


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    pairs = [f"{k}={v}" for k, v in QUICK.items()]
    words = ["-m", "sctool", "train", "--base", str(base), "--data", str(data), "--out", str(out), "--name", "run"]
    return [*words, *pairs, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.tuner)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_shares_of_a_batch_are_the_batch() -> None:
    settings = TrainConfig(batch=4, cond=("canny",), hint_dropout=0.5, caption_dropout=0.5)
    noising = Noising({"num_train_timesteps": 1000})
    whole = training_draw(settings, 7, (4, 2, 2), noising, slice(0, 4))
    parts = [training_draw(settings, 7, (4, 2, 2), noising, slice(a, a + 2)) for a in (0, 2)]
    assert torch.equal(whole.noise, torch.cat([p.noise for p in parts]))
    assert torch.equal(whole.t, torch.cat([p.t for p in parts]))
    assert torch.equal(whole.drop_hint["canny"], torch.cat([p.drop_hint["canny"] for p in parts]))


def test_a_killed_run_ends_bit_identical(tiny_base: Path, edges: Path, tmp_path: Path) -> None:
    settings = config(tiny_base, edges, cond=("canny",), ema=0.9)
    straight = trained(tmp_path / "a", settings)
    words = [sys.executable, *command(tiny_base, edges, tmp_path / "b", "--cond", "canny", "ema=0.9")]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL)
    state = tmp_path / "b" / "run" / "state"
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if any(state.glob("step-*/state.json")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    resumed = trained(tmp_path / "b", settings)
    assert same(weights(straight), weights(resumed))
    steps = [json.loads(line)["step"] for line in resumed.metrics.read_text().splitlines()]
    assert steps == sorted(set(steps)), "metrics of repeated steps were kept"


def rows_of(run: Run) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_the_log_after_a_crash_is_that_of_an_undisturbed_run(tiny_base: Path, edges: Path, tmp_path: Path) -> None:
    settings = config(tiny_base, edges, cond=("canny",), steps=14, validate_every=7)
    straight = trained(tmp_path / "a", settings)
    with crash_before_step(8):
        trained(tmp_path / "b", settings)
    resumed = trained(tmp_path / "b", settings)
    assert [row["step"] for row in rows_of(straight)] == [7, 10, 14, 14]
    assert rows_of(resumed) == rows_of(straight)
    assert same(weights(straight), weights(resumed))


@pytest.mark.parametrize(("method", "conditions"), NEEDED)
def test_a_crashed_run_of_every_method_ends_bit_identical(
    method: str, conditions: tuple[str, ...], tiny_base: Path, edges: Path, tmp_path: Path
) -> None:
    settings = config(tiny_base, edges, method=method, cond=conditions, steps=5, lr=1e-3, weight_decay=0.1)
    straight = trained(tmp_path / "a", settings)
    with crash_before_step(4):
        trained(tmp_path / "b", settings)
    assert Run(tmp_path / "b" / "run").states()
    assert same(weights(straight), weights(trained(tmp_path / "b", settings)))


def test_the_seconds_of_the_log_are_those_of_all_steps_and_of_nothing_else(
    tiny_base: Path, edges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def taking(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*values: Any) -> Any:
            now[0] += seconds
            return work(*values)

        return timed

    monkeypatch.setattr("sctool.core.training.train.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Trainer, "step", taking(1, Trainer.step))
    monkeypatch.setattr(BetweenSteps, "_held_out_losses", taking(50, BetweenSteps._held_out_losses))
    run = trained(tmp_path, config(tiny_base, edges, cond=("canny",), steps=12, validate_every=4))
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(row["step"], row["seconds"]) for row in rows if "seconds" in row] == [(10, 10), (12, 2)]


def test_more_steps_go_on_where_the_run_ended(tiny_base: Path, edges: Path, tmp_path: Path) -> None:
    straight = trained(tmp_path / "a", config(tiny_base, edges, cond=("canny",)))
    trained(tmp_path / "b", config(tiny_base, edges, cond=("canny",), steps=5))
    longer = trained(tmp_path / "b", config(tiny_base, edges, cond=("canny",)))
    assert same(weights(straight), weights(longer))


def test_accumulation_equals_one_large_batch_in_expectation(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    run = trained(tmp_path, config(tiny_base, pictures, accumulate=2, batch=2, steps=2, memory="minimum"))
    assert all(torch.isfinite(w).all() for w in weights(run).values())
    assert any(w.abs().sum() > 0 for k, w in weights(run).items() if ".up." in k), "the zero layer never moved"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_previews_validation_and_card(
    prediction: str, tmp_path: Path, edges: Path, base_maker: Callable[..., Path]
) -> None:
    base = base_maker(tmp_path / "base", prediction=prediction)
    settings = config(
        base,
        edges,
        cond=("canny",),
        steps=2,
        validate_every=1,
        sample_every=2,
        snr_gamma=5.0,
        hint_dropout=0.3,
        ema=0.5,
    )
    run = trained(tmp_path, settings)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    last = rows[-1]
    assert {"val/loss", "val/loss_0", "val/loss_3"} <= last.keys()
    assert any(key.startswith("val/canny_f1") for key in last), "adherence was not measured"
    assert (run.samples / "preview" / "step-2.png").is_file()
    assert "license: openrail" in (run.path / "README.md").read_text()
    assert list((run.path / "tb").iterdir())


@pytest.mark.parametrize("precision", ["bf16"])
def test_low_precision_keeps_fp32_tuners(precision: str, tiny_base: Path, edges: Path, tmp_path: Path) -> None:
    for method, more in (("scedit", {"cond": ("canny",)}), ("full", {})):
        run = trained(tmp_path, config(tiny_base, edges, method=method, precision=precision, steps=2, **more), method)
        assert {w.dtype for w in weights(run).values()} == {torch.float32}


def test_sigterm_saves_first(tiny_base: Path, edges: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        *command(tiny_base, edges, tmp_path, "--cond", "canny", "steps=100000", "save_every=100000"),
    ]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    deadline = time.monotonic() + 200
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 143, error
    assert "same command again" in error
    assert "Traceback" not in error
    assert Run(tmp_path / "run").states()


TWO_METHODS = [("scedit", ("canny",)), *NEEDED]
EVERY_METHOD = """
import json, sys
from accelerate import Accelerator
from sctool.cli import run
assert Accelerator().num_processes == 2
for words in json.loads(sys.argv[1]):
    assert run(words) == 0, words
"""


@pytest.fixture(scope="module")
def in_two_processes(tiny_base: Path, edges: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every method, trained by two processes that train one method after the other."""
    folder, commands = tmp_path_factory.mktemp("two"), []
    for number, (method, conditions) in enumerate(TWO_METHODS):
        control = ["--cond", ",".join(conditions)] if conditions else []
        words = command(tiny_base, edges, folder / str(number), "--method", method, "lr=1e-3", *control)
        commands.append(words[2:])
    script = folder / "every_method.py"
    script.write_text(EVERY_METHOD)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    words = [*launch, str(script), json.dumps(commands)]
    done = subprocess.run(words, env={**environment(), "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(TWO_METHODS)), ids=lambda number: "-".join(map(str, TWO_METHODS[number])))
def test_two_processes_equal_one(
    number: int, in_two_processes: Path, tiny_base: Path, edges: Path, tmp_path: Path
) -> None:
    method, conditions = TWO_METHODS[number]
    straight = trained(tmp_path, config(tiny_base, edges, cond=conditions, method=method, lr=1e-3))
    ours, theirs = weights(straight), weights(Run(in_two_processes / str(number) / "run"))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-4)


def test_other_settings_under_the_same_name_are_refused(tiny_base: Path, edges: Path, tmp_path: Path) -> None:
    open_run(tmp_path, "run", config(tiny_base, edges))
    with pytest.raises(UsageError, match=r"lr \(0.01 before, 0.5 now\)"):
        open_run(tmp_path, "run", config(tiny_base, edges, lr=0.5))


def test_a_run_in_training_is_locked(tiny_base: Path, edges: Path, tmp_path: Path) -> None:
    run = open_run(tmp_path, "run", config(tiny_base, edges))
    with run.locked(), pytest.raises(SctoolError, match="another process"), run.locked():
        pass


def test_disk_full_while_saving_keeps_the_last_state(
    tiny_base: Path, edges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    saved, real = [], safetensors.torch.save_file

    def full_disk(tensors: dict, path: Path, metadata: dict | None = None) -> None:
        if path.parent.name.startswith(".step"):
            if len(saved) > 4:
                raise safetensors.SafetensorError("No space left on device")
            saved.append(path)
        real(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(SctoolError, match="No space left on device"):
        trained(tmp_path, config(tiny_base, edges, cond=("canny",)))
    run = Run(tmp_path / "run")
    assert [p.name for p in run.states()] == ["step-3", "step-6"]
    assert not list((run.path / "state").glob(".*")), "a half-written state was left"
    monkeypatch.setattr(safetensors.torch, "save_file", real)
    assert same(
        weights(trained(tmp_path, config(tiny_base, edges, cond=("canny",)))),
        weights(trained(tmp_path / "x", config(tiny_base, edges, cond=("canny",)))),
    )


def test_starting_from_a_trained_tuner(tiny_base: Path, edges: Path, tmp_path: Path) -> None:
    first = trained(tmp_path, config(tiny_base, edges, cond=("canny",), steps=3), "first")
    second = config(tiny_base, edges, cond=("canny",), steps=1, lr=1e-12, init=str(first.path))
    for key, value in weights(trained(tmp_path, second, "second")).items():
        torch.testing.assert_close(value, weights(first)[key], rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="this run asks for"):
        trained(tmp_path, config(tiny_base, edges, steps=1, init=str(first.path)), "third")
    assert (tmp_path / "latest").read_text() == "second\n"


def test_a_start_brings_its_settings_unless_others_are_named(tiny_base: Path, edges: Path, tmp_path: Path) -> None:
    settings = {"cascade": "zero-heads", "ratio": 0.5}
    first = trained(tmp_path, config(tiny_base, edges, cond=("canny",), steps=1, tuner=settings), "first")
    more = {"cond": ("canny",), "steps": 1, "init": str(first.path)}
    assert weights(trained(tmp_path, config(tiny_base, edges, **more), "second")).keys() == weights(first).keys()
    trained(tmp_path, config(tiny_base, edges, tuner=settings, **more), "third")
    with pytest.raises(UsageError, match=r"zero-heads.*this run asks for.*zero-chain"):
        trained(tmp_path, config(tiny_base, edges, tuner={"ratio": 0.5}, **more), "fourth")
