"""One step, resume states, the log and validation, on stand-ins that are small enough to compute by hand."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from sctool.core.backbones.noising import Noising
from sctool.core.config import TrainConfig
from sctool.core.data.records import BytesBlob, Record, Source
from sctool.core.errors import SctoolError
from sctool.core.progress import Progress
from sctool.core.runs import Run
from sctool.core.training.batches import StepBatches, collate, training_draw, validation_draw
from sctool.core.training.log import Logger, LossMeter, StepFigures, Summary, refuse_divergence
from sctool.core.training.seeds import generator
from sctool.core.training.splits import split_records
from sctool.core.training.state import load_state, save_state
from sctool.core.training.train import validation_due
from sctool.core.training.trainer import Trainer, averaged
from sctool.core.training.validate import Validator

NOISING = Noising({"num_train_timesteps": 1000})


class Accelerator:
    """One process on the CPU."""

    device, process_index, num_processes = torch.device("cpu"), 0, 1

    def __init__(self) -> None:
        self.unshared = 0

    def no_sync(self, net: nn.Module) -> Any:
        self.unshared += 1
        return nullcontext()

    def reduce(self, values: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "mean"
        return values


class Images(list):
    """Prepared images: the latent of image i is i everywhere."""

    latent_shape = (1, 1, 2)

    def __init__(self, count: int) -> None:
        super().__init__(
            {
                "key": f"key {i}",
                "caption": f"caption {i}",
                "mean": torch.full((1, 1, 2), float(i)),
                "std": torch.zeros(1, 1, 2),
                "text": {"prompt_embeds": torch.full((2, 3), float(i))},
                "hints": {"canny": torch.full((3, 8, 8), i, dtype=torch.uint8)},
            }
            for i in range(count)
        )
        self.null_rows = {"prompt_embeds": torch.full((2, 3), -1.0)}


class Steps:
    """A training of one weight, whose gradient is the mean latent of the batch; notes what the objective was given."""

    def __init__(self, count: int = 10, start: int = 0, lr: float = 0.5, **settings: Any) -> None:
        self.config = TrainConfig(**{"batch": 4, "steps": 6, **settings})
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.batches: list[list[int]] = []
        self.draws: list[Any] = []
        images = Images(count)
        self.training = SimpleNamespace(
            config=self.config,
            accelerator=Accelerator(),
            lanes=[
                SimpleNamespace(
                    name=None,
                    config=self.config,
                    data=SimpleNamespace(train=images, latent_shape=images.latent_shape),
                    parameters=[self.weight],
                )
            ],
            start=start,
            net=nn.Identity(),
            noising=NOISING,
            objective=self.objective,
            parameters=[self.weight],
            optimizer=torch.optim.SGD([self.weight], lr=123.0),
            rate=lambda step: lr / (1 + step),
            ema=None,
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            tokens=0,
        )

    def objective(self, net: nn.Module, batch: dict[str, torch.Tensor], draw: Any) -> torch.Tensor:
        values = batch["mean"][:, 0, 0, 0]
        self.batches.append(values.int().tolist())
        self.draws.append(draw)
        return self.weight * values

    def trainer(self) -> Trainer:
        return Trainer(self.training)  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------------ one step


def test_a_seed_means_the_same_draws_on_every_machine() -> None:
    assert generator(0, "draw", 1).initial_seed() == 6659311389881538602
    assert generator(0, "draw", 1).initial_seed() != generator(0, "order", 1).initial_seed()
    assert all(generator(0, "draw", micro).initial_seed() < 2**63 for micro in range(50))


def test_the_order_the_draws_and_the_held_out_images_of_seed_0_are_these() -> None:
    """Pinned: another order or other draws would change every trained tuner without any other test noticing."""
    config = TrainConfig(batch=3, cond=("canny",), hint_dropout=0.5, caption_dropout=0.5, val_count=4)
    assert [i for batch in StepBatches(8, 4, 0, 0, 4) for i in batch] == [
        0,
        7,
        4,
        3,
        5,
        1,
        2,
        6,
        6,
        2,
        3,
        1,
        7,
        4,
        5,
        0,
    ]
    draw = training_draw(config, 5, (1, 1, 1), NOISING, slice(0, 3))
    assert draw.t.tolist() == [697, 34, 871]
    assert draw.noise.flatten().tolist() == pytest.approx([-0.274012, -1.077885, -0.703301], abs=1e-6)
    assert draw.posterior.flatten().tolist() == pytest.approx([-1.138935, -0.473986, 1.406881], abs=1e-6)
    assert [draw.drop_caption.tolist(), draw.drop_hint["canny"].tolist()] == [
        [False, False, True],
        [False, False, False],
    ]
    held = validation_draw(config, 2, 3, (1, 1, 1), NOISING, 1, 4)
    assert held.t.tolist() == [337, 282, 288]
    assert held.posterior.flatten().tolist() == pytest.approx([0.50306, 1.256706, 0.756196], abs=1e-6)
    assert held.noise.flatten().tolist() == pytest.approx([-0.28751, 0.819669, -0.136307], abs=1e-6)
    source = Source("set", "textfolder", [Record(str(i), BytesBlob(b"")) for i in range(40)])
    assert [record.key for record in split_records(source, None, config)[1]] == ["10", "21", "33", "34"]


def test_a_batch_may_be_a_single_image() -> None:
    batch = collate(Images(1))
    assert {name: tuple(batch[name].shape) for name in ("mean", "std")} == {"mean": (1, 1, 1, 2), "std": (1, 1, 1, 2)}
    assert tuple(batch["text"]["prompt_embeds"].shape) == (1, 2, 3)
    assert tuple(batch["hints"]["canny"].shape) == (1, 3, 8, 8)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("start", [0, 2])
def test_steps_take_the_images_and_draws_of_the_runs_seed_from_the_step_where_it_resumed(seed: int, start: int) -> None:
    steps = Steps(start=start, seed=seed, accumulate=3)
    trainer = steps.trainer()
    for number in range(start, 6):
        trainer.step(number)
    assert steps.batches == list(StepBatches(10, 4, seed, start * 3, 18))
    for micro, draw in enumerate(steps.draws, start * 3):
        expected = training_draw(steps.config, micro, (1, 1, 2), NOISING, slice(0, 4))
        assert torch.equal(draw.noise, expected.noise)
        assert torch.equal(draw.t, expected.t)


def test_a_step_goes_down_the_mean_gradient_of_its_batches_at_its_own_rate() -> None:
    steps = Steps(accumulate=2, max_grad_norm=0)
    trainer = steps.trainer()
    weight = 1.0
    for number in range(3):
        loss, norm = trainer.step(number)
        mean = np.mean(steps.batches[-2:])
        assert loss.item() == pytest.approx(weight * mean)
        assert norm.item() == pytest.approx(mean)
        weight -= 0.5 / (1 + number) * mean
        assert steps.weight.item() == pytest.approx(weight)
    assert not loss.requires_grad


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_processes_share_their_gradients_once_per_step(accumulate: int) -> None:
    steps = Steps(accumulate=accumulate)
    steps.trainer().step(0)
    assert steps.training.accelerator.unshared == accumulate - 1


def test_gradients_above_the_norm_are_clipped_and_the_norm_before_is_reported() -> None:
    steps = Steps(max_grad_norm=0.25)
    _, norm = steps.trainer().step(0)
    assert norm.item() == pytest.approx(np.mean(steps.batches[0]))
    assert norm.item() > 1
    assert steps.weight.item() == pytest.approx(1 - 0.5 * 0.25, abs=1e-4)
    assert steps.weight.grad is None or not steps.weight.grad.any(), "the next step starts from no gradient"


def test_the_average_follows_every_step_and_is_used_inside_the_context_alone() -> None:
    steps = Steps(max_grad_norm=0)
    steps.training.ema = ema = EMAModel([steps.weight], decay=0.5)
    trainer = steps.trainer()
    for number in range(3):
        trainer.step(number)
    assert ema.optimization_step == 3
    trained, average = steps.weight.item(), ema.shadow_params[0].item()
    assert trained != average
    with averaged(ema, [steps.weight]):
        assert steps.weight.item() == average
    assert steps.weight.item() == trained
    with averaged(None, [steps.weight]):
        assert steps.weight.item() == trained


# -------------------------------------------------------------------------------------------------- resume states


class Net(nn.Module):
    """Two trained weights and a frozen one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(3, 2), nn.Conv2d(2, 4, 3)
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.a.bias.requires_grad_(False)

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


def stepped(seed: int, steps: int) -> tuple[Net, torch.optim.AdamW, EMAModel]:
    net = Net(seed)
    optimizer, ema = torch.optim.AdamW(net.trained(), 0.1), EMAModel(net.trained(), decay=0.9)
    for number in range(steps):
        sum((p * (number + 1)).square().sum() for p in net.trained()).backward()  # pyright: ignore
        optimizer.step()
        optimizer.zero_grad()
        ema.step(net.trained())
    return net, optimizer, ema


def scaler(enabled: bool = False) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=enabled)


def test_a_state_restores_weights_moments_average_scale_and_the_losses_not_yet_logged(tmp_path: Path) -> None:
    run, (net, optimizer, ema) = Run(tmp_path), stepped(0, 3)
    scale = torch.amp.GradScaler("cpu", init_scale=32.0)
    scale.scale(torch.ones(()))  # makes the scale
    save_state(run, 3, net, optimizer, ema, scale, 2, [[0.5], [0.25]])
    other, others_optimizer, others_ema = stepped(1, 1)
    frozen = other.frozen.clone()
    restored = scaler(True)
    assert load_state(run, other, others_optimizer, others_ema, restored) == (3, [[0.5], [0.25]])
    assert restored.state_dict()["scale"] == 32.0
    assert others_ema.optimization_step == ema.optimization_step == 3
    for mine, theirs in zip(net.trained(), other.trained(), strict=True):
        assert torch.equal(mine, theirs)
        before, after = optimizer.state[mine], others_optimizer.state[theirs]
        assert after["step"] == before["step"] == 3
        assert torch.equal(before["exp_avg"], after["exp_avg"])
        assert torch.equal(before["exp_avg_sq"], after["exp_avg_sq"])
    for mine, theirs in zip(ema.shadow_params, others_ema.shadow_params, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(other.frozen, frozen), "only trained weights belong to a state"


def test_the_newest_state_is_restored_and_older_ones_are_removed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert load_state(run, *stepped(0, 0), scaler()) == (0, [])
    for step in (2, 9, 10):
        net, optimizer, _ = stepped(step, step)
        save_state(run, step, net, optimizer, None, scaler(), 2, [])
    assert [path.name for path in run.states()] == ["step-9", "step-10"]
    assert not (run.states()[-1] / "ema.safetensors").exists()
    other, others_optimizer, _ = stepped(1, 1)
    assert load_state(run, other, others_optimizer, None, scaler()) == (10, [])
    assert torch.equal(other.a.weight, net.a.weight)


def test_a_state_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    run, (net, optimizer, ema) = Run(tmp_path), stepped(0, 0)
    save_state(run, 0, net, optimizer, ema, scaler(), 1, [])
    assert load_file(run.states()[0] / "optimizer.safetensors") == {}
    other, others_optimizer, others_ema = stepped(1, 0)
    assert load_state(run, other, others_optimizer, others_ema, scaler()) == (0, [])
    assert not others_optimizer.state
    assert torch.equal(other.a.weight, net.a.weight)


def test_the_state_of_another_tuner_is_refused(tmp_path: Path) -> None:
    net, optimizer, _ = stepped(0, 1)
    save_state(Run(tmp_path), 1, net, optimizer, None, scaler(), 1, [])
    with pytest.raises(SctoolError, match="another tuner's state"):
        load_state(Run(tmp_path), net.a, optimizer, None, scaler())


# -------------------------------------------------------------------------------------------------------- the log


def test_a_row_shows_the_mean_loss_since_the_row_before() -> None:
    meter = LossMeter(Accelerator(), [1.0, 2.0])  # pyright: ignore[reportArgumentType]
    meter.add(torch.tensor([6.0]))
    assert meter.since_last_row() == [[1.0], [2.0], [6.0]], "older states hold numbers"
    assert meter.mean() == ([3.0], 3)
    assert meter.since_last_row() == []
    meter.add(torch.tensor([5.0, 7.0]))
    assert meter.mean() == ([5.0, 7.0], 1)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    refuse_divergence(1e30, 5, Run(tmp_path))
    for loss in (math.nan, math.inf):
        with pytest.raises(SctoolError, match=f"the loss became {loss} near step 5"):
            refuse_divergence(loss, 5, Run(tmp_path))


def test_the_main_process_alone_writes_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path / "run")
    run.path.mkdir()
    for active in (False, True):
        logger = Logger(run, active)
        with logger:
            logger.row(3, {"loss": 0.5, "lr": 0.25})
            logger.row(6, {"loss": 0.125})
        assert run.metrics.exists() == active
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert rows == [{"step": 3, "loss": 0.5, "lr": 0.25}, {"step": 6, "loss": 0.125}]
    board = EventAccumulator(str(run.path / "tb"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(3, 0.5), (6, 0.125)]


def test_the_summary_is_flat_and_names_what_was_measured_last() -> None:
    last = StepFigures(step=7, steps_averaged=7, loss=0.5, lr=1e-4, grad_norm=2.0, seconds=1.0)
    assert Summary(8, "bf16", 1.5, last, {"val/loss": 0.25}).to_json() == {
        "step": 7, "loss": 0.5, "lr": 1e-4, "grad_norm": 2.0, "val/loss": 0.25,
        "steps": 8, "peak_memory_gb": 1.5, "precision": "bf16",
    }  # fmt: skip
    assert Summary(8, "fp32", 1.5).to_json() == {"steps": 8, "peak_memory_gb": 1.5, "precision": "fp32"}


# ------------------------------------------------------------------------------------------------------ validation


def validator(
    count: int | None = 10, resolution: int = 64, measures: Any = None, path: Path = Path("run"), **settings: Any
) -> Validator:
    config = TrainConfig(**{"cond": ("canny",), "steps": 10, "batch": 4, **settings})
    held_out: Any = None if count is None else Images(count)
    backbone: Any = SimpleNamespace(resolution=resolution)
    return Validator(config, Run(path), backbone, held_out, measures or {}, Progress(True))


def by_timestep(batch: dict[str, torch.Tensor], draw: Any) -> torch.Tensor:
    return batch["mean"][:, 0, 0, 0] + draw.t.float()


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_the_held_out_loss_is_the_mean_over_images_and_over_four_quarters_of_the_schedule(batch: int) -> None:
    measuring = validator(10, batch=batch)
    figures = measuring.loss_by_band(by_timestep, NOISING)
    held_out: Any = measuring.held_out
    quarters = []
    for quarter in range(4):
        losses = []
        for first in range(0, 10, min(batch, 16)):
            items = held_out[first : first + min(batch, 16)]
            draw = validation_draw(measuring.config, first, len(items), (1, 1, 2), NOISING, quarter, 4)
            losses += by_timestep(collate(items), draw).tolist()
        assert len(losses) == 10
        quarters.append(np.mean(losses))
    assert figures == pytest.approx(
        {"val/loss": np.mean(quarters), **{f"val/loss_{i}": v for i, v in enumerate(quarters)}}
    )
    assert all(250 * i <= quarter - 4.5 < 250 * (i + 1) for i, quarter in enumerate(quarters))


def test_held_out_images_pass_sixteen_at_a_time_at_most() -> None:
    sizes: list[int] = []

    def losses(batch: dict[str, torch.Tensor], draw: Any) -> torch.Tensor:
        sizes.append(len(batch["mean"]))
        return torch.zeros(len(batch["mean"]))

    validator(20, batch=50).loss_by_band(losses, NOISING)
    assert sizes == [16] * 4 + [4] * 4


def test_no_held_out_image_means_no_figure() -> None:
    measuring = validator(None, measures={"canny": dict})
    assert measuring(5, by_timestep, NOISING) == {}
    assert (measuring.rows, measuring.requests) == ({}, [])


def test_previews_and_adherence_draw_held_out_images_with_a_seed_each() -> None:
    assert len(validator(10).requests) == 4
    measuring = validator(20, measures={"canny": dict, "other": dict})
    assert list(measuring.measures) == ["canny"]
    assert [request.seed for request in measuring.requests] == list(range(16))
    assert [request.prompt for request in measuring.requests[:2]] == ["caption 0", "caption 1"]
    assert measuring.requests[3].key == "key 3"
    assert measuring.requests[3].hints["canny"].shape == (8, 8, 3)
    assert (measuring.requests[3].hints["canny"] == 3).all()
    assert len(validator(3).requests) == 3
    rows = measuring.encode(["caption 2", "", "caption 2"])["prompt_embeds"]
    assert rows[:, 0, 0].tolist() == [2, -1, 2]


def test_previews_are_sampled_as_the_run_says_and_fewer_at_once_where_images_are_large() -> None:
    sampling = validator(preview_steps=7, guidance=3.0, size=64).sampling
    assert (sampling.steps, sampling.guidance, sampling.size) == (7, 3.0, 64)
    assert [validator(resolution=side).sampling.batch for side in (64, 128, 129, 512)] == [16, 16, 4, 4]


@pytest.mark.parametrize(
    ("validate", "sample", "due"),
    [(4, 0, [4, 8, 10]), (0, 3, [3, 6, 9, 10]), (4, 3, [3, 4, 6, 8, 9, 10]), (0, 0, []), (100, 0, [10])],
)
def test_validation_is_due_at_its_intervals_and_after_the_last_step(validate: int, sample: int, due: list[int]) -> None:
    config = TrainConfig(steps=10, validate_every=validate, sample_every=sample)
    assert [done for done in range(1, 11) if validation_due(done, config)] == due


@pytest.mark.parametrize(
    ("step", "due"), [(1, False), (3, True), (4, False), (6, True), (10, True)], ids=lambda value: str(value)
)
def test_previews_come_at_their_interval_and_after_the_last_step(step: int, due: bool, tmp_path: Path) -> None:
    drawn: list[int] = []

    def images(requests: Any, base: Any = None) -> list[np.ndarray]:
        drawn.append(len(requests))
        return [np.zeros((8, 8, 3), np.uint8) for _ in requests]

    measuring = validator(10, sample_every=3, validate_every=0, path=tmp_path)
    measuring.images = images
    measuring.draw_base(measuring.backbone)
    assert drawn == [4]
    assert "val/loss" in measuring(step, by_timestep, NOISING)
    assert drawn == ([4, 4] if due else [4])
    assert (tmp_path / f"samples/preview/step-{step}.png").exists() == due


def test_adherence_is_measured_on_the_hints_of_sixteen_images(tmp_path: Path) -> None:
    def measure(images: list[np.ndarray], hints: list[np.ndarray]) -> dict[str, float]:
        assert len(images) == len(hints)
        return {"f1": float(np.mean([hint.mean() for hint in hints]))}

    measuring = validator(20, measures={"canny": measure}, sample_every=0, validate_every=5, path=tmp_path)
    measuring.images = lambda requests: [np.zeros((8, 8, 3), np.uint8) for _ in requests]
    measuring.draw_base(measuring.backbone)
    assert measuring.base == []
    figures = measuring(5, by_timestep, NOISING)
    assert figures["val/canny_f1"] == pytest.approx(np.mean(range(16)))
    never = validator(20, measures={"canny": measure}, sample_every=0, validate_every=0, path=tmp_path)
    assert not any("canny" in name for name in never(5, by_timestep, NOISING))
