"""Progress on stderr: a bar with loss, it/s, ETA and peak memory on a terminal, otherwise plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

EVERY_SECONDS = 15.0  # between plain lines when stderr is not a terminal


class Progress:
    """Messages and progress bars; silent when `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar: Bar | None = None

    def note(self, message: str) -> None:
        """Prints one line."""
        (self._bar.console if self._bar else self.console).print(message, style="dim", markup=False, soft_wrap=True)

    @contextmanager
    def training(self, total: int, start: int) -> Iterator[Callable[[int, float | None, float], None]]:
        """A bar over `total` steps from `start`; yields update(step, loss, peak memory in GB)."""
        began, last = time.monotonic(), [0.0]

        def rate(step: int) -> float:
            return (step - start) / max(time.monotonic() - began, 1e-9)

        def describe(loss: float | None, step: int, memory: float) -> str:
            shown = "" if loss is None else f"loss {loss:.4f}  "
            return f"{shown}{rate(step):.2f} it/s  {memory:.1f} GB"

        if not self.console.is_terminal:

            def plain(step: int, loss: float | None, memory: float) -> None:
                if time.monotonic() - last[0] >= EVERY_SECONDS or step == total:
                    last[0] = time.monotonic()
                    left = (total - step) / max(rate(step), 1e-9)
                    self.note(f"step {step}/{total}  {describe(loss, step, memory)}  {left:.0f} s left")

            yield plain
            return
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        with Bar(*columns, console=self.console) as bar:
            self._bar = bar
            task = bar.add_task("training", total=total, completed=start, figures="")
            yield lambda step, loss, memory: bar.update(task, completed=step, figures=describe(loss, step, memory))
        self._bar = None

    @contextmanager
    def counting(self, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A bar over `total` units; yields advance(count). Nothing is shown when stderr is not a terminal."""
        if not self.console.is_terminal:
            yield lambda count: None
            return
        columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=self.console) as bar:
            task = bar.add_task(unit, total=total)
            yield lambda count: bar.advance(task, count)
