"""The README's commands run as written, in a fresh folder; its map names every module (see test_packaging)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    """Lines that begin with `sctool` in the README's ```sh blocks; blocks for the user's own data are not sh."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("sctool ")]


def test_readme_shows_the_verbs() -> None:
    shown = {line.split()[1] for line in commands()}
    assert {"annotate", "train", "sample", "evaluate", "methods"} <= shown


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_readme_commands_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in commands():
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
