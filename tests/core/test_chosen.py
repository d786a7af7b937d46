"""Which tuner files --tuner and --task mean, and the configs that tasks have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sctool.core.checkpoint import task_files
from sctool.core.chosen import choose, files_by_task
from sctool.core.config import TaskConfig, TrainConfig
from sctool.core.errors import UsageError
from sctool.core.files import save_tensors
from sctool.core.tasks import read_tasks, task_configs


def tuner(path: Path, **meta: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({"w": torch.zeros(1)}, path, {"sctool": json.dumps(meta)})
    return path


def test_tasks_are_named_by_their_files_their_description_or_their_run(tmp_path: Path) -> None:
    multi = [tuner(tmp_path / "multi" / "tuner" / f"{task}.safetensors", task=task) for task in ("a", "b")]
    ordinary = tuner(tmp_path / "one" / "tuner" / "tuner.safetensors")
    copied = tuner(tmp_path / "x" / "tuner.safetensors", task="c")
    assert files_by_task(str(tmp_path / "multi")) == task_files(tmp_path / "multi" / "tuner") == dict(zip("ab", multi))  # noqa: B905
    assert files_by_task(str(ordinary)) == files_by_task(str(tmp_path / "one")) == {"one": ordinary}
    assert files_by_task(str(copied.parent)) == {"c": copied}
    assert files_by_task(str(multi[1])) == {"b": multi[1]}
    assert files_by_task(str(tuner(tmp_path / "y.safetensors"))) == {"y": tmp_path / "y.safetensors"}
    assert files_by_task("mini-canny").keys() == {"mini-canny"}
    assert task_files(tmp_path / "one") == task_files(tmp_path / "none") == {}


def test_tuners_are_chosen_by_task_with_their_scales(tmp_path: Path) -> None:
    multi = [tuner(tmp_path / "multi" / "tuner" / f"{task}.safetensors", task=task) for task in ("a", "b")]
    other = tuner(tmp_path / "other" / "tuner" / "tuner.safetensors")
    given = [(str(tmp_path / "multi"), 0.5), (str(tmp_path / "other"), 2.0)]
    chosen = choose(given, ["other", "b"])
    assert [(one.file, one.scale, one.task) for one in chosen] == [(multi[1], 0.5, "b"), (other, 2.0, "other")]
    assert chosen[0].meta == {"task": "b"}
    assert [(one.file, one.task) for one in choose(given[1:])] == [(other, None)]
    with pytest.raises(UsageError, match="Choose with --task: a, b"):
        choose(given)
    with pytest.raises(UsageError, match=r"unknown task 'othr'. Did you mean 'other'"):
        choose(given, ["othr"])
    with pytest.raises(UsageError, match="has none of the tasks a, but other"):
        choose(given, ["a"])


def test_a_task_has_the_runs_settings_and_its_own(tmp_path: Path) -> None:
    rows = [{"name": "a", "cond": "canny", "tuner": {"ratio": 0.5}}, {"name": "b", "data": "x", "cond": []}]
    config = TrainConfig(data="photos", cond=("color",), tuner={"kernel": 3}, trigger="t", tasks=rows, steps=7)  # pyright: ignore[reportArgumentType]
    a, b = task_configs(config).values()
    assert (a.data, a.cond, a.tuner, a.trigger, a.steps, a.tasks) == (
        "photos", ("canny",), {"kernel": 3, "ratio": 0.5}, "t", 7, (),
    )  # fmt: skip
    assert (b.data, b.cond, b.tuner) == ("x", (), {"kernel": 3})
    assert task_configs(a) == {None: a}
    again = TrainConfig(**json.loads(json.dumps(config.model_dump(mode="json"))))
    assert task_configs(again) == task_configs(config)


def test_a_file_of_tasks_is_a_list_or_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "tasks"
    expected = (TaskConfig(name="a", data="x"), TaskConfig(name="b"))
    for text in (
        "- {name: a, data: x}\n- {name: b}", "a: {data: x}\nb:", '[{"name": "a", "data": "x"}, {"name": "b"}]',
    ):  # fmt: skip
        file.write_text(text)
        assert TrainConfig(tasks=read_tasks(file)).tasks == expected  # pyright: ignore[reportArgumentType]
