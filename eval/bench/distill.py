"""Students of one base, as in ELR-Diffusion's table 1 and BK-SDM's: each distilled for the same steps and seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.config import SampleConfig, TrainConfig
from ...core.errors import UsageError, unknown
from ...core.runs import Run, open_run
from . import students
from .form import OWN, SET_HERE, Arm, Form
from .papers import BK_STUDENTS, ELR_STUDENTS

if TYPE_CHECKING:
    from .workshop import Workshop

ARMS: dict[str, tuple[str, ...]] = {
    "lowrank": ("ratio=0.4225",),
    "lowrank-undistilled": ("ratio=0.4225", "lambda_output=0", "lambda_feature=0", "lambda_task=1"),
    "bk-base": ("prune=base",),
    "bk-small": ("prune=small",),
    "bk-tiny": ("prune=tiny",),
}
"""Arms that need no settings: ELR-Diffusion's student, the same trained on the images alone, and BK-SDM's."""
TIMED_STEPS = 3
"""Steps of the distillation that a plan times."""


class Distill(Form):
    """Rows are students; the first is their teacher."""

    name = "distill"
    title = "Students of {bases} on {data}"
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

    # ----------------------------------------------------------------------------------------------------- work

    def train(self, shop: Workshop, run: Run, config: TrainConfig) -> None:
        """Makes the student and distils it to the end; goes on from its last resume state."""
        students.distilling().distill(
            config, run, shop.source, held_out=shop.held_out, offline=shop.offline, quiet=shop.quiet
        )

    def result(self, run: Run) -> str:
        """The hash of the student's denoiser."""
        from ...core.backbones.bases import content_hash, family_of

        folder = students.student_folder(run)
        return content_hash(folder, family_of(str(folder)).denoiser_part)

    def draw(self, shop: Workshop, run: Run, parent: Path, count: int, sampling: SampleConfig, first: int) -> None:
        """Draws `count` held-out captions with the student into parent/student, image i with seed `first` + i."""
        from ..heldout import sample_heldout

        sample_heldout(
            run, count=count, sampling=sampling, seed=first, which=(self.drawn,), quiet=shop.quiet,
            offline=shop.offline, out=parent, repeat=True, base=str(students.student_folder(run)),
        )  # fmt: skip

    def count(self, shop: Workshop) -> dict[str, dict[str, int]]:
        """Parameters of teacher and students; all of a student's are trained and stored."""
        from .cost import count_bases

        counts = count_bases(shop)
        teacher = counts[self.base]["base"]
        for name in shop.settings.arms:
            config = shop.settings.config(name, 0)
            try:
                size = students.distilling().student_parameters(config, offline=shop.offline)
            except UsageError as error:
                raise type(error)(f"arm {name} does not fit --base {shop.settings.base}: {error}") from error
            counts[name] = {"trainable": size, "stored": size, "base": teacher, "total": size}
        return counts

    def costs(self, shop: Workshop, seed: int, configs: Mapping[str, TrainConfig]) -> dict[str, Any]:
        """Sampling steps of teacher and students in turns; training steps as the runs themselves took them."""
        from .cost import sampling_protocol, sampling_steps
        from .running import training_piece

        runs = {arm: shop.run(arm, seed) for arm in configs}
        folders = {arm: str(students.student_folder(run)) for arm, run in runs.items()}
        rows: dict[str, dict[str, Any]] = {
            name: {"sample_step_s": seconds} for name, seconds in sampling_steps(shop, {}, folders).items()
        }
        for arm, run in runs.items():
            trained = training_piece(run, configs[arm]).result() or {}
            rows[arm]["step_s"] = trained["seconds"] / configs[arm].steps
        step = "mean of the steps of the training, one run after the other"
        return {"rows": rows, "protocol": {"step": step, **sampling_protocol(shop)}}

    def time(self, shop: Workshop, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Seconds of a step and of drawing an image, by distilling for a few steps in a temporary folder."""
        from ...core.training.splits import split_records
        from .cost import sampling_steps
        from .running import log_rows

        times, sampling = {}, shop.settings.sampling
        for name in names:
            config = shop.settings.config(name, 0, steps=TIMED_STEPS)
            training, held_out = split_records(shop.source, shop.held_out, config)
            few = replace(shop.source, records=training[: config.batch])
            with TemporaryDirectory() as folder:
                run = open_run(folder, "timed", config)
                students.distilling().distill(
                    config, run, few, held_out=replace(shop.source, records=held_out[:1]), offline=shop.offline,
                    quiet=True,
                )  # fmt: skip
                seconds = sum(row.get("seconds", 0) for row in log_rows(run))
                drawn = sampling_steps(shop, {}, {name: str(students.student_folder(run))}, repeats=1)[name]
            times[name] = (seconds / TIMED_STEPS, drawn * sampling.steps / sampling.batch)
        return times
