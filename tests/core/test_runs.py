"""Run folders: named by their settings, found again, and cut back to the step of the last state."""

import json
from pathlib import Path

import pytest

from sctool.core.config import TrainConfig
from sctool.core.errors import UsageError
from sctool.core.runs import Run, default_name, find_run, latest, open_run


def test_the_name_depends_on_the_settings_that_matter():
    settings = TrainConfig(cond=("canny:low=50", "color"), base="bases/sd15", data="sets/shirts")
    name = default_name(settings)
    assert name.rpartition("-")[0] == "scedit-canny-color-sd15-shirts"
    assert default_name(settings) == name
    for key, value in (("steps", 7), ("save_every", 7), ("keep", 7), ("validate_every", 7), ("sample_every", 7)):
        assert default_name(settings.model_copy(update={key: value})) == name
    for key, value in (("lr", 0.5), ("caption", "a {label}"), ("seed", 1), ("cond", ("canny", "color"))):
        assert default_name(settings.model_copy(update={key: value})) != name


def test_runs_are_found_by_name_folder_or_as_the_latest(tmp_path):
    with pytest.raises(UsageError, match="no run in"):
        latest(tmp_path)
    for name in ("one", "two"):
        open_run(tmp_path, name, TrainConfig()).become_latest()
    assert find_run(None, tmp_path).name == latest(tmp_path).name == "two"
    assert find_run("one", tmp_path) == find_run(tmp_path / "one") == Run(tmp_path / "one")
    assert find_run("one", tmp_path).config == TrainConfig()
    with pytest.raises(UsageError, match=r"unknown run 'three'\. Known: one, two"):
        find_run("three", tmp_path)


def test_metrics_after_a_step_are_forgotten(tmp_path):
    run = Run(tmp_path)
    run.forget_after(3)
    for row in ({"step": 1, "loss": 0.5}, {"note": "no step"}, {"step": 3}, {"step": 4}):
        run.log(row)
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    run.forget_after(3)
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5}, {"note": "no step"}, {"step": 3},
    ]  # fmt: skip


def test_states_are_ordered_by_step(tmp_path):
    for step in (9, 10, 100, 2):
        folder = tmp_path / "state" / f"step-{step}"
        folder.mkdir(parents=True)
        if step != 100:  # killed before it was complete
            (folder / "state.json").write_text("{}")
    assert [path.name for path in Run(tmp_path).states()] == ["step-2", "step-9", "step-10"]


def test_fewer_steps_than_were_done_are_refused(tmp_path: Path) -> None:
    run = open_run(tmp_path, "run", TrainConfig(steps=20))
    (run.path / "state" / "step-20").mkdir(parents=True)
    (run.path / "state" / "step-20" / "state.json").write_text("{}")
    with pytest.raises(UsageError, match="has done 20 steps already"):
        open_run(tmp_path, "run", TrainConfig(steps=10))
    assert run.config.steps == 20
    assert open_run(tmp_path, "run", TrainConfig(steps=30)).config.steps == 30


def test_more_steps_are_other_settings_where_the_schedule_depends_on_them(tmp_path: Path) -> None:
    open_run(tmp_path, "run", TrainConfig(steps=20, schedule="cosine"))
    with pytest.raises(UsageError, match=r"steps \(20 before, 30 now\)"):
        open_run(tmp_path, "run", TrainConfig(steps=30, schedule="cosine"))
    assert default_name(TrainConfig(steps=20)) == default_name(TrainConfig(steps=30))
    cosine = [default_name(TrainConfig(steps=steps, schedule="cosine")) for steps in (20, 30)]
    assert cosine[0] != cosine[1]


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", "/tmp/x"])
def test_a_run_name_is_one_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="single folder name"):
        open_run(tmp_path / "runs", name, TrainConfig())
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_run_that_failed_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    run = open_run(tmp_path, "run", TrainConfig())
    run.discard_if_untrained()
    assert not run.path.exists()
    run = open_run(tmp_path, "run", TrainConfig())
    run.log({"step": 1})
    run.discard_if_untrained()
    assert run.path.exists()


def test_an_unknown_run_is_answered_with_the_nearest(tmp_path: Path) -> None:
    open_run(tmp_path, "edges", TrainConfig())
    with pytest.raises(UsageError, match="Did you mean 'edges'"):
        find_run("edge", tmp_path)
    with pytest.raises(UsageError, match=r"does not say which run is the latest\. Name one: edges"):
        find_run(None, tmp_path)
