"""A student's run: made from its teacher, trained against it by the ordinary trainer, and written as a base."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn

from ..backbones.bases import content_hash, family_of_base, find_base
from ..backbones.families import family_of_denoiser
from ..backbones.loading import Backbone, load_backbone
from ..backbones.students import read_student
from ..backbones.thin import make_thin
from ..backbones.upsampling import fold_upsampling
from ..config import DistillConfig, SampleConfig, StudentConfig, TrainConfig
from ..data.records import Source
from ..devices import choose_precision, torch_dtype
from ..errors import UsageError
from ..progress import Progress
from ..resolving import resolve_config
from ..runs import Run
from ..training.lanes import Distance, TaskSet
from ..training.log import Summary
from ..training.objective import DiffusionObjective, Objective
from ..training.recipe import Recipe
from ..training.train import train_tasks
from .card import student_card
from .fastest import fastest
from .making import Say, all_ranks, densified, make, plan, save_student
from .objective import DistillObjective, Stages
from .pruning import matching_stages
from .teacher import TeacherCache

if TYPE_CHECKING:
    from ..sites.attaching import TunedBackbone
    from ..training.training import Training

LEARNING_RATE = 5e-5
"""BK-SDM's (arXiv 2305.15798, section 4)."""
START, RESULT = "start", "student"
"""Folders of a run: the untrained student and the trained one."""
Also = Literal["dense", "fast"]
"""Other folders of the trained student: in the stock architecture, and with each layer in the faster form."""


class Distillation(Recipe):
    """Trains all weights of a student against its teacher, the run's base."""

    def __init__(
        self, run: Run, config: TrainConfig, also: Collection[Also] = (), say: Say = lambda line: None
    ) -> None:
        """Raises `UsageError` for settings that do not go with a student."""
        assert config.distill is not None
        self.run, self.settings, self.also, self.say = run, config.distill, also, say
        self.teacher: Backbone | None = None
        check(config)

    def load(self, config: TrainConfig, device: torch.device, offline: bool) -> tuple[Backbone, str]:
        """The untrained student, made when it is not there yet, and the run's precision."""
        precision = choose_precision(config.precision, device)
        options: dict[str, Any] = {"dtype": torch_dtype(precision), "device": device, "offline": offline}
        with PartialState().main_process_first():
            start = make_start(self.run, config, offline=offline, say=self.say)
        self.teacher = load_backbone(config.base, **options)
        fold_upsampling(self.teacher.denoiser)
        return load_backbone(str(start), **options), precision

    def reference(self, backbone: Backbone) -> Backbone:
        """The teacher, whose encoders are the student's: captions are encoded already."""
        assert self.teacher is not None
        return self.teacher

    def besides(self, precision: str) -> int:
        """The teacher's weights."""
        assert self.teacher is not None
        return sum(p.numel() * p.element_size() for p in self.teacher.denoiser.parameters())

    def begin(self, run: Run) -> None:
        """A student's run has no tuner to sample with, so it is not the latest one."""

    def objective(self, ordinary: DiffusionObjective, model: TunedBackbone) -> Objective:
        """The three losses."""
        assert self.teacher is not None
        config, student = self.settings, model.denoiser
        teacher = self.teacher.denoiser.to(ordinary.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        cache = None
        if config.cache:
            run = self.run.config
            cache = TeacherCache(
                self.run.path / "teacher", config.cache, run.seed, ordinary.noising, run.caption_dropout
            )
        stages = stages_of(student, config)
        return DistillObjective(ordinary, teacher, student, config, stages, cache)

    def finish(self, training: Training, summary: Summary) -> None:
        """Writes the student as a base, and the run's card. The trained weights are in the denoiser."""
        write_student(self.run, training.backbone, student_card(training, summary), self.also)


def check(config: TrainConfig) -> None:
    """Raises `UsageError` for settings of a training that a student's cannot have."""
    refused = {
        "mask": (config.mask, "the teacher sees all tokens"),
        "cond": (config.cond, "a student learns the base alone; train a tuner on it afterwards"),
        "tasks": (config.tasks, "a student has no tasks"),
        "init": (config.init, "a student starts from its teacher"),
    }
    for key, (value, reason) in refused.items():
        if value:
            raise UsageError(f"{key} does not go with distill: {reason}. Leave it out.")
    if config.method != "full":
        raise UsageError("all of a student's weights are trained; leave --method out.")
    if config.compile and config.distill and config.distill.feature:
        raise UsageError("compile=true hides the blocks' outputs; give feature=0 with it, or leave it out.")


def make_start(run: Run, config: TrainConfig, *, offline: bool = False, say: Say = lambda line: None) -> Path:
    """The folder of the run's untrained student; made from the teacher in float32 when it is not there yet.

    Raises `UsageError` where the run has one that was made with other settings, or of another teacher.
    """
    folder = run.path / START
    assert config.distill is not None
    if read_student(folder) is not None:
        check_run(run, config, offline=offline)
    else:
        teacher = load_backbone(config.base, offline=offline)
        denoiser, student = make(teacher, config.distill, say)
        save_student(folder, teacher, denoiser, student, f"---\nlicense: {teacher.licence}\n---\n")
    return folder


def check_run(run: Run, config: TrainConfig, *, offline: bool = False) -> None:
    """Raises `UsageError` where the run has a student that `config` does not describe, or of another teacher."""
    made = read_student(run.path / START)
    if made is None:
        return
    assert config.distill is not None
    wanted = {key: config.distill.model_dump(mode="json")[key] for key in StudentConfig.model_fields}
    changed = [f"{k} ({made.made.get(k)} before, {v} now)" for k, v in wanted.items() if made.made.get(k) != v]
    if changed:
        raise UsageError(
            f"run '{run.name}' has a student made with other settings: {', '.join(changed)}. Choose another --name."
        )
    folder = find_base(config.base, offline)
    if content_hash(folder, family_of_base(folder, config.base).denoiser_part) != made.ancestors[0]:
        raise UsageError(
            f"run '{run.name}' has a student of '{made.teacher}' with other weights than --base {config.base} has now. "
            "Choose another --name."
        )


def make_only(
    run: Run, config: TrainConfig, *, also: Collection[Also] = (), offline: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Writes the untrained student as the run's result; returns its figures.

    Raises `UsageError` for a run that has trained its student.
    """
    if run.states() or run.metrics.exists():
        raise UsageError(
            f"run '{run.name}' has trained its student, which --steps 0 would replace by the untrained one. "
            "Choose another --name."
        )
    start = make_start(run, config, offline=offline, say=Progress(quiet).note)
    backbone = load_backbone(str(start), offline=offline)
    write_student(run, backbone, (start / "README.md").read_text(), also)
    assert backbone.student is not None
    return {
        "run": str(run.path), "student": str(run.path / RESULT),
        "parameters": sum(p.numel() for p in backbone.denoiser.parameters()),
        "start_error": backbone.student.start_error,
    }  # fmt: skip


def write_student(run: Run, start: Backbone, card: str, also: Collection[Also] = ()) -> Path:
    """Writes the trained student, whose weights are in `start`'s denoiser, into the run; returns its folder.

    also: other forms of a low-rank one, each in a folder of that name.
    """
    student, denoiser = read_student(run.path / START), plain(start.denoiser)
    assert student is not None
    folder = save_student(run.path / RESULT, start, denoiser, student, card)
    if student.ranks and "dense" in also:
        save_student(run.path / "dense", start, densified(denoiser), replace(student, ranks={}), card)
    if student.ranks and "fast" in also:
        fast = fastest(denoiser.to(start.device), partial(one_call, start)).cpu()
        save_student(run.path / "fast", start, fast, replace(student, ranks=all_ranks(fast)[0]), card)
    return folder


def one_call(backbone: Backbone, denoiser: nn.Module) -> Tensor:
    """A call of a denoiser in the base's place as `sctool sample` makes by default, of noise without a prompt."""
    batch, side = 2 * SampleConfig().batch, backbone.resolution // backbone.vae_scale  # twice, for guidance
    latents = torch.randn(batch, backbone.latent_channels, side, side).to(backbone.device)
    rows = {name: value.to(backbone.device) for name, value in backbone.encode_prompts([""] * batch).items()}
    rows |= backbone.family.size_rows(batch, backbone.resolution, backbone.device)
    return backbone.family.output(denoiser, latents, torch.zeros(batch, device=backbone.device), rows)


def plain(denoiser: nn.Module) -> nn.Module:
    """A float32 copy of the denoiser as it is now, without hooks or what was attached to it."""
    config: Any = denoiser.config
    named = {**config, "_class_name": type(denoiser).__name__}
    state = {name: value.detach().float().cpu() for name, value in denoiser.state_dict().items()}
    own = make_thin(family_of_denoiser(named).build_denoiser(dict(config)), *all_ranks(denoiser))
    own.load_state_dict(state)
    return own.requires_grad_(False).eval()


def stages_of(student: Any, config: DistillConfig) -> Stages:
    """The modules whose outputs are compared: a U-Net's stages, a transformer's blocks."""
    if hasattr(student, "down_blocks"):
        return matching_stages(student, config.prune or "")
    names = [f"transformer_blocks.{index}" for index in range(len(student.transformer_blocks))]
    return [(name, name) for name in names]


def distill_config(flags: Mapping[str, Any], pairs: Iterable[str] = (), file: str | Path | None = None) -> TrainConfig:
    """The settings of a run: the flags of `sctool distill`, and KEY=VALUE pairs, in which a student's keys are bare.

    Raises `UsageError` for wrong keys and values, and for settings that a student's training cannot have.
    """
    own = {key: value for key, value in flags.items() if key in DistillConfig.model_fields and value is not None}
    rest = {key: value for key, value in flags.items() if key not in DistillConfig.model_fields}
    named = [f"distill.{pair}" if pair.partition("=")[0] in DistillConfig.model_fields else pair for pair in pairs]
    config = resolve_config(TrainConfig, file=file, flags={**rest, "method": "full", "distill": own}, pairs=named)
    config = config if config.lr is not None else config.model_copy(update={"lr": LEARNING_RATE})
    check(config)
    return config


def student_parameters(config: TrainConfig, *, offline: bool = False) -> int:
    """The parameters of the student's denoiser; nothing is made. Raises `UsageError` where it does not fit."""
    assert config.distill is not None
    return plan(load_backbone(config.base, offline=offline), config.distill).after


def distill(
    config: TrainConfig, run: Run, source: Source, *, held_out: Source | None = None, distance: Distance | None = None,
    also: Collection[Also] = (), offline: bool = False, quiet: bool = False,
) -> Summary:  # fmt: skip
    """Makes the config's student and trains it into the run folder, as `core.training.train`; the same call resumes.

    distance: measures the student's samples against the teacher's on the way. The student is RUN/student; also: its
    other forms, RUN/dense and RUN/fast.
    """
    recipe = Distillation(run, config, also, Progress(quiet).note)
    part = TaskSet(source, held_out, distance=distance)
    return train_tasks(config, run, {None: part}, offline=offline, quiet=quiet, recipe=recipe)
