"""The transfer table: fair, resumable run by run, and honest about seeds, divergence and rates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sctool.core.errors import Diverged, DoesNotFit, SctoolError, UsageError
from sctool.core.runs import Run
from sctool.core.training.objective import DiffusionObjective
from sctool.eval.bench import running, tuner_work
from sctool.eval.bench.collecting import chosen_configs, make_table
from sctool.eval.bench.page import write_page
from sctool.eval.bench.papers import DIFFSCALER_TRANSFER
from sctool.eval.bench.plan import plan_table, show_plan
from sctool.eval.bench.rates import Tuned, tune_rates
from sctool.eval.bench.settings import RATE_SEED, Measuring, Settings, make_settings
from sctool.eval.bench.show import below, count, show
from sctool.eval.bench.table import COSTS, Table
from sctool.eval.bench.transfer import Transfer
from sctool.eval.bench.workshop import Workshop, open_workshop

Make = Callable[..., Settings]
Finished = tuple[Workshop, Table]


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Workshop:
    """A copy of the finished table that a test may change."""
    shutil.copytree(finished[0].out, tmp_path / "copy")
    return open_workshop(finished[0].settings, tmp_path / "copy", quiet=True)


def forbid(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training, drawing and timing are recorded instead of done; recorded is what was begun."""
    begun: list[str] = []

    def refuse(*values: Any, **_: Any) -> None:
        begun.append(next((value.name for value in values if isinstance(value, Run)), "costs"))
        raise KeyboardInterrupt

    monkeypatch.setattr("sctool.core.training.train.train", refuse)
    monkeypatch.setattr(running, "sample_heldout", refuse)
    monkeypatch.setattr(tuner_work, "sample_heldout", refuse)
    monkeypatch.setattr("sctool.eval.bench.tuner_work.measure_costs", refuse)
    return begun


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------------- contents


def test_every_method_has_its_figures_over_the_seeds(finished: Finished) -> None:
    shop, table = finished
    assert [row.name for row in table.rows] == ["full", "scedit"]
    for row in table.rows:
        assert row.values["distance"].keys() == row.values["loss"].keys() == row.values["step_s"].keys() == {0, 1, 2}
        for key in ("distance", "loss", "step_s"):
            figure = row.figures[key]
            assert figure.value == pytest.approx(np.mean(list(row.values[key].values())))
            assert figure.interval is not None
            assert figure.interval[0] <= figure.value <= figure.interval[1]
    full, scedit = table.rows
    assert full.parameters["trainable"] == full.parameters["base"] == full.parameters["total"]
    assert scedit.parameters["total"] == scedit.parameters["base"] + scedit.parameters["trainable"]
    (base,) = table.bases
    assert base.name == "base"
    assert base.figures.keys() == {"distance", "sample_step_s"}
    assert base.parameters["trainable"] == 0
    assert full.figures["distance"].name == "FD (mini features)"
    assert len(json.loads((shop.out / "real.json").read_text())["identity"]) == 6
    assert json.loads((shop.out / "real.json").read_text())["result"] == {"n": 12}


def test_captions_are_repeated_with_new_seeds(finished: Finished) -> None:
    """Three images are held out, four are drawn."""
    shop, _ = finished
    for seed in range(3):
        run = shop.run("full", seed)
        rows = [json.loads(line) for line in (run.samples / "tuned" / "metadata.jsonl").read_text().splitlines()]
        assert [row["prompt"] for row in rows] == ["picture 3", "picture 7", "picture 11", "picture 3"]
        assert [row["seed"] for row in rows] == list(range(4 * seed, 4 * seed + 4))


def test_the_json_object(finished: Finished) -> None:
    table = finished[1]
    content = json.loads(json.dumps(table.to_json()))
    assert content["table"] == "transfer"
    assert content["methods"].keys() == {"full", "scedit"}
    figure = content["methods"]["scedit"]["figures"]["distance"]
    assert figure.keys() == {"name", "better", "mean", "interval", "values", "protocol"}
    assert figure["values"].keys() == {"0", "1", "2"}
    assert content["best"].keys() == content["not_told_apart"].keys() >= {"distance", "loss", "step_s"}
    assert content["protocol"]["seeds"] == [0, 1, 2]
    assert content["protocol"]["reference"] == "all images of the set, training and held out"
    assert not {"seed", "method", "lr"} & content["protocol"]["training"].keys()
    assert content["bases"].keys() == {"base"}
    assert content["differences"]["distance"]["reference"] in ("full", "scedit")
    (paper,) = content["papers"]
    assert paper["rows"]["DiffScaler"] == ["48.7M", "20.19", "18.07", "15.13", "51.46"]
    assert "not comparable" in paper["note"]


def test_the_page_and_the_terminal_show_every_row(
    finished: Finished, copied: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    table = finished[1]
    page = write_page(table, copied).read_text()
    show(table)
    printed = capsys.readouterr().out
    for name in ("base", "full", "scedit", *DIFFSCALER_TRANSFER.rows):
        assert f'<th scope="row">{name}</th>' in page
        assert name in printed
    for text in ("not comparable with the figures above", "FD (mini features) ↓"):
        assert text in page
    assert page.count("<polyline") == 2, "held-out losses of two methods; three steps have one row of training loss"
    assert page.count("data:image/png") + page.count("data:image/jpeg") == 4 * 4
    assert "://" not in page.replace("https://github.com/mseitzer", "")
    assert "<script" not in page
    assert write_page(table, copied).read_text() == page


def test_numbers_of_parameters_are_short() -> None:
    shown = [count(value) for value in (0, 9_999, 18_000, 484_000, 3_010_000, 48_674_445, 2_500_000_000)]
    assert shown == ["0", "9,999", "18k", "484k", "3.01M", "48.67M", "2.5G"]


# -------------------------------------------------------------------------------------------------------- fairness


def test_a_seed_sees_the_same_data_and_noise_with_every_method(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    original, current = DiffusionObjective.__call__, [""]

    def recording(self: DiffusionObjective, net: Any, batch: Any, draw: Any) -> torch.Tensor:
        parts = (batch["mean"], draw.posterior, draw.noise, draw.t, draw.drop_caption)
        seen.setdefault(current[0], []).extend(part.clone() for part in parts)
        return original(self, net, batch, draw)

    monkeypatch.setattr(DiffusionObjective, "__call__", recording)
    shop = open_workshop(make(seeds=2), tmp_path, quiet=True)
    for (arm, seed), config in chosen_configs(shop, {}).items():
        current[0] = shop.run(arm, seed).name
        running.train_run(shop, shop.run(arm, seed), config)
    assert seen.keys() == {"full-seed0", "scedit-seed0", "full-seed1", "scedit-seed1"}
    for seed in (0, 1):
        ours, theirs = seen[f"full-seed{seed}"], seen[f"scedit-seed{seed}"]
        assert len(ours) == len(theirs) > 15
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(seen["full-seed0"][2], seen["full-seed1"][2])


def test_base_and_methods_draw_the_same_captions_from_the_same_noise(finished: Finished) -> None:
    shop, _ = finished
    for seed in range(3):
        folders = [shop.run(arm, seed).samples / "tuned" for arm in shop.settings.arms]
        tables = [
            [
                {key: value for key, value in json.loads(line).items() if key in ("prompt", "seed", "key")}
                for line in (folder / "metadata.jsonl").read_text().splitlines()
            ]
            for folder in (*folders, shop.out / "base" / f"seed{seed}" / "base")
        ]
        assert tables[0] == tables[1] == tables[2]


def test_figures_that_were_measured_differently_are_refused(copied: Workshop) -> None:
    file = copied.run("full", 1).path / "bench" / "measured.json"
    content = json.loads(file.read_text())
    content["result"]["figures"]["distance"]["protocol"]["n"] = 3
    file.write_text(json.dumps(content))
    with pytest.raises(SctoolError, match=r"measured differently: n \(4 / 3\)"):
        make_table(copied)


# ------------------------------------------------------------------------------------------------------- resuming


def test_a_second_call_does_nothing_again(
    copied: Workshop, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(copied.out)
    assert forbid(monkeypatch) == []
    assert make_table(copied).to_json() == finished[1].to_json()
    assert files(copied.out) == before


def test_after_a_kill_the_table_goes_on_with_the_next_run(
    make: Make, no_costs: None, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sctool.core.training import train as training

    original = training.train
    trained: list[str] = []

    def killed_at(name: str) -> None:
        def train(config: Any, run: Run, *values: Any, **more: Any) -> Any:
            if run.name == name:
                raise KeyboardInterrupt
            trained.append(run.name)
            return original(config, run, *values, **more)

        monkeypatch.setattr(training, "train", train)

    shop = open_workshop(make(seeds=1), tmp_path, quiet=True)
    killed_at("scedit-seed0")
    with pytest.raises(KeyboardInterrupt):
        make_table(shop)
    assert trained == ["full-seed0"]
    killed_at("nothing")
    table = make_table(shop)
    assert trained == ["full-seed0", "scedit-seed0"]
    for row, undisturbed in zip(table.rows, finished[1].rows, strict=True):
        assert row.values["distance"][0] == undisturbed.values["distance"][0]


def test_a_training_that_was_killed_before_its_last_validation_is_done_again(
    copied: Workshop, finished: Finished
) -> None:
    config = copied.settings.config("scedit", 1)
    run = copied.run("scedit", 1)
    run.forget_after(2)
    running.training_piece(run, config).path.unlink()
    assert running.held_out_loss(run, 3) is None
    result = running.train_run(copied, run, config)
    assert result["loss"] == finished[1].rows[1].values["loss"][1]


def test_other_sampling_draws_again_without_training(
    copied: Workshop, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = forbid(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make_table(open_workshop(make(sample_steps=3), copied.out, quiet=True))
    assert begun == ["full-seed0"]
    assert running.training_piece(copied.run("full", 0), copied.settings.config("full", 0)).result()


def test_changed_settings_are_refused_before_anything_is_done(
    copied: Workshop, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = forbid(monkeypatch)
    for changed in ({"flags": {"batch": 4}}, {"lr": ("scedit=1",)}, {"flags": {"steps": 2}}):
        with pytest.raises(UsageError, match="Choose another --out"):
            make_table(open_workshop(make(**changed), copied.out, quiet=True))
    assert begun == []


# ---------------------------------------------------------------------------------------- seeds, rates, divergence


def test_few_seeds_have_no_interval_and_no_winner(make: Make, no_costs: None, copied: Workshop) -> None:
    table = make_table(open_workshop(make(seeds=1), copied.out, quiet=True))
    assert all(figure.interval is None for row in table.rows for figure in row.figures.values())
    assert set(table.to_json()["best"].values()) == {None}
    assert table.notes[0] == "--seeds 1: no interval and no winner; give at least 3."


def test_rates_are_chosen_by_held_out_loss(make: Make, no_costs: None, tmp_path: Path) -> None:
    settings = make(names=("scedit",), seeds=1, rates=(10.0, 1e-12), rate_steps=2)
    shop = open_workshop(settings, tmp_path, quiet=True)
    table = make_table(shop)
    logged = {}
    for rate in settings.rates:
        tried = Run(tmp_path / "rates" / f"scedit-lr{rate:g}")
        assert (tried.config.seed, tried.config.steps, tried.config.lr) == (RATE_SEED, 2, rate)
        rows = [json.loads(line) for line in tried.metrics.read_text().splitlines()]
        logged[rate] = next(row["val/loss"] for row in rows if row["step"] == 2 and "val/loss" in row)
    assert logged[10.0] != logged[1e-12]
    tuned, lowest = table.tuned["scedit"], min(logged, key=lambda rate: logged[rate])
    assert tuned.losses == logged
    assert tuned.rate == table.rows[0].lr == shop.run("scedit", 0).config.lr == lowest
    lines = below(table)
    assert any(f"{lowest:g}, by held-out loss (1e-12:" in line and "10:" in line for line in lines)
    assert any("last of the rates tried" in line for line in lines)
    assert len(table.to_json()["rates"]["scedit"]["tried"]) == 2


def test_the_chosen_rate_is_the_smallest_of_equals_and_not_a_diverged_one() -> None:
    tuned = Tuned({1e-2: float("inf"), 1e-3: 0.5, 1e-4: 0.5})
    assert tuned.rate == 1e-4
    assert tuned.at_the_edge
    assert not Tuned({1e-4: 0.6, 1e-3: 0.5, 1e-2: 0.7}).at_the_edge
    assert tuned.to_json()["tried"][-1] == {"lr": 1e-2, "loss": None}


def test_a_method_that_diverges_is_reported_and_not_averaged(
    copied: Workshop, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copied.run("full", 1).path)

    def diverging(*_: Any, **__: Any) -> None:
        raise Diverged("the loss became nan")

    monkeypatch.setattr("sctool.core.training.train.train", diverging)
    table = make_table(copied)
    full, scedit = table.rows
    assert full.diverged == [1]
    assert full.figures.keys() == {key for key in finished[1].rows[0].figures if key in COSTS}
    assert scedit.figures == finished[1].rows[1].figures
    assert any(line == "full diverged with seed 1, so it has no figures of quality." for line in below(table))
    assert table.best("distance") is None
    assert "full" in write_page(table, copied).read_text()


def test_rates_that_all_diverge_are_an_error(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(*_: Any, **__: Any) -> None:
        raise Diverged("the loss became nan")

    monkeypatch.setattr("sctool.core.training.train.train", diverging)
    shop = open_workshop(make(names=("scedit",), rates=(1.0, 2.0)), tmp_path, quiet=True)
    with pytest.raises(SctoolError, match="scedit diverged at every rate"):
        tune_rates(shop)


# ----------------------------------------------------------------------------------------------- plans and refusals


def test_a_dry_run_writes_nothing_and_measures_what_it_does_not_know(make: Make, tmp_path: Path) -> None:
    shop = open_workshop(make(rates=(1e-3, 1e-4), rate_steps=2), tmp_path / "new", quiet=True)
    plan = plan_table(shop)
    assert not (tmp_path / "new").exists()
    for name in ("full", "scedit"):
        method = plan["rows"][name]
        assert (method["runs"], method["runs_left"]) == (5, 5)
        assert (method["steps_left"], method["images_left"]) == (2 * 2 + 3 * 3, 12)
        assert method["measured"]
        assert method["seconds_left"] == pytest.approx(13 * method["step_s"] + 12 * method["image_s"])
        assert method["step_s"] > 0 < method["image_s"]
    assert plan["rows"]["base"]["images_left"] == 12
    assert plan["seconds_left"] == pytest.approx(sum(method["seconds_left"] for method in plan["rows"].values()))
    assert "5 of 5 runs left" in show_plan(plan)


def test_a_plan_of_a_finished_table_has_nothing_left(
    copied: Workshop, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sctool.eval.bench.cost.Contender", lambda *_: pytest.fail("measured again"))
    before = files(copied.out)
    plan = plan_table(copied)
    assert plan["seconds_left"] == 0
    assert "all 3 runs done" in show_plan(plan)
    more = plan_table(open_workshop(make(seeds=4), copied.out, quiet=True))
    assert (more["rows"]["full"]["steps_left"], more["rows"]["full"]["images_left"]) == (3, 4)
    assert more["seconds_left"] > 0
    assert not more["rows"]["full"]["measured"]
    assert files(copied.out) == before


def test_a_method_that_does_not_fit_is_refused_up_front(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sctool.core.tuners.scedit import SCEdit

    def misfit(*_: Any, **__: Any) -> None:
        raise DoesNotFit("this denoiser has no skips.")

    begun = forbid(monkeypatch)
    monkeypatch.setattr(SCEdit, "build", misfit)
    with pytest.raises(DoesNotFit, match=r"--methods scedit does not fit --base .*: this denoiser has no skips"):
        make_table(open_workshop(make(), tmp_path / "new", quiet=True))
    assert begun == []
    assert not (tmp_path / "new").exists()


def test_data_without_held_out_images_is_refused(make: Make, tiny_base: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "few").mkdir()
    for index in range(3):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(tmp_path / "few" / f"{index}.png")
    with pytest.raises(UsageError, match="no held-out images"):
        open_workshop(make(flags={"data": str(tmp_path / "few")}), tmp_path, quiet=True)


def test_a_class_conditional_transformer(tmp_path: Path) -> None:
    """Token masking in training does not reach the images, new classes are trained, and SCEdit is refused."""
    from PIL import Image

    base = make_dit(tmp_path / "dit")
    for label in ("cat", "owl"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (32, 32), (50 * index, 0, 0)).save(tmp_path / "data" / label / f"{index}.png")
    flags = {"data": str(tmp_path / "data"), "steps": 2, "batch": 2}
    usual: dict[str, Any] = {"seeds": 1, "count": 3, "sample_steps": 2, "bases": [str(base)], "flags": flags}
    usual["measuring"] = Measuring("mini")
    settings = make_settings(Transfer(), names=("full",), pairs=("mask=0.5",), **usual)
    shop = open_workshop(settings, tmp_path / "out", quiet=True)
    assert plan_table(shop)["rows"]["full"]["image_s"] > 0
    table = make_table(shop)
    assert table.protocol["sampling"]["guidance"] == 4
    assert table.rows[0].parameters["trainable"] == table.bases[0].parameters["base"] + 8, "one new class of width 8"
    assert table.bases[0].values["distance"].keys() == {0}
    both = make_settings(Transfer(), names=("full", "scedit"), **usual)
    with pytest.raises(UsageError, match="--methods scedit does not fit"):
        make_table(open_workshop(both, tmp_path / "other", quiet=True))


def make_dit(folder: Path) -> Path:
    """A diffusers-format DiT folder with random weights and three classes."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        num_embeds_ada_norm=3, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 3, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4, sample_size=32, layers_per_block=1,
    )  # fmt: skip
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    index = folder / "model_index.json"
    labels = {"id2label": {"0": "cat", "1": "dog", "2": "hat"}}
    index.write_text(json.dumps(json.loads(index.read_text()) | labels))
    return folder
