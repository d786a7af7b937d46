"""Errors that a user can act on: each says what was wrong, where, and the remedy, in one or two lines."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SctoolError(Exception):
    """The work failed for a reason that the user can mend; the command ends with `exit_code`, without a traceback."""

    exit_code = 1


class UsageError(SctoolError):
    """A flag, key or file name given by the user was wrong."""

    exit_code = 2


class Interrupted(SctoolError):
    """SIGINT (130) or SIGTERM (143) ended the work after saving; the message says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def unknown(kind: str, name: str, known: Iterable[str], remedy: str = "") -> UsageError:
    """A `UsageError` for a misspelt name: says what is known, which known name is nearest, and a `remedy`."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    # Of equally near names the one that differs in its last letter alone: sd16 means sd15, not sd21.
    best = max(near, key=lambda k: (_likeness(name, k), k[:-1] == name[:-1]), default=None)
    hint = f" Did you mean '{best}'?" if best else ""
    return UsageError(f"unknown {kind} '{name}'.{hint} Known: {', '.join(known)}.{remedy}")


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
