"""Progress of the verbs that go over whole sets of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def images_bar(quiet: bool, stem: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr with images/s and time left; a plain line every 15 s if stderr is not a terminal.

    stem: of the verb that the bar shows, e.g. `annotat`.
    """
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, quiet=quiet, highlight=False)
    began, first, last, shown = time.monotonic(), -1, time.monotonic(), -1

    def rate(done: int) -> float:
        nonlocal first
        first = done if first < 0 else first
        return (done - first) / max(time.monotonic() - began, 1e-9)

    def plain(done: int, total: int) -> None:
        nonlocal last, shown
        speed = rate(done)
        if shown != done and (time.monotonic() - last >= 15 or done == total):
            last, shown = time.monotonic(), done
            left = f"{(total - done) / speed:.0f} s left" if speed else ""
            console.print(f"{stem}ed {done}/{total}  {speed:.0f} images/s  {left}", style="dim")

    if not console.is_terminal:
        yield plain
        return
    columns = (TextColumn(f"{stem}ing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(f"{stem}ing", total=None, speed="")
        yield lambda done, total: bar.update(task, completed=done, total=total, speed=f"{rate(done):.0f} images/s")
