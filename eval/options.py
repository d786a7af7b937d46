"""How to evaluate, as the command line and callers state it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UsageError, unknown
from .features.names import named_weights
from .metrics import CONTROL, METRICS, flag_list

DEFAULT_COUNT = 200
"""Held-out images to draw."""
DEFAULT_SEED = 0
"""Seed of the first held-out image."""


@dataclass(frozen=True)
class Options:
    """How to evaluate. Without `metrics` (names in `METRICS`) all that apply are computed.

    None means the default; for `count`, `steps`, `guidance` and `seed` also that existing samples will do. `fast` asks
    for samples drawn as by `sctool sample --fast`.
    """

    metrics: tuple[str, ...] = ()
    features: str = "auto"
    weights: tuple[str, ...] = ()
    """Each a path, or NETWORK=PATH; see `features.names.named_weights`."""
    clip_model: str | None = None
    clip_weights: str | None = None
    evaluators: tuple[str, ...] = ()
    """What extracts conditions from images, written as for `annotate --cond`, e.g. "seg:model=oneformer"."""
    reference: str | None = None
    offline: bool = False
    save_stats: Path | None = None
    count: int | None = None
    steps: int | None = None
    guidance: float | None = None
    fast: bool = False
    seed: int | None = None
    task: str | None = None
    """Which task of a run of several is evaluated."""
    quiet: bool = False

    def wants(self, metric: str) -> bool:
        """Whether the metric was requested, by name or because none was named."""
        return not self.metrics or metric in self.metrics

    @property
    def only_profile(self) -> bool:
        """Whether no metric of images is requested."""
        return self.metrics == ("profile",)

    @property
    def needs_metadata(self) -> bool:
        """Whether a requested metric needs more than images and, where given, reference images."""
        if not self.metrics:
            return self.reference is None
        rows = [METRICS[name] for name in self.metrics]
        return any(row.needs_metadata or (row.references and self.reference is None) for row in rows)


def check_options(options: Options) -> None:
    """Raises `UsageError` for an unknown metric, for an option that no requested metric uses, and for missing weights.

    Called before anything is drawn, loaded or measured.
    """
    for name in options.metrics:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    named_weights(options.weights, options.features)
    reference = options.reference
    if options.save_stats and not options.wants("fid"):
        raise UsageError("--save-stats saves the statistics that --fid uses; add --fid.")
    if options.save_stats and reference is not None and Path(reference).expanduser().is_file():
        raise UsageError(
            f"--save-stats has nothing to save: --reference {reference} is already a statistics file. Leave out "
            "--save-stats, or pass a folder of images to --reference."
        )
    for flag, value in (("--clip-model", options.clip_model), ("--clip-weights", options.clip_weights)):
        if value is not None and not options.wants("clip"):
            raise UsageError(f"{flag} does nothing here: only the CLIP score uses it. Add --clip, or leave it out.")
    if options.evaluators and not any(map(options.wants, CONTROL)):
        raise UsageError(
            "--evaluator does nothing here: only control metrics use it. "
            f"Add {flag_list(CONTROL, 'or')}, or leave it out."
        )
