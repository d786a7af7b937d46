"""Writing a base: a plain diffusers folder with the parts of another one and a denoiser of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..files import replacing_folder
from .bases import find_base
from .loading import Backbone
from .students import NAME as STUDENT


def save_base(
    path: str | Path, backbone: Backbone, denoiser: nn.Module, card: str,
    also: Callable[[Path], None] = lambda folder: None,
) -> Path:  # fmt: skip
    """Writes the parts of `backbone` with `denoiser` in the place of its own. Atomic; returns the folder.

    card: the model card (README.md). also: writes what else belongs into the folder. Raises `SctoolError` when it
    cannot be written.
    """
    source, part, path = find_base(backbone.id, offline=True), backbone.family.denoiser_part, Path(path)
    with replacing_folder(path) as temporary:
        for entry in sorted(source.iterdir()):
            if entry.name in (part, STUDENT, "README.md") or entry.name.startswith("."):
                continue
            if entry.is_dir() or entry.name == "model_index.json" or entry.name.startswith("LICEN"):
                (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, temporary / entry.name)
        with backbone.family.stored(denoiser):
            denoiser.save_pretrained(temporary / part, safe_serialization=True)  # type: ignore[operator]
        (temporary / "README.md").write_text(card)
        also(temporary)
    return path
