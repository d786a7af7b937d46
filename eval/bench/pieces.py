"""Pieces of work whose results are JSON files: done where the file answers the same question. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.files import write_json


@dataclass(frozen=True)
class Piece:
    """One piece of work: its file, and everything that decides its result."""

    path: Path
    identity: dict[str, Any]

    def result(self) -> dict[str, Any] | None:
        """What the finished piece gave; None where it has not been done, or with another identity."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            same = content["identity"] == json.loads(json.dumps(self.identity))
            return content["result"] if same else None
        except (OSError, ValueError, KeyError, TypeError):  # not there, or of another version
            return None

    def do(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result, by `work()` where it is not there yet. The file is written when the work is complete."""
        done = self.result()
        if done is not None:
            return done
        self.path.unlink(missing_ok=True)  # what it described is about to change
        write_json(self.path, {"identity": self.identity, "result": work()})
        result = self.result()
        assert result is not None
        return result
