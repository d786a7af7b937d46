"""How to evaluate, as flags and callers say it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.config import SampleConfig

SETS = ("fid", "kid", "is", "pr", "cmmd")
"""Metrics of a whole set of pictures."""
CONTROL = ("control", "nmse", "iou")
METRICS = (*SETS, "clip", *CONTROL, "profile")


@dataclass(frozen=True)
class Options:
    """How to evaluate. `metrics` (of `METRICS`) empty: all that apply; what cannot be had becomes a note."""

    metrics: tuple[str, ...] = ()
    features: str = "auto"
    weights: tuple[str, ...] = ()
    """Each a path, or NETWORK=PATH; see `features.named_weights`."""
    clip_model: str | None = None
    clip_weights: str | None = None
    evaluators: tuple[str, ...] = ()
    """What extracts conditions from pictures, written as for `annotate --cond`, e.g. "seg:model=oneformer"."""
    reference: str | None = None
    offline: bool = False
    save_stats: Path | None = None
    count: int | None = None
    sampling: SampleConfig | None = None
    seed: int | None = None
    quiet: bool = False

    def wants(self, metric: str) -> bool:
        """Whether the metric was asked for, by name or by naming none."""
        return not self.metrics or metric in self.metrics

    @property
    def needs_metadata(self) -> bool:
        """Whether anything is asked for that bare pictures, with or without real ones, do not tell."""
        if not self.metrics:
            return self.reference is None
        return not set(self.metrics) <= (set(SETS) if self.reference is not None else {"is"})
