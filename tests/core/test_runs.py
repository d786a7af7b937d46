"""Run folders: named by their settings, found again, and cut back to the step of the last state."""

import json

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
    with pytest.raises(UsageError, match=r"'three' is not a run folder .*Known: one, two"):
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
