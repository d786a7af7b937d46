"""What the runs of a table share: the data, opened once, the folder, and how the user is told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ...annotators.training_sets import open_training_sets
from ...core.backbones.bases import family_of, resolution
from ...core.config import TrainConfig
from ...core.data.records import Source
from ...core.devices import best_device
from ...core.errors import UsageError
from ...core.progress import Progress
from ...core.runs import Run, changed_settings
from ..heldout import evaluation_records
from .settings import Settings


@dataclass(frozen=True)
class Workshop:
    """An open table: its settings, data, folder and progress."""

    settings: Settings
    out: Path
    source: Source
    held_out: Source | None
    size: int
    """The side of training images and samples in pixels."""
    device: str
    offline: bool
    quiet: bool

    @property
    def progress(self) -> Progress:
        """Messages to the user."""
        return Progress(self.quiet)

    def run(self, config: TrainConfig) -> Run:
        """The run folder of a method and a seed."""
        return Run(self.out / "runs" / f"{config.method}-seed{config.seed}")

    def rate_run(self, config: TrainConfig) -> Run:
        """The run folder of a learning rate that is tried."""
        return Run(self.out / "rates" / f"{config.method}-lr{config.lr:g}")


def open_workshop(settings: Settings, out: str | Path, *, offline: bool = False, quiet: bool = False) -> Workshop:
    """Opens the data. Raises `UsageError` for data that is missing or has no held-out images."""
    config = settings.config(settings.methods[0], 0)
    size = config.size or resolution(config.base, offline)
    family, drawn = family_of(config.base, offline), settings.sampling
    prompt = family.prompt_rule(config.trigger, config.caption)
    source, held_out, _ = open_training_sets(config, size, prompt=prompt, quiet=quiet)
    if not evaluation_records(source, held_out, config):
        raise UsageError(
            f"--data {config.data} has no held-out images, whose captions are drawn. Mark some with the split "
            "'validation' or 'test', give a set with val_data=FOLDER, or use a set of at least ten images."
        )
    guidance = family.guidance if drawn.guidance is None else drawn.guidance
    sampling = drawn.model_copy(update={"size": size, "guidance": guidance})
    settings = replace(settings, sampling=sampling)
    return Workshop(settings, Path(out), source, held_out, size, best_device(), offline, quiet)


def refuse_changed(run: Run, config: TrainConfig) -> None:
    """Raises `UsageError` for a run that exists with other settings, or with more steps."""
    if changed := changed_settings(run, config):
        raise UsageError(
            f"{run.path} exists with other settings: {', '.join(changed)}. Choose another --out, or remove that folder."
        )
    done = max((int(state.name[5:]) for state in run.states()), default=0)
    if done > config.steps:
        raise UsageError(
            f"{run.path} has done {done} steps already, more than --steps {config.steps}. Choose another --out."
        )
