"""Training from prepared folders: the order of an epoch, exact resume, and the same weights whatever the workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sctool.annotators.preparing.run import prepare_set
from sctool.annotators.training_sets import open_training_sets
from sctool.core.config import PrepareConfig, TrainConfig
from sctool.core.data.streaming.folder import Places, PreparedFolder
from sctool.core.errors import SctoolError
from sctool.core.runs import open_run
from sctool.core.training.batches import StepBatches
from sctool.core.training.order import BlockOrder
from sctool.core.training.plan import plan_run, show_plan
from sctool.core.training.splits import split_records
from sctool.core.training.train import train

from .crashing import crash_before_step

SETTINGS = {"batch": 4, "steps": 6, "save_every": 2, "validate_every": 0, "sample_every": 0, "size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, edges: Path) -> Path:
    """The twelve images of `edges` in three shards."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sctool.annotators.preparing.run.FOLDER_SHARD", 4)
        prepare_set(PrepareConfig(src=str(edges), base=str(tiny_base), cond=("canny",), out=str(out), jobs=1))
    return out


@pytest.fixture(scope="module")
def unmarked(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The same without a split, mirrored too, in shards of five; twenty images."""
    source = tmp_path_factory.mktemp("data") / "unmarked"
    source.mkdir()
    for i in range(20):
        Image.new("RGB", (32, 32), (10 * i, 100, 7)).save(source / f"{i:02d}.png")
        (source / f"{i:02d}.txt").write_text(f"colour {i}")
    out = tmp_path_factory.mktemp("prepared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sctool.annotators.preparing.run.FOLDER_SHARD", 5)
        prepare_set(PrepareConfig(src=str(source), base=str(tiny_base), flip=True, out=str(out), jobs=1))
    return out


def go(folder: Path, base: Path, out: Path, **more) -> Path:
    """Trains, and returns the tuner's file."""
    config = TrainConfig(**{"data": str(folder), "base": str(base), "cond": ("canny",), **SETTINGS, **more})
    source, held_out, made = open_training_sets(config, 32, quiet=True)
    run = open_run(out, "run", config)
    train(config, run, source, held_out=held_out, map_meta=made, quiet=True)
    return run.tuner


# -------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("groups", [[7, 0, 5, 12, 1], [1] * 30, [25], [3, 3, 3, 100]])
@pytest.mark.parametrize("window", [1, 8, 1000])
def test_every_item_comes_once_an_epoch(groups, window):
    orders = [BlockOrder(groups, 3, epoch, window) for epoch in (0, 1)]
    both = [[order[i] for i in range(len(order))] for order in orders]
    assert sorted(both[0]) == sorted(both[1]) == list(range(sum(groups)))
    assert both[0] != both[1]


def test_an_order_is_known_at_any_position_without_those_before():
    order = BlockOrder([50] * 40, 0, 2, 300)
    straight = [order[i] for i in range(2000)]
    assert [BlockOrder([50] * 40, 0, 2, 300)[i] for i in (1999, 3, 1000)] == [straight[i] for i in (1999, 3, 1000)]
    assert [order[i] for i in range(0, 2000, 7)] == straight[::7]


def test_few_shards_are_read_at_a_time_and_a_small_rest_is_not_shuffled_alone():
    order = BlockOrder([10] * 25, 0, 0, 60)
    items = [order[i] // 10 for i in range(250)]
    sizes = [len(block) for block in order._blocks]
    assert sizes == [6, 6, 6, 7]
    assert len(set(items[:60])) == 6
    assert len(set(items[180:])) == 7


def test_start_up_and_memory_do_not_grow_with_the_set():
    import tracemalloc

    tracemalloc.start()
    batches = iter(StepBatches(24_000_000, 64, 0, 200_000, 200_010, groups=[10_000] * 2_400))
    first = next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(first)) == 64
    assert peak < 8_000_000


def test_several_processes_share_a_batch():
    words = {"count": 90, "batch": 6, "seed": 1, "start": 2, "stop": 30, "groups": [30, 30, 30]}
    whole = list(StepBatches(**words))
    parts = [list(StepBatches(**words, rank=rank, world=3)) for rank in range(3)]
    assert [[i for own in batch for i in own] for batch in zip(*parts, strict=True)] == whole


def test_places_leave_rows_out():
    places = Places([2, 0, 5], [4, 0, 3], {0: [5, 2], 2: [6]})
    assert [places[i] for i in range(len(places))] == [(0, 3), (0, 4), (2, 5), (2, 7)]
    with pytest.raises(IndexError):
        places[4]


# -------------------------------------------------------------------------------------------------------- splitting


def test_marked_images_are_held_out(folder, tiny_base):
    training, held_out = split_records(PreparedFolder(folder), None, TrainConfig(data=str(folder)))
    assert [record.split for record in held_out] == ["validation"] * 3
    assert {record.split for record in training} == {"train"}
    assert len(split_records(PreparedFolder(folder), None, TrainConfig(val_count=2))[1]) == 2


def test_of_an_unmarked_set_a_seeded_sample_is_held_out_with_its_mirror_images(unmarked):
    config = TrainConfig(seed=5)
    training, held_out = split_records(PreparedFolder(unmarked), None, config)
    again, _ = split_records(PreparedFolder(unmarked), None, config)
    other = split_records(PreparedFolder(unmarked), None, TrainConfig(seed=6))[1]
    keys, absent = {record.key for record in training}, {record.key for record in held_out}
    assert (len(keys), len(absent)) == (18, 2)
    assert not keys & absent
    assert [r.key for r in again] == [r.key for r in training]
    assert {r.key for r in other} != absent
    both = training.mirrored()  # pyright: ignore
    assert len(both) == 36
    assert {record.key for record in both} == keys


def test_a_held_out_set_of_its_own(folder, unmarked):
    training, held_out = split_records(PreparedFolder(folder), PreparedFolder(unmarked), TrainConfig(val_count=7))
    assert (len(training), len(held_out)) == (12, 7)


# --------------------------------------------------------------------------------------------------------- training


def test_the_plan_says_what_is_prepared(folder, tiny_base):
    config = TrainConfig(data=str(folder), base=str(tiny_base), cond=("canny",), **SETTINGS)
    plan = plan_run(config, *open_training_sets(config, 32, quiet=True)[:2])
    assert (plan["images"], plan["held_out"], plan["cache"]["bytes_to_add"]) == (9, 3, 0)
    assert f"in {folder}, fp32" in show_plan(plan)


def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path, folder, tiny_base):
    whole = go(folder, tiny_base, tmp_path / "whole")
    with crash_before_step(3):
        go(folder, tiny_base, tmp_path / "killed")
    assert go(folder, tiny_base, tmp_path / "killed").read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_workers_do_not_change_the_weights(tmp_path, folder, tiny_base, monkeypatch):
    from torch.utils.data import DataLoader

    def with_workers(*args, **more):
        return DataLoader(*args, **{**more, "num_workers": 2})

    plain = go(folder, tiny_base, tmp_path / "plain")
    monkeypatch.setattr("sctool.core.training.trainer.DataLoader", with_workers)
    assert go(folder, tiny_base, tmp_path / "workers").read_bytes() == plain.read_bytes()


def test_workers_load_the_same_batches(folder, tiny_base):
    from torch.utils.data import DataLoader

    from sctool.core.backbones.loading import load_backbone
    from sctool.core.training.batches import collate
    from sctool.core.training.setup import stream

    config = TrainConfig(data=str(folder), base=str(tiny_base), cond=("canny",), size=32)
    rows = split_records(PreparedFolder(folder), None, config)[0]
    data = stream(rows, load_backbone(str(tiny_base)), config, False)
    order: Callable = partial(StepBatches, len(data), 4, 0, 0, 5, groups=data.groups)
    loaded = [
        list(DataLoader(data, batch_sampler=order(), num_workers=number, collate_fn=collate)) for number in (0, 2)
    ]
    for one, two in zip(*loaded, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_validation_and_previews_work(tmp_path, folder, tiny_base):
    go(folder, tiny_base, tmp_path, steps=2, validate_every=1, sample_every=2, preview_steps=1)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum("val/loss" in row for row in rows) == 2
    assert (tmp_path / "run/samples/preview/step-2.png").is_file()


def test_a_set_prepared_anew_does_not_continue_a_run(tmp_path, tiny_base, edges):
    import shutil

    shutil.copytree(edges, tmp_path / "src")
    words = PrepareConfig(src=str(tmp_path / "src"), base=str(tiny_base), cond=("canny",), out=str(tmp_path / "out"))
    prepare_set(words.model_copy(update={"jobs": 1}))
    with crash_before_step(3):
        go(tmp_path / "out", tiny_base, tmp_path / "runs")
    shutil.copy(tmp_path / "src/001.png", tmp_path / "src/000.png")
    prepare_set(words.model_copy(update={"jobs": 1}))
    with pytest.raises(SctoolError, match=r"was prepared anew since .* began"):
        go(tmp_path / "out", tiny_base, tmp_path / "runs")


def test_classes_of_a_prepared_set(tmp_path):
    """`mini-dit` adds the classes that it does not know, over all shards."""
    for label in ("dog", "zebra"):
        (tmp_path / "src" / label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (32, 32), (40 * i, 100, 7)).save(tmp_path / "src" / label / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sctool.annotators.preparing.run.FOLDER_SHARD", 6)
        prepare_set(PrepareConfig(src=str(tmp_path / "src"), base="mini-dit", out=str(tmp_path / "out"), jobs=1))
    assert PreparedFolder(tmp_path / "out").manifest.labels == ("dog", "zebra")
    tuners = []
    for data in ("out", "src"):
        config = TrainConfig(
            data=str(tmp_path / data), base="mini-dit", method="diffscaler", steps=2, batch=4, val_count=0,
            validate_every=0, sample_every=0,
        )  # fmt: skip
        source, held_out, _ = open_training_sets(config, 64, quiet=True)
        run = open_run(tmp_path / "runs", data, config)
        train(config, run, source, held_out=held_out, quiet=True)
        tuners.append(json.loads((run.path / "tuner/tuner.json").read_text()))
    assert tuners[0]["classes"] == tuners[1]["classes"] == ["dog", "zebra"]


PROGRAM = """
import sys
from sctool.cli import run
assert run(sys.argv[1:]) == 0
"""


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(tmp_path, folder, tiny_base):
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    weights = []
    for name, words in (("one", []), ("two", launch)):
        command = [sys.executable, *words, str(tmp_path / "program.py"), "train", "--cond", "canny", "--quiet"]
        command += ["--data", str(folder), "--base", str(tiny_base), "--out", str(tmp_path / name), "--name", "run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run([*command, *settings], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        weights.append(load_file(tmp_path / name / "run/tuner/tuner.safetensors"))
    for key, value in weights[0].items():  # gradients are averaged in another order: equal up to rounding
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-4)
