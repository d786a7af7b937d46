"""What makes a folder a student: `student.json` beside its model_index.json. Imports no torch.

A student is a plain diffusers folder that was made from another base, its teacher. One with low-rank layers needs their
ranks to be built; all say whose students they are, so that a teacher's tuners are accepted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UsageError

if TYPE_CHECKING:
    from torch import nn

NAME = "student.json"
FORMAT = 1


@dataclass(frozen=True)
class Student:
    """How a student differs from its teacher.

    `ranks`: rank by layer of the low-rank layers, {} for a pruned student; `form` of its convolutions. `teacher` is
    what the user called it, `ancestors` are the hashes of the teacher and of its own teachers, `made` the settings.
    """

    kind: Literal["low-rank", "pruned"]
    teacher: str
    ancestors: tuple[str, ...]
    ranks: Mapping[str, int] = field(default_factory=dict)
    form: Literal["flat", "spatial"] = "flat"
    made: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"format": FORMAT, **asdict(self)}

    def shaped(self, denoiser: nn.Module) -> nn.Module:
        """The denoiser, built from its diffusers config, with the student's low-rank layers, in place."""
        if not self.ranks:
            return denoiser
        from .thin import make_thin

        return make_thin(denoiser, self.ranks, self.form)


def read_student(folder: Path) -> Student | None:
    """What `student.json` in a base's folder says; None for a base that has none.

    Raises `UsageError` for a file that cannot be read or is of a later version.
    """
    file = folder / NAME
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text())
        if values.pop("format") != FORMAT:
            raise ValueError("it is of another version of sctool")
        return Student(**{**values, "ancestors": tuple(values["ancestors"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} cannot be read ({error}); make the student again with sctool distill.") from error
