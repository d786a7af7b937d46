"""What a table needs of `sctool distill`: the one place where the bench touches `core.distilling`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...core.runs import Run


def distilling() -> Any:
    """The module with `distill_config`, `student_parameters` and `distill`; importing it imports torch."""
    from ...core.distilling import distill

    return distill


def student_folder(run: Run) -> Path:
    """The student that a run of `sctool distill` made."""
    return run.path / "student"
