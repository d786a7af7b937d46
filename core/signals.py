"""SIGINT and SIGTERM set a flag that is read between steps, so that work is saved before stopping."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Stop:
    """Context manager; `stop.signal` is the number of the signal received, or 0. A second signal stops at once."""

    def __enter__(self) -> Stop:
        self.signal = 0
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
