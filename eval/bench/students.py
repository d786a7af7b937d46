"""What a table needs of `sctool distill`: the one place where the bench touches `core.distilling`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from ...core.config import TrainConfig
from ...core.data.records import Source
from ...core.errors import SctoolError
from ...core.runs import Run

MODULE = "...core.distilling"


class Distilling(Protocol):
    """The calls that the bench makes."""

    def distill_config(self, flags: Mapping[str, Any], pairs: Iterable[str]) -> TrainConfig:
        """A run's settings, as `sctool distill` resolves its flags (None: not given) and its KEY=VALUE pairs.

        Flags are TrainConfig's fields, with the teacher as `base`; pairs are those and the student's own, such as
        ratio=0.4225, prune=small, init=whitened or lambda_task=1. Raises `UsageError` for wrong keys and values.
        """
        ...

    def student_parameters(self, config: TrainConfig, *, offline: bool = False) -> int:
        """Numbers in the student's denoiser; nothing is decomposed. Raises `UsageError` where it does not fit."""
        ...

    def distill(
        self,
        config: TrainConfig,
        run: Run,
        source: Source,
        *,
        held_out: Source | None = None,
        offline: bool = False,
        quiet: bool = False,
    ) -> object:
        """Makes the student, trains it as `core.training.train` does (log, held-out loss, exact resume) and saves it.

        The student is a base: a folder that `load_backbone` takes, at `student_folder(run)`.
        """
        ...


def distilling() -> Distilling:
    """The package itself. Raises `SctoolError` where this installation cannot distil."""
    try:
        package = import_module(MODULE, __package__)
    except ModuleNotFoundError as error:
        raise SctoolError("bench distill needs sctool distill, which this installation does not have.") from error
    return cast(Distilling, package)


def student_folder(run: Run) -> Path:
    """The student that a run of `sctool distill` made."""
    return run.path / "student"
