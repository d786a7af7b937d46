"""From a tuner of ours to another tool's file."""

from __future__ import annotations

from pathlib import Path

from ..backbones.loading import Backbone
from ..checkpoint import load_tuner, read_meta
from ..errors import SctoolError, UsageError
from ..files import replacing_folder
from ..merging.measuring import fixed_batch, outputs
from ..tuners.base import Tuner
from .table import format_for


def export(file: Path, backbone: Backbone, to: str, out: Path, *, force: bool = False) -> list[Path]:
    """Writes the tuner in `file` in the format called `to` into the new folder `out`; returns its files. Atomic.

    Raises `DoesNotFit` where the format cannot hold it, and `SctoolError` for a tuner that changes nothing.
    """
    meta = read_meta(file)
    form = format_for(to, meta["method"])
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UsageError(f"--out {out} exists already; choose another folder, or remove it.")
    tuner = load_tuner(file, backbone, force=force)
    if not changes(tuner, backbone):
        raise SctoolError(f"{file} changes no output of its base: it is untrained, or its weights are zero.")
    with replacing_folder(out) as folder:
        files = form.write(folder, tuner, backbone, {**meta, "name": out.name})
        names = [one.relative_to(folder) for one in files]
    return [out / name for name in names]


def changes(tuner: Tuner, backbone: Backbone) -> bool:
    """Whether the tuner changes the denoiser's output on a fixed batch, with its maps where it has conditions."""
    batch = fixed_batch(backbone, tuner.conditions, tuner.classes)
    tuned, alone = list(outputs(backbone, batch, [tuner], [1.0])), list(outputs(backbone, batch, [], []))
    return any(not ours.equal(theirs) for ours, theirs in zip(tuned, alone, strict=True))
