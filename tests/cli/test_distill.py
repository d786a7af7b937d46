"""`sctool distill`: the command, its plan and its messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sctool.cli import run as sctool
from sctool.core.backbones.architectures import architecture
from sctool.core.backbones.loading import load_backbone
from sctool.core.distilling.counting import student_counts

CHEAP = ("--start", "balanced")
"""A start without calibration."""


def words(*parts: object) -> list[str]:
    return [str(part) for part in parts]


def test_steps_0_only_makes_the_student(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = words("distill", "--base", tiny_base, "--steps", 0, "--out", tmp_path, "--name", "s", "--densify", "--json")
    assert sctool(made) == 0
    report = json.loads(capsys.readouterr().out)
    student = load_backbone(report["student"])
    assert student.student is not None
    assert 0 < report["start_error"] == student.student.start_error
    assert sctool([*made[:-1]]) == 0
    assert f"relative output error {report['start_error']:.4f}" in capsys.readouterr().out
    assert sum(p.numel() for p in student.denoiser.parameters()) == report["parameters"]
    stock = load_backbone(str(tmp_path / "s" / "dense"))
    assert stock.denoiser.state_dict().keys() == load_backbone(str(tiny_base)).denoiser.state_dict().keys()
    assert sctool(words("methods", "--base", report["student"])) == 0


def test_the_plan_is_what_the_student_becomes(
    tiny_base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = words(
        "distill", "--base", tiny_base, "--data", pictures, "--ratio", 0.5, *CHEAP, "--out", tmp_path, "--name", "s"
    )
    assert sctool([*common, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not any(tmp_path.iterdir())
    assert sctool([*common, "--dry-run"]) == 0
    assert f"{plan['parameters_after']:,} parameters" in capsys.readouterr().out
    quick = words("--steps", 2, "--batch", 2, "validate_every=2", "sample_every=2", "preview_steps=2", "--json")
    assert sctool([*common, *quick]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"student", "val/loss", "val/fd", "loss"} <= report.keys()
    count = sum(p.numel() for p in architecture(report["student"]).denoiser().parameters())
    assert count == plan["parameters_after"] < plan["parameters_before"]
    assert plan["flops_after"] < plan["flops_before"]
    assert list((tmp_path / "s" / "samples" / "preview").glob("*.png"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ratio", "1.5"], "between 0 and 1"), (["--budget", "10"], "cannot be met"),
        (["--ratio", "0.5", "--prune", "small"], "--ratio and --prune each decide"), (["--prune", "huge"], "prune"),
         (["--ranks", "none.yaml"], "cannot read config"),
        (["cond=canny"], "does not go with distill"), (["--prune", "small", "--densify"], "leave --densify out"),
        (["--prune", "small", "--fastest"], "leave --fastest out"),
        (["--ratio", "0.3", "budget=0.5"], "ratio and budget each decide"),
        (["--prune", "small", "--start", "whitened"], "about low-rank layers"),
        (["--ratio", "1.5", "--steps", "0"], "between 0 and 1"),
    ],
)  # fmt: skip
def test_wrong_settings_end_with_one_message(
    flags: list, message: str, tiny_base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = words("distill", "--base", tiny_base, "--data", pictures, "--steps", 2, "--out", tmp_path)
    assert sctool([*common, *flags]) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not any(path.is_dir() for path in tmp_path.iterdir()), "nothing is left"


def test_a_size_that_does_not_fit_the_base_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert sctool(words("distill", "--base", "mini", "--prune", "tiny", "--dry-run")) == 2
    assert "two innermost stages of equal width" in capsys.readouterr().err


def test_students_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    rows: dict[str, Any] = {row.label: row for row in student_counts(architecture("sd21"))}
    assert rows["the base"].total == 1_289_952_427
    assert abs(rows["low-rank, ratio 0.4225, flat"].total - 790e6) < 790e3
    sizes = [rows[f"BK-SDM, {size}"].parameters for size in ("base", "small", "tiny")]
    assert sizes == [583_480_964, 485_787_524, 326_825_604]
    assert sctool(words("methods", "--base", "sd21")) == 0
    printed = capsys.readouterr().out
    assert "583,480,964" in printed
    assert "365,597,764" in printed


def test_a_student_is_no_teacher_of_a_bigger_one(
    tiny_base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        sctool(
            words(
                "distill", "--base", tiny_base, "--steps", 0, "--ratio", 0.3, *CHEAP, "--out", tmp_path, "--name", "s"
            )
        )
        == 0
    )
    again = words("distill", "--base", tmp_path / "s" / "student", "--ratio", 0.9, "--data", pictures, "--dry-run")
    assert sctool(again) == 2
    assert "a student is smaller" in capsys.readouterr().err


def test_a_finished_student_outlives_a_command_that_fails(
    tiny_base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = words("distill", "--base", tiny_base, *CHEAP, "--out", tmp_path, "--name", "s", "--data", pictures)
    assert sctool([*common, "--steps", "0"]) == 0
    assert sctool([*common, "--steps", "2", "--batch", "2", "size=20"]) == 2
    load_backbone(str(tmp_path / "s" / "student"))
    config = tmp_path / "s" / "config.yaml"
    settings = config.read_text()
    for steps in (0, 2):
        assert sctool([*common, "--ratio", "0.9", "--steps", str(steps)]) == 2
        assert "ratio (None before, 0.9 now), budget (0.4225 before, None now)" in capsys.readouterr().err
    assert config.read_text() == settings, "a refused command leaves the run's settings"
    load_backbone(str(tmp_path / "s" / "student"))
    assert sctool([*common[:-4], "--name", "../t", "--steps", "0"]) == 2
    assert "single folder name" in capsys.readouterr().err


def test_no_student_is_listed_that_would_be_no_smaller(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sctool(words("distill", "--base", tiny_base, *CHEAP, "--out", tmp_path, "--name", "s", "--steps", 0)) == 0
    rows = student_counts(architecture(str(tmp_path / "s" / "student")))
    assert rows[0].label == "the base"
    assert all(row.parameters < rows[0].parameters for row in rows[1:])
