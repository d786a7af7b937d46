"""A machine that goes down in the middle of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sctool.core.training.trainer import Trainer


class Crash(Exception):
    """The machine went down."""


@contextmanager
def crash_before_step(number: int) -> Iterator[None]:
    """What trains inside goes down before the step of that number, counted from 0."""
    step = Trainer.step

    def crashing(self: Trainer, current: int) -> Any:
        if current == number:
            raise Crash
        return step(self, current)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", crashing)
        try:
            yield
        except Crash:
            return
    pytest.fail(f"it never came to step {number}")
