"""Writing a base: a plain diffusers folder with the parts of another one and a denoiser of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..files import replacing_folder
from .bases import find_base, weight_files
from .loading import Backbone
from .students import NAME as STUDENT

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx"}
"""Endings of files of weights, of which a part may have several with the same content."""


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
            if entry.is_dir():
                _copy_part(entry, temporary / entry.name)
            elif entry.name == "model_index.json" or entry.name.startswith("LICEN"):
                shutil.copy2(entry, temporary / entry.name)
        with backbone.family.stored(denoiser):
            denoiser.save_pretrained(temporary / part, safe_serialization=True)  # type: ignore[operator]
        (temporary / "README.md").write_text(card)
        also(temporary)
    return path


def _copy_part(source: Path, target: Path) -> None:
    """Copies a part of a base. Of its weights only those that are loaded: safetensors, in full precision if there are.

    Weights that are there in half precision alone lose their variant's name: the new denoiser has none, and a folder is
    read as one variant.
    """
    used = set(weight_files(source.parent, source.name))
    spared = {file for file in source.iterdir() if file.suffix in WEIGHTS and file not in used} if used else set()
    shutil.copytree(source, target, ignore=lambda folder, names: {n for n in names if Path(folder) / n in spared})
    for file in target.glob("*.fp16.safetensors"):
        file.rename(target / file.name.replace(".fp16.", "."))
