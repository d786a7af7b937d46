"""`sctool bench` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sctool.cli import run


def words(base: Path, data: Path, out: Path, table: str = "transfer") -> list[str]:
    budget = ["--steps", "1", "--batch", "2", "--count", "2", "--sample-steps", "1", "--features", "mini", "--quiet"]
    return ["bench", table, "--base", str(base), "--data", str(data), "--out", str(out), "--seeds", "1", *budget]


def test_a_table_in_one_command(
    tiny_base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(tiny_base, pictures, tmp_path / "out")
    assert run([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["rows"].keys() == {"full", "scedit", "base"}
    assert not (tmp_path / "out").exists()
    assert run([*command, "scedit:tuner.ratio=0.5", "--report"]) == 0
    printed = capsys.readouterr().out
    assert "Transfer of" in printed
    assert "--seeds 1: no interval" in printed
    assert "scedit: tuner {'ratio': 0.5}" in printed
    assert (tmp_path / "out" / "report.html").is_file()
    written = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert run([*command, "scedit:tuner.ratio=0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == written


def test_control_in_one_command(
    tiny_base: Path, edges: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*words(tiny_base, edges, tmp_path / "out", "control"), "--methods", "scedit", "--cond", "canny"]
    assert run([*command, "--dry-run"]) == 0
    assert "with canny maps" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert run([*command, "scedit:tuner.kernel=3", "--report"]) == 0
    printed = capsys.readouterr().out
    for text in ("canny F1", "SCEdit's own table 2", "scedit: tuner {'kernel': 3}", "--seeds 1: no interval"):
        assert text in printed
    assert (tmp_path / "out" / "report.html").is_file()
    written = json.loads((tmp_path / "out" / "control.json").read_text())
    assert written["methods"]["scedit"]["figures"].keys() >= {"distance", "clip", "canny.f1", "step_s"}
    assert run([*command, "scedit:tuner.kernel=3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == written


def test_control_on_the_embedded_base_and_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {"step_s": 1.0, "sample_step_s": 1.0, "peak_bytes": None}
    monkeypatch.setattr(  # timing is the same for every base, and takes long on this one
        "sctool.eval.bench.tuner_work.measure_costs",
        lambda shop, configs: {"rows": dict.fromkeys([*configs, *shop.settings.bases], costs), "protocol": {}},
    )
    budget = ["--steps", "1", "--batch", "2", "--count", "2", "--sample-steps", "1", "--seeds", "1", "--quiet"]
    assert (
        run(["bench", "control", "--cond", "canny,color", "--methods", "scedit", "--out", str(tmp_path), *budget]) == 0
    )
    printed = capsys.readouterr().out
    assert "Control of mini by canny, color on photos" in printed
    assert "color palette" in printed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "scedit"], "add --cond"),
        (["--methods", "lora", "--cond", "canny"], "takes no condition maps"),
        (["--methods", "scedti", "--cond", "canny"], "Did you mean 'scedit'?"),
        (["--cond", "cany"], "Did you mean 'canny'?"),
        (["--cond", "canny", "--base", "mini,mini-dit"], "one kind of base"),
        (["--cond", "canny", "--base", "mini,./nowhere/student"], "nowhere/student"),
        (["--cond", "canny", "--maps", "nowhere"], "nowhere"),
        (["--cond", "canny", "--clip-weights", "nowhere.pt", "--steps", "1"], "nowhere.pt"),
    ],
)
def test_wrong_words_of_control(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "control", *more]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--arms", "lowrnk"], "Did you mean 'lowrank'?"),
        (["--arms", "lowrank", "half:ratio=0.5"], "unknown arm 'half'"),
        (["--arms", "lowrank", "lowrank:batch=3"], "the same for all arms"),
        (["cond=canny"], "without condition maps"),
    ],
)
def test_wrong_words_of_distill(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "distill", *more]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "full,scedti"], "Did you mean 'scedit'?"),
        (["--lr", "full"], "METHOD=RATE"),
        (["--rates", "fast"], "--rates fast"),
        (["scedit:size=64"], "only tuner"),
        (["--base", "miny"], "Did you mean 'mini'?"),
        (["--data", "nowhere"], "nowhere"),
        (["--features", "resnet"], "--features"),
    ],
)
def test_wrong_words(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "transfer", *more]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())
