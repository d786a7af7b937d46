"""Help texts that are read from the settings: descriptions, defaults, and no placeholder left over."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer.main

from sctool.cli import app, run
from sctool.cli.options import _PLACEHOLDER, _help, help_of


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("AnnotateConfig.layout", r"merged: a complete data set; maps: only the maps. \[default: merged]"),
        ("AnnotateConfig.jobs", r"Worker processes. \[default: all cores]"),
        ("AnnotateConfig.cond", r"Conditions, e.g. canny:low=50. \[default: canny]"),
        ("AnnotateConfig.limit", "Only the first N images."),
        ("SampleConfig.scheduler", r"Sampler: ddim, dpm++, unipc. \[default: ddim]"),
        ("TrainConfig.warmup", r"Steps of linear warm-up. \[default: 0]"),
    ],
)  # fmt: skip
def test_help_says_the_description_and_the_default(field: str, expected: str) -> None:
    own = "Conditions, e.g. canny:low=50." if field.endswith("cond") else ""
    assert _help(*field.split("."), own) == expected


def test_every_help_text_that_names_a_field_is_filled_in(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in typer.main.get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        texts = [getattr(parameter, "help", None) or "" for parameter in command.params]
        for text in filter(_PLACEHOLDER.match, texts):
            assert not _PLACEHOLDER.search(_help(*_PLACEHOLDER.match(text).groups(), ""))  # pyright: ignore[reportOptionalMemberAccess]
        run([name, "--help"])
        assert "Config." not in capsys.readouterr().out
    assert help_of("AnnotateConfig", "size").startswith("{AnnotateConfig.size}")


def test_the_overview_imports_neither_pydantic_nor_yaml() -> None:
    code = (
        "import sys; from sctool.cli import run; run(['--help']); "
        "slow = {'pydantic', 'yaml', 'numpy'} & set(sys.modules); sys.exit(str(slow) if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
