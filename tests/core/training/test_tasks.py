"""Tasks trained together end as they would alone: weights, averages and logs; what a run of several tasks leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from sctool.annotators.training_sets import open_training_sets
from sctool.core.backbones.loading import load_backbone
from sctool.core.checkpoint import load_tuner, read_meta, task_files, tuner_file
from sctool.core.config import SampleConfig, TrainConfig
from sctool.core.errors import UsageError
from sctool.core.progress import Progress
from sctool.core.resolving import Config
from sctool.core.runs import Run, open_run
from sctool.core.sampling import Request, sample_images
from sctool.core.sites.attaching import tuned
from sctool.core.sites.layers import layers
from sctool.core.tasks import task_configs
from sctool.core.training.batches import Draw, joined, joined_draws
from sctool.core.training.lanes import TaskSet
from sctool.core.training.plan import plan_tasks, show_plan
from sctool.core.training.recipe import load_for_training
from sctool.core.training.setup import open_lanes, set_up
from sctool.core.training.train import train, train_tasks
from sctool.core.training.trainer import Trainer, averaged
from sctool.core.tuners import TUNERS, Method, method_config, tuner_class
from sctool.core.tuners.base import SiteTuner
from sctool.eval.heldout import adherence

from ..backbones.test_dit import save, tie, transformer

QUICK = {
    "steps": 3, "batch": 4, "save_every": 2, "validate_every": 0, "sample_every": 0, "lr": 1e-2, "preview_steps": 1,
    "caption_dropout": 0.4, "hint_dropout": 0.3, "max_grad_norm": 0.05, "ema": 0.5, "accumulate": 2,
}  # fmt: skip

State = dict[str, torch.Tensor]


def settings(base: Path, tasks: list[dict[str, Any]], **more: Any) -> TrainConfig:
    rows = [{key: str(value) if key == "data" else value for key, value in row.items()} for row in tasks]
    return TrainConfig(base=str(base), tasks=rows, **{**QUICK, **more})  # pyright: ignore[reportArgumentType]


def sets_of(config: TrainConfig) -> dict[str | None, TaskSet]:
    sets: dict[str | None, TaskSet] = {}
    for task, own in task_configs(config).items():
        source, held_out, made = open_training_sets(own, 32, quiet=True)
        sets[task] = TaskSet(source, held_out, made, adherence(own.conditions, made, quiet=True))
    return sets


def three(pictures: Path, edges: Path) -> list[dict[str, Any]]:
    return [
        {"name": "style", "data": pictures, "trigger": "<sce>"},
        {"name": "edges", "data": edges, "cond": "canny", "tuner": {"cascade": "zero-heads"}},
        {"name": "small", "data": edges, "tuner": {"ratio": 0.5}},
    ]


def run_steps(config: TrainConfig, folder: Path, dtype: torch.dtype) -> tuple[dict[str | None, State], list[Any]]:
    """The averaged tuners after all steps, all in `dtype`, and the losses and norms of each step."""
    accelerator, run = Accelerator(), open_run(folder, "run", config)
    backbone, precision = load_for_training(config, accelerator.device, True)
    lanes = open_lanes(config, run, sets_of(config), backbone, accelerator, Progress(True))
    for module in (backbone.denoiser, *(lane.tuner for lane in lanes)):
        module.to(dtype)
    training = set_up(config, run, backbone, lanes, accelerator, precision)
    training.objective = replace(training.objective, dtype=dtype)  # pyright: ignore[reportArgumentType]
    trainer = Trainer(training)
    figures = [trainer.step(number) for number in range(config.steps)]
    with averaged(training.ema, training.parameters):
        states = {lane.name: {k: v.clone() for k, v in lane.tuner.state_dict().items()} for lane in lanes}
    training.model.attachment.detach()
    return states, figures


def compare(
    base: Path, tasks: list[dict[str, Any]], folder: Path, dtype: torch.dtype, exact: float, **more: Any
) -> None:
    """All tasks together, and each in a run of its own."""
    config = settings(base, tasks, **more)
    together, figures = run_steps(config, folder / "together", dtype)
    moved = 0
    for number, (task, own) in enumerate(task_configs(config).items()):
        alone, separate = run_steps(own, folder / str(task), dtype)
        assert alone[None].keys() == together[task].keys()
        for key, value in alone[None].items():
            assert value.dtype == dtype
            torch.testing.assert_close(together[task][key], value, rtol=exact, atol=exact)
            moved += int(value.any())
        for (losses, norms), (loss, norm) in zip(figures, separate, strict=True):
            torch.testing.assert_close(losses[number].double(), loss[0].double(), rtol=max(exact, 1e-6), atol=0)
            torch.testing.assert_close(norms[number], norm[0], rtol=max(exact, 1e-7) * 10, atol=0)
    assert moved


def test_tasks_trained_together_are_those_trained_alone(
    tiny_base: Path, pictures: Path, edges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the objective's float32 too
    compare(tiny_base, three(pictures, edges), tmp_path, torch.float64, 1e-12)


def test_in_single_precision_they_differ_by_rounding(
    tiny_base: Path, pictures: Path, edges: Path, tmp_path: Path
) -> None:
    # Adam turns a tiny gradient's rounding into a share of lr, so lr bounds the difference.
    compare(tiny_base, three(pictures, edges)[:2], tmp_path, torch.float32, 1e-5, max_grad_norm=1.0, lr=1e-3)


def test_batches_of_tasks_become_one() -> None:
    def batch(count: int, value: float, *conditions: str) -> dict[str, Any]:
        return {
            "mean": torch.full((count, 1, 2, 2), value),
            "std": torch.zeros(count, 1, 2, 2),
            "text": {"label": torch.full((count,), int(value))},
            "hints": {name: torch.full((count, 3, 4, 4), 9, dtype=torch.uint8) for name in conditions},
        }

    both = joined([batch(2, 1.0, "canny"), batch(3, 2.0, "color")], ["a", "b"])
    assert both["task"] == ["a", "a", "b", "b", "b"]
    assert both["text"]["label"].tolist() == [1, 1, 2, 2, 2]
    assert {name: hint[:, 0, 0, 0].tolist() for name, hint in both["hints"].items()} == {
        "canny": [9, 9, 0, 0, 0], "color": [0, 0, 9, 9, 9],
    }  # fmt: skip
    alone = batch(2, 1.0)
    assert joined([alone], [None]) is alone
    draws = [
        Draw(
            torch.zeros(1), torch.zeros(1), torch.tensor([t]), torch.tensor([True]), {name: torch.tensor([True])}, kept
        )
        for t, name, kept in ((3, "canny", torch.tensor([[0, 1]])), (5, "color", torch.tensor([[2, 3]])))
    ]
    one = joined_draws(draws)
    assert one.t.tolist() == [3, 5]
    assert {name: drop.tolist() for name, drop in one.drop_hint.items()} == {
        "canny": [True, False], "color": [False, True],
    }  # fmt: skip
    assert one.kept is not None
    assert one.kept.tolist() == [[0, 1], [2, 3]]


# --------------------------------------------------------------------------------------------------- a run of tasks


def tensors(run: Run, tasks: Mapping[str, Any] | tuple[str, ...]) -> dict[str, State]:
    return {task: load_file(run.of_task(task).tuner) for task in tasks}


def same(one: dict[str, State], other: dict[str, State]) -> bool:
    return all(torch.equal(value, other[task][key]) for task, state in one.items() for key, value in state.items())


def test_a_run_leaves_a_tuner_for_each_task_with_figures_previews_and_a_card(
    tiny_base: Path, pictures: Path, edges: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, three(pictures, edges), validate_every=3, sample_every=3)
    run = open_run(tmp_path, "multi", config)
    summary = train_tasks(config, run, sets_of(config), quiet=True)
    assert run.tasks == ("style", "edges", "small")
    assert list(task_files(run.path)) == ["edges", "small", "style"]
    for task in run.tasks:
        part = run.of_task(task)
        meta = read_meta(part.tuner)
        assert (meta["task"], tuple(meta["conditions"])) == (task, part.config.conditions)
        assert json.loads(part.tuner.with_suffix(".json").read_text())["task"] == task
        assert (run.path / "samples" / task / "preview" / "step-3.png").is_file()
        assert f"val/{task}/loss_3" in summary.validation
    assert any(key.startswith("val/edges/canny_f1") for key in summary.validation)
    assert not any("style/canny" in key for key in summary.validation)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    losses = [rows[0][f"loss/{task}"] for task in run.tasks]
    assert rows[0]["loss"] == pytest.approx(np.mean(losses))
    assert len(set(losses)) == 3
    assert rows[0]["grad_norm"] == pytest.approx(np.linalg.norm([rows[0][f"grad_norm/{task}"] for task in run.tasks]))
    card = (run.path / "README.md").read_text()
    assert "| edges | `" in card
    assert "--task edges --hint canny=MAP.png" in card
    with pytest.raises(UsageError, match=r"Choose with --task: (style, edges, small|edges, small, style)"):
        tuner_file(run.path)
    with pytest.raises(UsageError, match="Choose with --task"):
        _ = run.tuner
    with pytest.raises(UsageError, match="Did you mean 'edges'"):
        run.of_task("edgse")
    # Each is an ordinary tuner file, and another run may go on from it.
    backbone = load_backbone(str(tiny_base))
    assert load_tuner(run.of_task("edges").tuner, backbone).conditions == ("canny",)
    further = settings(tiny_base, three(pictures, edges)[:2], steps=1, lr=1e-12, init=str(run.path), ema=0)
    again = open_run(tmp_path, "again", further)
    train_tasks(further, again, sets_of(further), quiet=True)
    for task, state in tensors(again, again.tasks).items():
        for key, value in state.items():
            torch.testing.assert_close(value, tensors(run, run.tasks)[task][key], rtol=0, atol=1e-6)


class Crash(Exception):
    """The machine went down."""


def test_a_crashed_run_of_tasks_ends_bit_identical(
    tiny_base: Path, pictures: Path, edges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_base, three(pictures, edges)[:2], steps=6)
    straight = open_run(tmp_path / "a", "run", config)
    train_tasks(config, straight, sets_of(config), quiet=True)
    step, broken = Trainer.step, open_run(tmp_path / "b", "run", config)

    def crashing(self: Trainer, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if number == 5:
            raise Crash
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", crashing)
    with pytest.raises(Crash):
        train_tasks(config, broken, sets_of(config), quiet=True)
    monkeypatch.setattr(Trainer, "step", step)
    train_tasks(config, broken, sets_of(config), quiet=True)
    assert same(tensors(straight, straight.tasks), tensors(broken, broken.tasks))
    rows = [[json.loads(line) for line in run.metrics.read_text().splitlines()] for run in (straight, broken)]
    figures = [[{k: v for k, v in row.items() if k != "seconds"} for row in part] for part in rows]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_two_processes_equal_one_with_tasks(tiny_base: Path, pictures: Path, edges: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, three(pictures, edges)[:2], max_grad_norm=1.0)
    straight = open_run(tmp_path / "a", "run", config)
    train_tasks(config, straight, sets_of(config), quiet=True)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    words = ["-m", "sctool", "train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "b")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *words, "--name", "run"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = tensors(straight, straight.tasks), tensors(Run(tmp_path / "b" / "run"), straight.tasks)
    for task, state in ours.items():
        for key, value in state.items():
            torch.testing.assert_close(theirs[task][key], value, rtol=1e-3, atol=1e-4)


def test_a_later_task_changes_no_earlier_one(tiny_base: Path, pictures: Path, edges: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, three(pictures, edges)[1:2])
    run = open_run(tmp_path, "first", config)
    train_tasks(config, run, sets_of(config), quiet=True)
    before = run.of_task("edges").tuner.read_bytes()
    later = TrainConfig(base=str(tiny_base), data=str(pictures), **QUICK)  # pyright: ignore[reportArgumentType]
    second = open_run(tmp_path, "second", later)
    train(later, second, open_training_sets(later, 32, quiet=True)[0], quiet=True)
    assert run.of_task("edges").tuner.read_bytes() == before
    backbone = load_backbone(str(tiny_base))
    tuners = [load_tuner(file, backbone) for file in (run.of_task("edges").tuner, second.tuner)]
    hint = {"canny": np.full((32, 32, 3), 200, np.uint8)}
    requests = [Request(f"p{seed}", seed, hint, task="edges") for seed in range(2)]
    drawn = []
    for count in (1, 2):
        with tuned(backbone.denoiser, *tuners[:count], tasks=["edges", "second"][:count]):
            drawn.append([image for _, image in sample_images(backbone, requests, SampleConfig(steps=2, guidance=3))])
    with tuned(backbone.denoiser, tuners[0]):
        plain = [replace(request, task=None) for request in requests]
        drawn.append([image for _, image in sample_images(backbone, plain, SampleConfig(steps=2, guidance=3))])
    assert all(np.array_equal(a, b) for other in drawn[1:] for a, b in zip(drawn[0], other, strict=True))


def test_the_plan_counts_each_task_and_the_run(tiny_base: Path, pictures: Path, edges: Path) -> None:
    config = settings(tiny_base, three(pictures, edges))
    plan = plan_tasks(config, sets_of(config))
    assert list(plan["tasks"]) == ["style", "edges", "small"]
    alone = {task: plan_tasks(own, {None: sets_of(config)[task]}) for task, own in task_configs(config).items()}
    for task, figures in alone.items():
        for key in ("trainable", "images", "held_out", "sites", "epochs", "activations_per_image"):
            assert plan["tasks"][task][key] == figures[key]
    assert plan["trainable"] == sum(figures["trainable"] for figures in alone.values())
    assert (plan["images"], plan["batch"]) == (27, 24)
    shown = show_plan(plan)
    assert "task       edges, controlled by canny" in shown
    assert shown.count("cache  ") == 3


# ------------------------------------------------------------------------------------------------------- new classes


class NoSettings(Config):
    """None."""


class Biases(SiteTuner):
    """A vector added to the output of each feed-forward layer."""

    method = "biases"

    def __init__(self, config: Any, denoiser: nn.Module, conditions: Any = (), vae_scale: int = 8) -> None:
        super().__init__(config, layers(denoiser, r"ff\.net\.2$"), conditions, vae_scale)
        self.vectors = nn.ParameterList(torch.randn(site.outputs) / 100 for site in self.sites)

    def delta(self, site: Any, x: torch.Tensor, call: Any) -> torch.Tensor:
        return self.vectors[self.sites.index(site)].to(x.dtype).expand_as(x)


class BiasesRow(Method):
    def load(self) -> Any:
        return Biases


@pytest.fixture
def by_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A class-conditional base, a method that acts on it, and two tasks that add classes."""
    rng = np.random.default_rng(0)
    for folder, labels in (("clothes", ("zebra", "bag")), ("pets", ("yak", "cat"))):
        for label in labels:
            (tmp_path / folder / label).mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 255, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / label / f"{i}.png")
    row = BiasesRow(NoSettings, "", "", "", "", "none", 1e-3, "", ())
    monkeypatch.setitem(TUNERS, "biases", row)
    rows = [{"name": name, "data": tmp_path / name} for name in ("clothes", "pets")]
    return settings(save(tie(transformer()), tmp_path / "dit"), rows, method="biases", mask=0.5)


def test_tasks_with_classes_of_their_own_are_those_trained_alone(
    by_class: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    rows = [task.model_dump(exclude_none=True) for task in by_class.tasks]
    compare(Path(by_class.base), rows, tmp_path / "runs", torch.float64, 1e-12, method="biases", mask=0.5)


def test_classes_of_several_tasks_are_drawn_in_one_batch(by_class: TrainConfig, tmp_path: Path) -> None:
    config = by_class.model_copy(update={"sample_every": 3, "validate_every": 3})
    run = open_run(tmp_path / "runs", "multi", config)
    summary = train_tasks(config, run, sets_of(config), quiet=True)
    assert "val/pets/loss" in summary.validation
    classes = {task: tuple(read_meta(run.of_task(task).tuner)["classes"]) for task in run.tasks}
    assert classes == {"clothes": ("bag", "zebra"), "pets": ("yak",)}
    backbone = load_backbone(config.base)
    tuners = {task: load_tuner(run.of_task(task).tuner, backbone) for task in run.tasks}
    requests = [Request("zebra", 0, task="clothes"), Request("yak", 0, task="pets"), Request("cat", 0)]
    options = SampleConfig(steps=2, guidance=2)
    with tuned(backbone.denoiser, *tuners.values(), tasks=list(tuners)):
        mixed = [image for _, image in sample_images(backbone, requests, options, classes=classes)]
        with pytest.raises(UsageError, match="unknown class 'zebra'"):
            list(sample_images(backbone, [Request("zebra", 0, task="pets")], options, classes=classes))
    for request, image in zip(requests, mixed, strict=True):
        own = [tuners[request.task]] if request.task else []
        with tuned(backbone.denoiser, *own):
            view = backbone.with_classes(classes.get(request.task or "", ()))
            (_, alone), *_ = sample_images(view, [replace(request, task=None)], options)
        assert np.abs(image.astype(int) - alone.astype(int)).max() <= 1


def test_an_image_without_a_task_is_drawn_by_the_base_alone_whoever_is_beside_it(tiny_base: Path) -> None:
    backbone = load_backbone(str(tiny_base))
    tuner = tuner_class("scedit").build(method_config("scedit", {}), backbone.denoiser, (), backbone.vae_scale)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.3)
    config, plain = SampleConfig(steps=2, guidance=3), [Request("a", 0), Request("b", 1)]

    def drawn(requests: list[Request]) -> list[np.ndarray]:
        return [image for _, image in sample_images(backbone, requests, config)]

    base = drawn(plain)
    with tuned(backbone.denoiser, tuner, tasks=["style"]):
        assert all(np.array_equal(a, b) for a, b in zip(drawn(plain), base, strict=True))
        mixed = drawn([plain[0], replace(plain[1], task="style")])
    assert np.abs(mixed[0].astype(int) - base[0]).max() <= 1
    assert np.abs(mixed[1].astype(int) - base[1]).max() > 1
