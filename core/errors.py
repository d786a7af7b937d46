"""Errors for users: each says what was wrong, where, and the remedy, in one or two lines."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SctoolError(Exception):
    """A failure that the user can fix; the command exits with `exit_code`, without a traceback."""

    exit_code = 1


class UsageError(SctoolError):
    """A flag, key or file name given by the user was wrong."""

    exit_code = 2


class DoesNotFit(UsageError):
    """Settings that a denoiser does not allow, such as a skip that it does not have."""


class Diverged(SctoolError):
    """The loss of a training is no longer a finite number."""


class Interrupted(SctoolError):
    """SIGINT (exit code 130) or SIGTERM (143) ended the work after saving; the message says how to continue."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def unknown(kind: str, name: str, known: Iterable[str], remedy: str = "") -> UsageError:
    """A `UsageError` for an unknown name: lists the known names, suggests the nearest, and adds `remedy`."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    # Of equally near names, prefer one that differs only in its last letter: for sd16 suggest sd15, not sd21.
    best = max(near, key=lambda k: (_likeness(name, k), k[:-1] == name[:-1]), default=None)
    hint = f" Did you mean '{best}'?" if best else ""
    return UsageError(f"unknown {kind} '{name}'.{hint} Known: {', '.join(known)}.{remedy}")


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
