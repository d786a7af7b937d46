"""`sctool bench` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sctool.cli import run


def words(base: Path, data: Path, out: Path) -> list[str]:
    budget = ["--steps", "1", "--batch", "2", "--count", "2", "--sample-steps", "1", "--features", "mini", "--quiet"]
    return ["bench", "transfer", "--base", str(base), "--data", str(data), "--out", str(out), "--seeds", "1", *budget]


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
