"""The work of a table of students: distilling them, drawing with them as bases, counting and timing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...core.backbones.bases import content_hash, family_of
from ...core.config import TrainConfig
from ...core.errors import UsageError
from ...core.runs import Run, open_run
from ...core.training.splits import split_records
from . import cost, students
from .running import log_rows, training_piece
from .tuner_work import TunerWork

TIMED_STEPS = 3
"""Steps of the distillation that a plan times."""


class StudentWork(TunerWork):
    """See `workshop.Work`."""

    def train(self, run: Run, config: TrainConfig) -> None:
        """Makes the student and distils it to the end; goes on from its last resume state."""
        shop = self.shop
        students.distilling().distill(
            config, run, shop.source, held_out=shop.held_out, offline=shop.offline, quiet=shop.quiet
        )

    def result(self, run: Run) -> str:
        """The hash of the student's denoiser."""
        folder = students.student_folder(run)
        return content_hash(folder, family_of(str(folder)).denoiser_part)

    def draw(self, run: Run, parent: Path, seed: int) -> None:
        """Draws with the student into parent/student."""
        self.draw_with(run, parent, seed, str(students.student_folder(run)))

    def count(self) -> dict[str, dict[str, int]]:
        """Parameters of teacher and students; all of a student's are trained and stored."""
        settings, counts = self.shop.settings, cost.count_bases(self.shop)
        teacher = counts[settings.form.base]["base"]
        for name in settings.arms:
            try:
                size = students.distilling().student_parameters(settings.config(name, 0), offline=self.shop.offline)
            except UsageError as error:
                raise type(error)(f"arm {name} does not fit --base {settings.base}: {error}") from error
            counts[name] = {"trainable": size, "stored": size, "base": teacher, "total": size}
        return counts

    def costs(self, seed: int, configs: Mapping[str, TrainConfig]) -> dict[str, Any]:
        """Sampling steps of teacher and students in turns; training steps as the runs themselves took them."""
        runs = {arm: self.shop.run(arm, seed) for arm in configs}
        folders = {arm: str(students.student_folder(run)) for arm, run in runs.items()}
        timed = cost.sampling_steps(self.shop, {}, folders)
        rows: dict[str, dict[str, Any]] = {name: {"sample_step_s": seconds} for name, seconds in timed.items()}
        for arm, run in runs.items():
            trained = training_piece(run, configs[arm]).result()
            assert trained is not None
            rows[arm]["step_s"] = trained["seconds"] / configs[arm].steps
        step = "mean of the steps of the training, one run after the other"
        return {"rows": rows, "protocol": {"step": step, **cost.sampling_protocol(self.shop)}}

    def time(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Distils for a few steps, on one batch of images, in a temporary folder."""
        times, shop, sampling = {}, self.shop, self.shop.settings.sampling
        for name in names:
            config = shop.settings.config(name, 0, steps=TIMED_STEPS)
            training, held_out = split_records(shop.source, shop.held_out, config)
            few, one = (replace(shop.source, records=records) for records in (training[: config.batch], held_out[:1]))
            with TemporaryDirectory() as folder:
                run = open_run(folder, "timed", config)
                students.distilling().distill(config, run, few, held_out=one, offline=shop.offline, quiet=True)
                seconds = sum(row.get("seconds", 0) for row in log_rows(run))
                made = {name: str(students.student_folder(run))}
                predicted = cost.sampling_steps(shop, {}, made, repeats=1)[name]
            times[name] = (seconds / TIMED_STEPS, predicted * sampling.steps / sampling.batch)
        return times
