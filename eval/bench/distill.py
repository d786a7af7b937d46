"""Students of one base, as in ELR-Diffusion's table 1 and BK-SDM's: each distilled for the same steps and seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from ...core.config import TrainConfig
from ...core.errors import UsageError, unknown
from . import students
from .form import OWN, SET_HERE, Arm, Form
from .papers import BK_STUDENTS, ELR_STUDENTS

ARMS: dict[str, tuple[str, ...]] = {
    "lowrank": ("ratio=0.4225", "start=balanced"),
    "lowrank-undistilled": ("ratio=0.4225", "start=balanced", "output=0", "feature=0", "task=1"),
    "energy": ("budget=0.4225",),
    "energy-undistilled": ("budget=0.4225", "output=0", "feature=0", "task=1"),
    "bk-base": ("prune=base",),
    "bk-small": ("prune=small",),
    "bk-tiny": ("prune=tiny",),
}
"""Arms that need no settings: ELR-Diffusion's student, the one that `sctool distill` makes by default, both trained on
the images alone too, and BK-SDM's."""


class Distill(Form):
    """Rows are students; the first is their teacher."""

    name = "distill"
    title = "Students of {bases} on {data}"
    work = "student_work.StudentWork"
    papers = (ELR_STUDENTS, BK_STUDENTS)
    arms = "arms"
    example = "lowrank,bk-small"
    base = "teacher"
    drawn = "student"
    clip = True
    loss = False
    to_base = True
    timed_after = True
    refused: ClassVar[Mapping[str, str]] = {
        **{key: reason for key, reason in SET_HERE.items() if key != "init"},  # of a student: how it is decomposed
        "method": "a student is trained as a whole",
        "tuner": "a student is trained as a whole, without a tuner",
        "cond": "students are distilled without condition maps; sctool bench control compares methods on them",
    }

    # ------------------------------------------------------------------------------------------------- settings

    def check_names(self, names: Sequence[str], own: Mapping[str, tuple[str, ...]]) -> None:
        """Refuses arms that are neither known nor have settings."""
        for name in names:
            if name not in ARMS and name not in own:
                raise unknown("arm", name, ARMS, f" For another student, write its settings: {name}:ratio=0.5.")

    def refuse_unknown(self, name: str, names: Sequence[str], where: str) -> None:
        """Raises `UsageError` for a name that is not among `names`; `where` it was written."""
        if name not in names:
            raise unknown("arm", name, names, f" It is in '{where}'; --arms names the rows of the table.")

    def check_own(self, pair: str, name: str, key: str) -> None:
        """Raises `UsageError` for a setting of one arm, `pair`, that must be the same for all of them."""
        shared = TrainConfig.model_fields.keys() - {*OWN, "init"}
        if key in shared or key in self.refused:
            reason = self.refused.get(key) or f"it is the same for all arms, {pair[len(name) + 1 :]}"
            raise UsageError(f"{pair} cannot be set for one arm: {reason}.")

    def recipe(self, name: str) -> tuple[str, ...]:
        """The settings of a known arm."""
        return ARMS.get(name, ())

    def config(self, arm: Arm, flags: Mapping[str, Any], pairs: Iterable[str]) -> TrainConfig:
        """A run's configuration."""
        return students.distilling().distill_config({**flags, "base": arm.base}, list(pairs))

    def check_config(self, config: TrainConfig) -> None:
        """Nothing more: `config` has checked it."""
