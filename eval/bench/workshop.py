"""What the runs of a table share: the data, opened once, the folder, and how the user is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ...annotators.training_sets import open_training_sets
from ...core.backbones.bases import family_of, resolution
from ...core.config import TrainConfig
from ...core.data.records import Source
from ...core.devices import best_device
from ...core.errors import UsageError
from ...core.progress import Progress
from ...core.runs import Run, changed_settings
from ..heldout import evaluation_records
from .settings import Settings, folder_name


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
    maps: Mapping[str, Any] = field(default_factory=dict)
    """How the condition maps were made, by condition."""

    @property
    def work(self) -> Work:
        """What trains and draws the table's runs."""
        module, _, name = self.settings.form.work.partition(".")
        return getattr(import_module(f".{module}", __package__), name)(self)

    @property
    def progress(self) -> Progress:
        """Messages to the user."""
        return Progress(self.quiet)

    def run(self, arm: str, seed: int) -> Run:
        """The run folder of an arm and a seed."""
        return Run(self.out / "runs" / f"{self.settings.arms[arm].folder}-seed{seed}")

    def rate_run(self, arm: str, lr: float) -> Run:
        """The run folder of a learning rate that is tried."""
        return Run(self.out / "rates" / f"{self.settings.arms[arm].folder}-lr{lr:g}")

    def base_images(self, name: str, seed: int) -> Path:
        """The folder of the untouched base's images for the seed."""
        settings = self.settings
        first = settings.bases[name] == settings.base  # adding a base keeps the first one's images
        return self.out / ("base" if first else f"base@{folder_name(name)}") / f"seed{seed}"


class Work(Protocol):
    """How the runs of one form of table are made; every row is named as in the table."""

    def train(self, run: Run, config: TrainConfig) -> None:
        """Trains the run to the end; goes on from its last resume state."""
        ...

    def result(self, run: Run) -> str:
        """The hash of what was trained."""
        ...

    def draw(self, run: Run, parent: Path, seed: int) -> None:
        """Draws the table's captions for `seed` with what was trained, into the form's `drawn` folder in `parent`."""
        ...

    def count(self) -> dict[str, dict[str, int]]:
        """Parameters of each arm and base, as `eval.profile.parameters` counts them.

        Raises `UsageError` naming an arm that does not fit its base.
        """
        ...

    def costs(self, seed: int, configs: Mapping[str, TrainConfig]) -> dict[str, Any]:
        """{"rows": {name: {figure: value}}, "protocol"} of arms and bases."""
        ...

    def time(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Seconds of a step and of drawing an image, by arm; nothing is written to the table's folder."""
        ...


def open_workshop(settings: Settings, out: str | Path, *, offline: bool = False, quiet: bool = False) -> Workshop:
    """Opens the data. Raises `UsageError` for data that is missing or has no held-out images, or for bases that differ.

    All bases are trained and drawn at one size and with the same captions.
    """
    config, drawn = settings.first, settings.sampling
    size = _common_size(settings, config, offline)
    family = family_of(settings.base, offline)
    prompt = family.prompt_rule(config.trigger, config.caption)
    source, held_out, maps = open_training_sets(config, size, prompt=prompt, quiet=quiet)
    if not evaluation_records(source, held_out, config):
        raise UsageError(
            f"--data {config.data} has no held-out images, whose captions are drawn. Mark some with the split "
            "'validation' or 'test', give a set with val_data=FOLDER, or use a set of at least ten images."
        )
    guidance = family.guidance if drawn.guidance is None else drawn.guidance
    sampling = drawn.model_copy(update={"size": size, "guidance": guidance})
    settings = replace(settings, sampling=sampling)
    return Workshop(settings, Path(out), source, held_out, size, best_device(), offline, quiet, maps)


def _common_size(settings: Settings, config: TrainConfig, offline: bool) -> int:
    """The image side of all runs. Raises `UsageError` for bases of different kinds or sizes."""
    bases = list(settings.bases.values())
    families = {family_of(base, offline).name: base for base in bases}
    if len(families) > 1:
        (one, first), (other, second), *_ = families.items()
        raise UsageError(f"--base {first} is of family {one} and {second} of {other}; a table has one kind of base.")
    if config.size:
        return config.size
    sizes = {resolution(base, offline): base for base in bases}
    if len(sizes) > 1:
        (one, first), (other, second), *_ = sizes.items()
        raise UsageError(f"--base {first} draws {one} px and {second} {other} px. Set one for all: size={one}.")
    return next(iter(sizes))


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
