"""What makes a folder a student: `student.json` beside its model_index.json. Imports no torch.

A student is a plain diffusers folder that was made from another base, its teacher. One with low-rank layers needs their
ranks to be built; all say whose students they are, so that a teacher's tuners are accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UsageError

if TYPE_CHECKING:
    from torch import nn

NAME = "student.json"
FORMAT = 1
REMEDY = "Make the student again with sctool distill."


@dataclass(frozen=True)
class Student:
    """How a student differs from its teacher.

    `ranks`: rank by layer of the low-rank layers, {} for a pruned student; `form` of its convolutions. `teacher` is
    what the user called it, `ancestors` are the hashes of the teacher and of its own teachers, `made` the settings.
    `moved` are those ancestors whose skips and blocks are numbered otherwise, since blocks were removed. `start_error`
    is the relative squared difference of the outputs to the teacher's before training.
    """

    kind: Literal["low-rank", "pruned"]
    teacher: str
    ancestors: tuple[str, ...]
    ranks: Mapping[str, int] = field(default_factory=dict)
    form: Literal["flat", "spatial"] = "flat"
    made: Mapping[str, Any] = field(default_factory=dict)
    moved: tuple[str, ...] = ()
    start_error: float | None = None

    def as_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"format": FORMAT, **asdict(self)}

    def shaped(self, denoiser: nn.Module, base: str) -> nn.Module:
        """The denoiser, built from its diffusers config, with the student's low-rank layers, in place.

        Raises `UsageError`, in which `base` is what the user calls the student, for a layer that cannot be one.
        """
        if not self.ranks:
            return denoiser
        from .thin import divisible, make_thin

        modules = dict(denoiser.named_modules(remove_duplicate=False))
        for name in self.ranks:
            if name not in modules or not divisible(modules[name]):
                raise UsageError(
                    f"--base {base}: {NAME} names '{name}', which is no linear or convolutional layer of its denoiser. "
                    f"{REMEDY}"
                )
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
        student = Student(
            **{**values, "ancestors": tuple(values["ancestors"]), "moved": tuple(values.get("moved", ()))}
        )
        _check(student)
        return student
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} cannot be read ({error}). {REMEDY}") from error


def first_teacher(base: str) -> str:
    """What the base that a student goes back to is called; any other base's own name.

    A student without its folder is taken for a base.
    """
    seen = set[str]()
    while base not in seen and (student := read_student(Path(base).expanduser())) is not None:
        seen.add(base)
        base = student.teacher
    return base


def _check(student: Student) -> None:
    """Raises `ValueError` for values that no student has."""
    if student.kind not in ("low-rank", "pruned") or student.form not in ("flat", "spatial"):
        raise ValueError(f"kind '{student.kind}' and form '{student.form}' are not known")
    for name, rank in student.ranks.items():
        if type(rank) is not int or rank < 1:
            raise ValueError(f"the rank of {name} is {rank!r}, not a whole number from 1 on")
    if not student.ancestors or not all(re.fullmatch("[0-9a-f]{64}", str(one)) for one in student.ancestors):
        raise ValueError("ancestors are not SHA-256 hashes")
