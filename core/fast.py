"""What `--fast` stands for: a scheduler of higher order, few steps, and an encoder that runs at some of them only.

`benchmarks/fast.py` measures what it costs in quality, and docs/log.md has the curve by which the steps were chosen.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEDULER, STEPS = "dpm++", 20
KEYS = (0, 1, 2, 4, 6, 8, 11, 14, 18)
"""Of 20 steps, those at which the encoder runs."""
FAST_HELP = f"Draw faster: {SCHEDULER}, {STEPS} steps, the encoder at {len(KEYS)} of them; see docs/sampling.md."


def key_steps(steps: int) -> tuple[int, ...]:
    """The steps at which the encoder runs, from 0: those of `KEYS`, stretched over `steps`."""
    return tuple(sorted({min(steps - 1, round(key * steps / STEPS)) for key in KEYS}))


def with_fast(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags of `SampleConfig` (None: not given) with all that `--fast` decides where they do not."""
    filled = dict(flags)
    for name, value in (("scheduler", SCHEDULER), ("steps", STEPS)):
        if filled.get(name) is None:
            filled[name] = value
    if filled.get("key_steps") is None:
        filled["key_steps"] = key_steps(int(filled["steps"]))
    return filled
