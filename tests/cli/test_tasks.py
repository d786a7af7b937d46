"""`--tasks`, `--task` and `--class` from the command line: training, sampling, evaluating, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sctool.cli import run as sctool

from ..core.backbones.test_dit import save, tie, transformer

QUICK = ["steps=1", "batch=2", "validate_every=0", "sample_every=0", "lr=0.01", "precision=fp32"]


@pytest.fixture(scope="module")
def folder(tiny_base: Path, pictures: Path, edges: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a run `multi` of the tasks style and edges, and an ordinary run `alone`."""
    here = tmp_path_factory.mktemp("work")
    (here / "tasks.yaml").write_text(
        f"- {{name: style, data: {pictures}, trigger: <sce>}}\n- {{name: edges, data: {edges}, cond: canny}}\n"
    )
    words = ["train", "--base", str(tiny_base), "--out", str(here / "runs"), "--quiet", *QUICK]
    assert sctool([*words, "--tasks", str(here / "tasks.yaml"), "--name", "multi"]) == 0
    assert sctool([*words, "--data", str(edges), "--cond", "canny", "--name", "alone"]) == 0
    (here / "runs" / "latest").write_text("multi\n")
    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(here / "map.png")
    return here


@pytest.fixture
def work(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working folder entered; files that a test writes go to `tmp_path`."""
    monkeypatch.chdir(folder)
    return folder


def rows(samples: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (samples / "metadata.jsonl").read_text().splitlines()]


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused as wrong usage, in one message; returns it."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert sctool(list(words)) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert len(error.strip().splitlines()) <= 3
        return " ".join(error.split())

    return run


def test_training_says_where_each_tuner_is(
    folder: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks.json"
    table = {row["name"]: row for row in json.loads(json.dumps(_tasks(folder)))}
    tasks.write_text(json.dumps(table))
    words = ["train", "--tasks", str(tasks), "--base", str(tiny_base), "--out", str(tmp_path), "--quiet", *QUICK]
    assert sctool([*words, "--name", "other", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["tuners"] == {
        task: str(tmp_path / "other" / "tuner" / f"{task}.safetensors") for task in ("style", "edges")
    }
    assert out["loss"] == pytest.approx((out["loss/style"] + out["loss/edges"]) / 2)
    assert sctool([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {task: row["images"] for task, row in plan["tasks"].items()} == {"style": 9, "edges": 9}
    assert sctool([*words, "--dry-run"]) == 0
    assert "task       edges, controlled by canny" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def _tasks(folder: Path) -> list[dict[str, Any]]:
    import yaml

    return yaml.safe_load((folder / "tasks.yaml").read_text())


def test_the_run_is_named_by_its_tasks(tmp_path: Path) -> None:
    from sctool.core.config import TrainConfig
    from sctool.core.runs import default_name

    one, other = (
        TrainConfig(tasks=({"name": "a"}, {"name": "b", "trigger": word}))  # pyright: ignore[reportArgumentType]
        for word in ("x", "y")
    )
    assert default_name(one).startswith("scedit-a-b-mini-")
    assert default_name(one) != default_name(other)


# -------------------------------------------------------------------------------------------------------- sampling


def test_every_prompt_is_drawn_once_for_each_task_in_one_batch(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sctool.core import sampling

    batches: list[Any] = []
    batch = sampling.sample_batch

    def noted(*args: Any, **kwargs: Any) -> Any:
        batches.append((args[-1], {name: tuple(hint.shape) for name, hint in (args[-2] or {}).items()}))
        return batch(*args, **kwargs)

    monkeypatch.setattr(sampling, "sample_batch", noted)
    words = ["sample", "a hat", "a bag", "--tuner", "runs/multi", "--hint", "canny=map.png", "--steps", "2", "--quiet"]
    assert sctool([*words, "--task", "style,edges", "--out", str(tmp_path / "both")]) == 0
    assert batches == [(["style", "edges"] * 2, {"canny": (4, 3, 32, 32)})]
    drawn = rows(tmp_path / "both")
    assert [(row["prompt"], row["task"], row["seed"]) for row in drawn] == [
        ("a hat", "style", 0), ("a hat", "edges", 0), ("a bag", "style", 1), ("a bag", "edges", 1),
    ]  # fmt: skip
    assert [list(row["hints"]) for row in drawn] == [[], ["canny"]] * 2
    assert sctool([*words, "--task", "edges", "--out", str(tmp_path / "edges")]) == 0
    assert batches[1][0] == ["edges"] * 2
    for number, row in enumerate(rows(tmp_path / "edges")):
        mixed, alone = (
            np.asarray(Image.open(path)).astype(int)
            for path in (tmp_path / "both" / drawn[2 * number + 1]["file_name"], tmp_path / "edges" / row["file_name"])
        )
        assert np.abs(mixed - alone).max() <= 1


def test_an_ordinary_run_is_a_task_of_its_name(work: Path, tmp_path: Path) -> None:
    words = ["sample", "a hat", "--tuner", "runs/multi", "--tuner", "alone:0.5", "--task", "style", "--task", "alone"]
    assert sctool([*words, "--steps", "1", "--quiet", "--out", str(tmp_path / "o")]) == 0
    assert [row["task"] for row in rows(tmp_path / "o")] == ["style", "alone"]
    used = json.loads((tmp_path / "o" / "sampling.json").read_text())["tuners"]
    assert [(tuner["file"], tuner["task"], tuner["scale"]) for tuner in used] == [
        ("runs/multi", "style", 1.0), ("alone", "alone", 0.5),
    ]  # fmt: skip


def test_rows_of_a_file_may_name_their_task(work: Path, tmp_path: Path, refused: Refused) -> None:
    table = tmp_path / "prompts.jsonl"
    table.write_text('{"prompt": "a", "task": "edges", "seed": 5}\n{"prompt": "b", "task": "style"}\n')
    words = ["sample", "--prompts", str(table), "--steps", "1", "--quiet", "--out", str(tmp_path / "o")]
    assert sctool(words) == 0
    assert [(row["prompt"], row["task"], row["seed"]) for row in rows(tmp_path / "o")] == [
        ("a", "edges", 5), ("b", "style", 1),
    ]  # fmt: skip
    assert "unknown task 'edges'" in refused(*words, "--task", "style")
    table.write_text('{"prompt": "a", "task": "edgse"}\n')
    assert "Did you mean 'edges'" in refused(*words)


def test_the_held_out_images_of_every_task_are_drawn(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", "--steps", "1", "--count", "2", "--quiet", "--json", "--out", str(tmp_path / "o")]
    assert sctool(words) == 0
    sheets = json.loads(capsys.readouterr().out)["sheets"]
    assert sheets == [str(tmp_path / "o" / task / "sheet.png") for task in ("style", "edges")]
    assert rows(tmp_path / "o" / "style" / "tuned")[0]["prompt"].startswith("<sce>")
    assert list(rows(tmp_path / "o" / "edges" / "base")[0]["hints"]) == ["canny"]
    assert sctool([*words[:-1], str(tmp_path / "one"), "--task", "edges"]) == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["edges"]


def test_the_held_out_images_on_another_base_are_kept_apart(
    work: Path, tiny_base: Path, base_maker: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["sample", "--tuner", "runs/alone", "--steps", "1", "--count", "2", "--quiet"]
    make = ["distill", "--base", str(tiny_base), "--steps", "0", "--out", str(tmp_path), "--name", "small", "--quiet"]
    assert sctool([*make, "--start", "balanced"]) == 0
    assert sctool([*words, "--base", str(tmp_path / "small" / "student")]) == 0
    drawn = work / "runs" / "alone" / "samples-on-student"
    assert json.loads((drawn / "tuned" / "sampling.json").read_text())["base"]["id"].endswith("small/student")
    assert list(rows(drawn / "tuned")[0]["hints"]) == ["canny"]
    assert not (work / "runs" / "alone" / "samples" / "tuned").exists(), "the run is evaluated by its own base's"
    other = base_maker(tmp_path / "other", seed=5)
    assert sctool([*words, "--base", str(other)]) == 1
    assert sctool([*words, "--base", str(other), "--force", "--out", str(tmp_path / "o")]) == 0
    assert json.loads((tmp_path / "o" / "base" / "sampling.json").read_text())["base"]["id"] == str(other)


def test_one_task_of_a_run_is_evaluated(work: Path, capsys: pytest.CaptureFixture[str], refused: Refused) -> None:
    words = ["evaluate", "runs/multi", "--nmse", "--count", "2", "--steps", "1", "--quiet"]
    assert "Choose with --task: style, edges" in refused(*words)
    assert sctool([*words, "--task", "edges", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folders"]["tuned"]["count"] == 2
    assert (work / "runs/multi/samples/edges/tuned/metadata.jsonl").is_file()
    assert "Did you mean 'edges'" in refused(*words, "--task", "edgse")
    assert "trained without tasks" in refused("evaluate", "runs/alone", "--nmse", "--task", "edges")
    assert "a task belongs to a run" in refused("evaluate", "runs/multi/samples/edges", "--nmse", "--task", "edges")


def test_wrong_tasks_of_a_sampling_are_refused(work: Path, refused: Refused) -> None:
    words = ["sample", "a", "--steps", "1", "--quiet"]
    assert "Choose with --task: edges, style" in refused(*words)
    assert "Choose with --task: edges, style" in refused(*words, "--tuner", "runs/multi", "--tuner", "runs/alone")
    assert "Did you mean 'edges'" in refused(*words, "--task", "edgse")
    assert "unknown task 'edges'. Known: alone." in refused(*words, "--tuner", "runs/alone", "--task", "edges")
    assert "--tuner runs/alone has none of the tasks edges, but alone" in refused(
        *words, "--tuner", "runs/multi", "--tuner", "runs/alone", "--task", "edges"
    )
    assert "--task and --no-tuner exclude" in refused(*words, "--no-tuner", "--task", "edges")
    assert "unknown hint 'canny'" in refused(*words, "--task", "style", "--hint", "canny=map.png")
    assert "trained without tasks" in refused("sample", "--tuner", "runs/alone", "--task", "edges")
    assert "one run are drawn at a time" in refused("sample", "--tuner", "runs/alone", "--tuner", "runs/multi")


# --------------------------------------------------------------------------------------------------- wrong tasks files


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- {name: a}\n- {name: a}", "two tasks are called 'a'"),
        ("- {name: a, dta: x}", "task 1: key 'dta'. Did you mean 'data'"),
        ("- {data: x}", "is no task"), ("- [a]", "is no task"), ("[]", "write a list"), ("a: [", "not valid YAML"),
        ("a: 3", "is no task"), ("- {name: A b}", "task 1: name='A b'"),
        ("- {name: tuner}", "cannot be called 'tuner'"),
        ("- {name: a, cond: [canny, canny]}", "canny"), ("- {name: a, caption: '{x}'}", "the only placeholder"),
        ("- {name: a}\n- {name: b, tuner: {ration: 1}}", "Did you mean 'ratio'"),
        ("- {name: a, cond: cany}", "Did you mean 'canny'"), ("a: {name: b}", "is no task"),
    ],
)  # fmt: skip
def test_a_wrong_file_of_tasks_is_refused(text: str, reason: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "tasks.yaml").write_text(text)
    assert reason in refused("train", "--tasks", str(tmp_path / "tasks.yaml"), "--out", str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_missing_file_and_a_method_for_whole_batches_are_refused(tmp_path: Path, refused: Refused) -> None:
    assert "No such file" in refused("train", "--tasks", str(tmp_path / "none.yaml"))
    (tmp_path / "tasks.yaml").write_text("a:\nb: {trigger: x}\n")
    words = ["train", "--tasks", str(tmp_path / "tasks.yaml"), "--out", str(tmp_path / "runs")]
    assert "method full changes the denoiser for a whole batch" in refused(*words, "--method", "full")
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------------- classes


def test_classes_are_drawn_by_label_or_id(tmp_path: Path, refused: Refused) -> None:
    base = save(tie(transformer()), tmp_path / "dit")
    words = ["sample", "--no-tuner", "--base", str(base), "--steps", "1", "--quiet", "--out", str(tmp_path / "o")]
    assert sctool([*words, "--class", "hat", "--class", "1", "--count", "2"]) == 0
    assert [(row["prompt"], row["seed"]) for row in rows(tmp_path / "o")] == [
        ("hat", 0), ("hat", 1), ("1", 2), ("1", 3),
    ]  # fmt: skip
    before = (tmp_path / "o" / "metadata.jsonl").read_text()
    assert "class 9 is out of range" in refused(*words, "--class", "hat", "--class", "9", "--batch", "1")
    assert "Did you mean 'hat'" in refused(*words, "--class", "hta")
    assert (tmp_path / "o" / "metadata.jsonl").read_text() == before, "nothing was drawn"


def test_a_base_that_is_conditioned_on_text_has_no_classes(tiny_base: Path, refused: Refused) -> None:
    error = refused("sample", "--no-tuner", "--base", str(tiny_base), "--class", "hat", "--quiet")
    assert "--class is for class-conditional bases" in error
    assert "is conditioned on text: pass a prompt" in error


def test_the_classes_of_a_tuner_are_known_by_their_labels(tmp_path: Path, refused: Refused) -> None:
    import torch

    from sctool.core.backbones.loading import load_backbone
    from sctool.core.checkpoint import save_tuner
    from sctool.core.tuners.configs import FullConfig
    from sctool.core.tuners.full import Full

    backbone = load_backbone(str(save(tie(transformer()), tmp_path / "dit")))
    tuner = Full.build(FullConfig(), backbone.denoiser, (), backbone.vae_scale, ("yak",))
    assert tuner.new_classes is not None
    with torch.no_grad():
        tuner.new_classes.offsets.add_(1)
    save_tuner(tmp_path / "tuner", tuner, backbone)
    words = ["sample", "--tuner", str(tmp_path / "tuner"), "--steps", "1", "--quiet", "--out", str(tmp_path / "o")]
    assert sctool([*words, "--class", "yak", "--class", "4", "--class", "", "--seed", "3"]) == 0
    first, second, null = (np.asarray(Image.open(tmp_path / "o" / f"00000{i}.png")) for i in range(3))
    assert first.shape == second.shape == null.shape
    assert "unknown class 'yka'. Did you mean 'yak'" in refused(*words, "--class", "yka")


def test_a_class_is_drawn_for_the_tasks_that_know_it(tmp_path: Path, refused: Refused) -> None:
    from sctool.core.backbones.loading import load_backbone
    from sctool.core.checkpoint import save_tuner
    from sctool.core.tuners import method_config, tuner_class

    backbone = load_backbone(str(save(tie(transformer()), tmp_path / "dit")))
    words = ["sample", "--steps", "1", "--quiet", "--out", str(tmp_path / "o"), "--task", "birds,fish"]
    for task, labels in (("birds", ("owl",)), ("fish", ("eel", "cod"))):
        tuner = tuner_class("diffscaler").build(
            method_config("diffscaler", {}), backbone.denoiser, (), backbone.vae_scale, labels
        )
        save_tuner(tmp_path / task, tuner, backbone, task=task)
        words += ["--tuner", str(tmp_path / task / "tuner.safetensors")]
    assert sctool([*words, "--class", "hat", "--class", "owl", "--class", "eel"]) == 0
    assert [(row["prompt"], row["task"]) for row in rows(tmp_path / "o")] == [
        ("hat", "birds"), ("hat", "fish"), ("owl", "birds"), ("eel", "fish"),
    ]  # fmt: skip
    assert "unknown class 'codd'" in refused(*words, "--class", "codd")


def test_a_method_that_needs_maps_says_so(refused: Refused) -> None:
    for method in ("controlnet", "t2i-adapter", "elr"):
        assert "needs condition maps. Add --cond" in refused("train", "--method", method)
