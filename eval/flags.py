"""Flags that would do nothing are refused before anything is drawn, loaded or measured."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import UsageError
from .features.choosing import named_weights
from .options import CONTROL, Options


def check_flags(options: Options) -> None:
    """Raises `UsageError` for a flag that nothing asked for reads, and for `--weights` that are not there."""
    named_weights(options.weights, options.features)
    given = options.reference
    if options.save_stats and not options.wants("fid"):
        raise UsageError("--save-stats keeps the statistics of --fid; add --fid.")
    if options.save_stats and given is not None and Path(given).expanduser().is_file():
        raise UsageError(
            f"--save-stats has nothing to save: --reference {given} already is such a file. Leave out --save-stats, or "
            "give --reference a folder of pictures."
        )
    for flag, value in (("--clip-model", options.clip_model), ("--clip-weights", options.clip_weights)):
        if value is not None and not options.wants("clip"):
            raise UsageError(f"{flag} does nothing here: it is for the CLIP score. Add --clip, or leave it out.")
    if options.evaluators and not any(options.wants(metric) for metric in CONTROL):
        raise UsageError(
            "--evaluator does nothing here: it is for control metrics. Add --control, --nmse or --iou, or leave it out."
        )
