"""The table of students, with a distillation that is a stand-in: a student is its teacher with weaker weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from sctool.core.config import TrainConfig
from sctool.core.data.records import Source
from sctool.core.errors import Diverged, SctoolError, UsageError, unknown
from sctool.core.resolving import resolve_config
from sctool.core.runs import Run
from sctool.eval.bench import measuring, running, students, tuner_work
from sctool.eval.bench.collecting import make_table
from sctool.eval.bench.distill import Distill
from sctool.eval.bench.page import write_page
from sctool.eval.bench.pieces import Piece
from sctool.eval.bench.plan import plan_table, show_plan
from sctool.eval.bench.settings import Settings
from sctool.eval.bench.show import show
from sctool.eval.bench.student_work import StudentWork
from sctool.eval.bench.table import Table
from sctool.eval.bench.workshop import Workshop, open_workshop
from sctool.eval.evaluate import evaluate
from sctool.eval.options import Options

Make = Callable[..., Settings]
Finished = tuple[Workshop, Table]
OWN = ("ratio", "prune", "start", "task", "output", "feature")


class Weakening:
    """In the place of `core.distilling`: the student's weights are the teacher's times its ratio."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any], list[str]]] = []

    def distill_config(self, flags: Mapping[str, Any], pairs: Iterable[str]) -> TrainConfig:
        own, shared = {}, []
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key in OWN:
                own[key] = value
            elif key in TrainConfig.model_fields:
                shared.append(pair)
            else:
                raise unknown("key", key, OWN)
        return resolve_config(TrainConfig, flags={**flags, "method": "full", "tuner": own}, pairs=shared)

    def student_parameters(self, config: TrainConfig, *, offline: bool = False) -> int:
        if config.tuner.get("prune") == "tiny":
            raise UsageError("this denoiser has no stage to spare.")
        return round(1000 * float(config.tuner.get("ratio", 1)))

    def distill(
        self, config: TrainConfig, run: Run, source: Source, *, held_out: Source | None = None, offline: bool = False,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        assert Path(config.base, "unet").is_dir()
        self.calls.append((run.name, config.model_dump(), [record.key for record in source]))
        shutil.copytree(config.base, run.path / "student", dirs_exist_ok=True)
        file = next((run.path / "student" / "unet").glob("*.safetensors"))
        ratio = float(config.tuner.get("ratio", 1)) - 0.01 * config.seed
        weights = {name: weight * ratio for name, weight in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        run.log({"step": config.steps, "loss": 1.0, "seconds": 2.0 * config.steps})
        run.log({"step": config.steps, "val/loss": ratio})


@pytest.fixture(scope="module")
def weakening() -> Weakening:
    return Weakening()


@pytest.fixture(autouse=True)
def _installed(weakening: Weakening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(students, "distilling", lambda: weakening)


@pytest.fixture(scope="module")
def distilled(make: Make, weakening: Weakening, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    names, pairs = ("lowrank", "half", "lowrank-undistilled"), ("lr=1e-5", "half:ratio=0.5", "lowrank:start=whitened")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(students, "distilling", lambda: weakening)
        settings = make(Distill(), names=names, pairs=pairs, count=10)
        shop = open_workshop(settings, tmp_path_factory.mktemp("bench") / "distill", quiet=True)
        return shop, make_table(shop)


def test_teacher_first_then_every_student_with_its_figures(distilled: Finished) -> None:
    _, table = distilled
    (teacher,) = table.bases
    assert teacher.name == "teacher"
    assert teacher.figures.keys() == {"distance", "clip", "sample_step_s"}
    assert [row.name for row in table.rows] == ["lowrank", "half", "lowrank-undistilled"]
    for row in table.rows:
        assert row.figures.keys() == {"distance", "clip", "to_base", "step_s", "sample_step_s"}
        assert row.values["distance"].keys() == row.values["to_base"].keys() == {0, 1, 2}
        assert row.values["step_s"] == {0: 2.0, 1: 2.0, 2: 2.0}
        assert row.values["distance"] != teacher.values["distance"]
    assert [row.parameters["total"] for row in table.rows] == [422, 500, 422]
    assert table.rows[0].parameters["base"] == teacher.parameters["total"] > 0
    assert table.example("to_base").name == "FD (mini features) to the teacher"
    assert table.rows[0].own == {"ratio": "0.4225", "start": "whitened"}
    assert table.rows[2].own["task"] == "1"


def test_the_runs_are_what_distill_was_asked_for(distilled: Finished, weakening: Weakening) -> None:
    shop, _ = distilled
    configs = {name: config for name, config, _ in weakening.calls if name.startswith(("lowrank-seed", "half-seed"))}
    assert configs["lowrank-seed1"]["tuner"] == {"ratio": "0.4225", "start": "whitened"}
    assert configs["half-seed2"]["tuner"] == {"ratio": "0.5"}
    differ = {key for key, value in configs["half-seed2"].items() if configs["lowrank-seed2"][key] != value}
    assert differ == {"tuner"}
    for config in configs.values():
        assert (config["steps"], config["batch"], config["lr"], config["sample_every"]) == (3, 2, 1e-5, 0)
        assert config["base"] == shop.settings.base
    assert len({tuple(keys) for _, _, keys in weakening.calls}) == 1, "every student sees the same images"


def test_students_are_drawn_like_the_teacher_and_compared_with_its_images(distilled: Finished) -> None:
    shop, table = distilled
    teacher = shop.base_images("teacher", 1) / "base"
    student = shop.run("half", 1).samples / "student"
    rows = [[json.loads(line) for line in (f / "metadata.jsonl").read_text().splitlines()] for f in (teacher, student)]
    assert [(row["prompt"], row["seed"]) for row in rows[0]] == [(row["prompt"], row["seed"]) for row in rows[1]]
    asked = Options(metrics=("fid",), features="mini", reference=str(teacher), quiet=True)
    assert table.rows[1].values["to_base"][1] == evaluate(student, asked).folders[0].figures[0].value
    sampled = json.loads((student / "sampling.json").read_text())
    assert sampled["base"]["id"] == str(students.student_folder(shop.run("half", 1)))
    assert sampled["tuners"] == []


def test_a_student_that_is_its_teacher_has_no_distance_to_it(make: Make, tmp_path: Path) -> None:
    settings = make(Distill(), names=("same", "half"), pairs=("same:ratio=1", "half:ratio=0.5"), seeds=1)
    same, half = make_table(open_workshop(settings, tmp_path, quiet=True)).rows
    assert same.values["to_base"][0] == pytest.approx(0, abs=1e-9)
    assert half.values["to_base"][0] > 1e-6


def test_students_are_measured_by_the_networks_of_their_teacher(
    distilled: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where weights are missing, the embedded networks stand in for an embedded base, and so for its students."""
    asked: list[str] = []

    def choose(kind: str, *, base: str, **_: Any) -> None:
        asked.append(base)
        raise SctoolError("no features.")

    monkeypatch.setattr("sctool.eval.sets.extraction.choose_features", choose)
    shop, _ = distilled
    again = Piece(tmp_path / "drawn.json", {})
    with pytest.raises(SctoolError, match="no features"):
        measuring.measure(shop, again, shop.run("half", 0).samples / "student", shop.out / "real.npz", ("fid",))
    assert asked == [shop.settings.base]


def test_a_second_call_does_nothing_again(
    distilled: Finished, weakening: Weakening, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, table = distilled
    done = len(weakening.calls)
    monkeypatch.setattr(running, "sample_heldout", lambda *_, **__: pytest.fail("drawn again"))
    monkeypatch.setattr(tuner_work, "sample_heldout", lambda *_, **__: pytest.fail("drawn again"))
    monkeypatch.setattr(measuring, "evaluate", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr("sctool.eval.bench.cost.sampling_steps", lambda *_, **__: pytest.fail("timed again"))
    assert make_table(shop).to_json() == table.to_json()
    plan = plan_table(shop)
    assert plan["seconds_left"] == 0
    assert len(weakening.calls) == done


def test_after_a_kill_the_table_goes_on_with_the_next_student(
    make: Make, weakening: Weakening, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = open_workshop(make(Distill(), names=("lowrank", "bk-small"), seeds=1), tmp_path, quiet=True)
    original = weakening.distill

    def killed(config: TrainConfig, run: Run, *values: Any, **more: Any) -> None:
        if "bk-small" in run.name:
            raise KeyboardInterrupt
        original(config, run, *values, **more)

    monkeypatch.setattr(weakening, "distill", killed)
    with pytest.raises(KeyboardInterrupt):
        make_table(shop)
    plan = plan_table_without_timing(shop, monkeypatch)
    assert (plan["rows"]["lowrank"]["runs_left"], plan["rows"]["bk-small"]["runs_left"]) == (0, 1)
    monkeypatch.setattr(weakening, "distill", original)
    done = len(weakening.calls)
    make_table(shop)
    assert [name for name, *_ in weakening.calls[done:]] == ["bk-small-seed0"]


def plan_table_without_timing(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(StudentWork, "time", lambda self, names: dict.fromkeys(names, (1.0, 1.0)))
    return plan_table(shop)


def test_a_dry_run_times_a_short_distillation_and_writes_nothing(make: Make, tmp_path: Path) -> None:
    shop = open_workshop(make(Distill(), names=("lowrank",), seeds=3), tmp_path / "new", quiet=True)
    plan = plan_table(shop)
    assert not (tmp_path / "new").exists()
    row = plan["rows"]["lowrank"]
    assert (row["runs_left"], row["steps_left"], row["images_left"]) == (3, 9, 12)
    assert row["step_s"] == 2.0
    assert row["image_s"] > 0
    assert plan["trainable"] == {"lowrank": 422}
    assert plan["rows"]["teacher"]["images_left"] == 12
    assert "3 of 3 runs left" in show_plan(plan)


def test_a_student_that_diverges_has_no_figures_of_quality(
    make: Make, weakening: Weakening, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(config: TrainConfig, run: Run, *_: Any, **__: Any) -> None:
        raise Diverged("the loss became nan")

    monkeypatch.setattr(weakening, "distill", diverging)
    table = make_table(open_workshop(make(Distill(), names=("lowrank",), seeds=1), tmp_path, quiet=True))
    assert table.rows[0].diverged == [0]
    assert table.rows[0].figures == {}
    show(table, Console(width=100))


def test_the_page_and_the_terminal_show_every_row(distilled: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    shop, table = distilled
    page = write_page(table, shop).read_text()
    show(table, Console(width=160))
    printed = capsys.readouterr().out
    for name in ("teacher", "lowrank", "half", "BK-SDM-v2-Small", "low-rank U-Net, distilled"):
        assert f'<th scope="row">{name}</th>' in page
        assert name in printed
    assert "Students of tiny on pictures: 3 steps of 2, 3 seeds" in printed
    assert "lowrank: ratio 0.4225, start whitened" in printed
    assert "FD (mini features) to the teacher ↓" in page
    assert page.count("<polyline") == 0, "losses of different objectives are not compared"
    content = json.loads(json.dumps(table.to_json()))
    assert content["arms"].keys() == {"lowrank", "half", "lowrank-undistilled"}
    assert not {"ratio", "tuner", "lr"} & content["protocol"]["training"].keys()


def test_every_student_learns_at_its_own_best_rate(
    make: Make, weakening: Weakening, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = weakening.distill

    def learning(config: TrainConfig, run: Run, *values: Any, **more: Any) -> None:
        original(config, run, *values, **more)
        assert config.lr is not None
        best = 1e-3 if "task" in config.tuner else 1e-4
        run.log({"step": config.steps, "val/loss": 1 + abs(config.lr - best)})

    monkeypatch.setattr(weakening, "distill", learning)
    names, done = ("lowrank", "lowrank-undistilled", "half"), len(weakening.calls)
    pairs, rates = ("half:ratio=0.5", "half:lr=7e-5"), (1e-5, 1e-4, 1e-3)
    settings = make(Distill(), names=names, pairs=pairs, seeds=1, rates=rates, rate_steps=2)
    table = make_table(open_workshop(settings, tmp_path, quiet=True))
    chosen = {name: row["chosen"] for name, row in table.to_json()["rates"].items()}
    assert chosen == {"lowrank": 1e-4, "lowrank-undistilled": 1e-3}
    runs = {(name, config["lr"], config["steps"], config["seed"]) for name, config, _ in weakening.calls[done:]}
    assert {("lowrank-seed0", 1e-4, 3, 0), ("lowrank-undistilled-seed0", 1e-3, 3, 0), ("half-seed0", 7e-5, 3, 0)} < runs
    assert {(lr, steps, seed) for name, lr, steps, seed in runs if name.startswith("lowrank-lr")} == {
        (rate, 2, 1000) for rate in rates
    }


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"names": ("lowrnk",)}, "Did you mean 'lowrank'?"),
        ({"names": ("mine",)}, "write its settings: mine:ratio=0.5"),
        ({"names": ("lowrank",), "pairs": ("half:ratio=0.5",)}, "unknown arm 'half'"),
        ({"names": ("lowrank",), "pairs": ("lowrank:ratoi=0.5",)}, "Did you mean 'ratio'?"),
        ({"names": ("lowrank",), "pairs": ("lowrank:steps=5",)}, "it is the same for all arms, steps=5"),
        ({"names": ("lowrank",), "pairs": ("lowrank:seed=5",)}, "their number is --seeds"),
        ({"names": ("lowrank",), "pairs": ("cond=canny",)}, "without condition maps"),
        ({"names": ("lowrank",), "pairs": ("tuner.rank=1",)}, "without a tuner"),
        ({"names": ()}, "--arms names no arm, e.g. --arms lowrank,bk-small"),
    ],
)  # fmt: skip
def test_what_is_refused(make: Make, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        make(Distill(), **more)


def test_a_student_that_does_not_fit_is_refused_up_front(make: Make, weakening: Weakening, tmp_path: Path) -> None:
    done = len(weakening.calls)
    shop = open_workshop(make(Distill(), names=("lowrank", "bk-tiny")), tmp_path / "new", quiet=True)
    with pytest.raises(UsageError, match=r"arm bk-tiny does not fit --base .*tiny: this denoiser has no stage"):
        make_table(shop)
    assert len(weakening.calls) == done
    assert not (tmp_path / "new").exists()


def test_the_weights_of_the_stand_in_differ(distilled: Finished) -> None:
    """Otherwise none of the distances above would mean anything."""
    shop, _ = distilled
    first, second = (
        load_file(next((students.student_folder(shop.run(arm, 0)) / "unet").glob("*.safetensors")))
        for arm in ("lowrank", "half")
    )
    name = next(iter(first))
    torch.testing.assert_close(first[name] * 0.5, second[name] * 0.4225)
