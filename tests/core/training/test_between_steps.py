"""What happens between steps: when validation is due, a loss that diverges, what is reported at the end."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from sctool.core.config import TrainConfig
from sctool.core.errors import SctoolError
from sctool.core.runs import Run
from sctool.core.training.log import Logger, LossMeter, StepFigures, Summary, refuse_divergence
from sctool.core.training.train import validation_due
from sctool.core.training.trainer import averaged


@pytest.mark.parametrize(
    ("validate", "sample", "due"),
    [(4, 0, [4, 8, 10]), (0, 3, [3, 6, 9, 10]), (4, 3, [3, 4, 6, 8, 9, 10]), (0, 0, []), (100, 0, [10])],
)
def test_validation_is_due_at_its_intervals_and_after_the_last_step(validate: int, sample: int, due: list[int]) -> None:
    config = TrainConfig(steps=10, validate_every=validate, sample_every=sample)
    assert [done for done in range(1, 11) if validation_due(done, config)] == due


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_diverges_ends_the_run_with_a_remedy(loss: float, tmp_path: Path) -> None:
    with pytest.raises(SctoolError, match=r"near step 30.*keeps its last good state.*lower lr"):
        refuse_divergence(loss, 30, Run(tmp_path))
    refuse_divergence(0.5, 30, Run(tmp_path))


def test_the_loss_of_a_row_is_the_mean_since_the_row_before() -> None:
    meter = LossMeter(Accelerator(), [1.0, 2.0])
    meter.add(torch.tensor(6.0))
    assert meter.since_last_row() == [1.0, 2.0, 6.0]
    assert meter.mean() == 3.0
    assert meter.since_last_row() == []
    meter.add(torch.tensor(5.0))
    assert meter.mean() == 5.0


def test_log_result_and_card_are_values_of_their_own(tmp_path: Path) -> None:
    last = StepFigures(step=20, loss=0.5, lr=1e-3, grad_norm=2.0, seconds=1.5)
    summary = Summary(20, "fp32", 1.25, last, {"val/loss": 0.6})
    assert summary.to_json() == {
        "step": 20, "loss": 0.5, "lr": 1e-3, "grad_norm": 2.0, "val/loss": 0.6, "steps": 20, "peak_memory_gb": 1.25,
        "precision": "fp32",
    }  # fmt: skip
    assert Summary(20, "fp32", 1.25).to_json() == {"steps": 20, "peak_memory_gb": 1.25, "precision": "fp32"}


def test_only_the_main_process_logs(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with (quiet := Logger(run, active=False)):
        quiet.row(1, {"loss": 1.0})
    assert not run.metrics.exists()
    with (logger := Logger(run, active=True)):
        logger.row(1, {"loss": 1.0})
    assert run.metrics.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_averaged_weights_are_in_force_inside_only() -> None:
    from diffusers.training_utils import EMAModel

    weight = torch.nn.Parameter(torch.zeros(2))
    ema = EMAModel([weight], decay=0.5)
    for value in (8.0, 8.0, 4.0):
        with torch.no_grad():
            weight.fill_(value)
        ema.step([weight])
    mean = ema.shadow_params[0].clone()
    assert not torch.equal(mean, weight)
    with averaged(ema, [weight]):
        assert torch.equal(weight, mean)
    assert (weight == 4).all()
    with averaged(None, [weight]):
        assert (weight == 4).all()
