"""A tuner file of another tool, read as tensors only, and what a format makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import SctoolError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ..backbones.loading import Backbone
    from ..tuners.base import Tuner

WEIGHTS = (
    "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin",
    "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "pytorch_model.safetensors",
)  # fmt: skip
"""Names of the weights in the folders of other tools, in the order in which they are looked for."""
ENDINGS = ("safetensors", "bin", "pth", "pt", "ckpt")
CONFIGS = ("adapter_config.json", "configuration.json", "config.json")
"""Names of the JSON files beside them."""


@dataclass(frozen=True)
class Foreign:
    """A file of another tool: its tensors by their keys, and the JSON beside or inside it ({} where there is none)."""

    path: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """What a format makes of a file: a method with its settings, and its state under our names.

    `used` tells which of the file's keys each of our tensors comes from: {their key: our name}. Keys that carry a
    number that is kept in the settings, as LoRA's alpha, are used too; their value is the setting's name.
    """

    method: str
    config: Mapping[str, Any]
    conditions: tuple[str, ...]
    state: Mapping[str, Tensor]
    used: Mapping[str, str]


class Format:
    """A format of another tool."""

    name: ClassVar[str]
    """As it is called in `sctool export --to`."""
    what: ClassVar[str]
    """In a few words, for messages."""
    methods: ClassVar[tuple[str, ...]] = ()
    """What can be written in it."""

    def fits(self, foreign: Foreign) -> bool:
        """Whether the file's keys are of this format; never, of a format that is only written."""
        return False

    def read(self, foreign: Foreign, backbone: Backbone, condition: str | None) -> Reading:
        """The file as a tuner of `backbone`. `condition`: what maps it is controlled by, where the file is silent.

        Raises `UsageError` for a file that does not fit the backbone, or says too little.
        """
        raise NotImplementedError  # of a format that is only written, and fits no file

    def write(self, out: Path, tuner: Tuner, backbone: Backbone, meta: Mapping[str, Any]) -> list[Path]:
        """Writes a tuner of one of `methods` into the folder `out`, which is there and empty; returns the files.

        meta: as `core.checkpoint.describe`, and `name`, for files that are called by one. Raises `DoesNotFit` for
        settings that the format cannot hold.
        """
        raise NotImplementedError  # of a format that is only read, and has no methods


def read_foreign(path: str | Path) -> Foreign:
    """The weights at `path`, a file or a tool's folder, on the CPU. Pickled files are read as tensors only.

    Raises `UsageError` where there are none, and `SctoolError` for a file that cannot be read, or holds more than
    tensors.
    """
    path = Path(path).expanduser()
    file = weights_in(path)
    config = next((found for name in CONFIGS if (found := _json(file.parent / name))), {})
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
                return Foreign(file, tensors, {**(opened.metadata() or {}), **config})
        except (SafetensorError, OSError) as error:
            raise SctoolError(f"{file} is not a safetensors file, or is damaged: {error}.") from error
    return Foreign(file, _unpickled(file), config)


def weights_in(path: Path) -> Path:
    """The file with the weights: `path` itself, or the one in that folder or in its only subfolder.

    Raises `UsageError` where there is none.
    """
    if path.is_file():
        if path.suffix.removeprefix(".") not in ENDINGS:
            raise UsageError(f"{path} is no file of weights: those end in .{', .'.join(ENDINGS)}.")
        return path
    if not path.is_dir():
        raise UsageError(f"there is no {path}.")
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    files = sorted(file for ending in ENDINGS for file in path.glob(f"*.{ending}"))
    if len(files) == 1:
        return files[0]
    folders = [folder for folder in path.iterdir() if folder.is_dir()]
    if not files and len(folders) == 1:  # scepter and swift name one after the adapter
        return weights_in(folders[0])
    found = f"several files of weights, {', '.join(file.name for file in files)}" if files else "no file of weights"
    raise UsageError(f"{path} has {found}; name the file.")


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file; nothing in it is run."""
    import pickle

    import torch

    try:
        value = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SctoolError(
            f"{file} holds more than tensors, which could be code; it is not loaded. Save its tensors alone, best as "
            "safetensors."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise SctoolError(f"{file} cannot be read: it is damaged, or no file of weights.") from error
    for key in ("state_dict", "model", "module"):  # common wrappings
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not all(isinstance(one, torch.Tensor) for one in value.values()):
        raise SctoolError(f"{file} holds no named tensors.")
    return dict(value)


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
