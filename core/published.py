"""Adapters in diffusers' own format: folders that are read as tuners, and that ours are also written as.

Imports no torch. Which base a published adapter is for it does not say: its shapes must fit. Ours say it, and which
condition they are for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data.conditions import MAP_FOLDERS
from .errors import UsageError

WEIGHTS = "diffusion_pytorch_model"
OURS = "sctool.json"
"""Beside the weights that were trained here: condition, how its maps were made, and the base."""
ONLY = {
    "controlnet_conditioning_channel_order": "rgb",
    "conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
}
"""Settings that shapes do not betray, and the only values that are supported."""
SYNONYMS = {"openpose": "pose", "inpaint": "mask", "softedge": "hed", "scribble": "sketch", "segmentation": "seg"}
"""Names in published folders, and what the condition is called here."""


@dataclass(frozen=True)
class Kind:
    """A diffusers model class: the method that it is here, and the prefix of its weights' names there."""

    method: str
    prefix: str


KINDS = {
    "ControlNetModel": Kind("controlnet", "nets"),
    "T2IAdapter": Kind("t2i-adapter", "adapters"),
    "ControlNetXSAdapter": Kind("controlnet-xs", "adapters"),
}


def published_file(folder: Path) -> Path | None:
    """The weights in a diffusers adapter's folder; None for any other folder.

    Raises `UsageError` for one without safetensors, or whose weights are in several files.
    """
    if folder.is_dir() and _config(folder).get("_class_name") in KINDS:
        files = sorted(folder.glob(f"{WEIGHTS}*.safetensors"), key=lambda file: (".fp16." in file.name, file.name))
        if not files:
            raise UsageError(f"tuner '{folder}' has no {WEIGHTS}.safetensors. Re-save it with safetensors.")
        if re.search(r"-\d+-of-\d+", files[0].name):
            raise UsageError(f"tuner '{folder}' has its weights in several files; save it again as one.")
        return files[0]
    return None


def published_meta(file: Path, condition: str | None = None) -> dict[str, Any] | None:
    """The description of a diffusers adapter's weights as that of a tuner file; None for any other file.

    condition: what its maps are, whatever the folder says. `prefix` is what its weights' names begin with here.
    Raises `UsageError` where the condition cannot be told, and for an adapter that reads its map in another way than
    those trained here.
    """
    config = _config(file.parent) if file.name.startswith(WEIGHTS) else {}
    kind = KINDS.get(str(config.get("_class_name")))
    if kind is None:
        return None
    check_supported(file.parent, config)
    ours = _json(file.parent / OURS)
    condition = condition or ours.get("condition") or condition_in(file.parent)
    return {
        "method": kind.method,
        "config": _settings(kind.method, config),
        "conditions": [condition],
        "maps": ours.get("maps", {}),
        **({"base": ours["base"]} if "base" in ours else {}),
        "vae_scale": _factor(config),
        "prefix": f"{kind.prefix}.{condition}.",
    }


def _settings(method: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The method's own settings that give a model of this diffusers config."""
    if method == "t2i-adapter":
        return {"blocks": config.get("num_res_blocks", 2), "channels": config.get("in_channels", 3)}
    if method == "controlnet-xs":
        heads = config.get("num_attention_heads", 4)
        widths = config.get("block_out_channels", (4, 8, 16, 16))
        theirs = config.get("base_block_out_channels", (320, 640, 1280, 1280))
        return {  # the ratio is rounded down at every level, so the largest is the one that gives all widths
            "ratio": max(own / other for own, other in zip(widths, theirs, strict=False)),
            "heads": [heads] * len(widths) if isinstance(heads, int) else heads,
            "time_embedding": config.get("learn_time_embedding", False),
            "time_mix": config.get("time_embedding_mix", 1.0),
        }
    return {}


def check_supported(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises `UsageError` for an adapter of a kind, or with a setting, that methods here do not have."""
    if config.get("adapter_type") == "light_adapter":
        raise UsageError(f"tuner '{folder}' is a light T2I-Adapter; only full ones are supported.")
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise UsageError(f"tuner '{folder}' has {key}={config[key]}; only {value} is supported.")


def condition_in(folder: Path) -> str:
    """The condition in a folder's name: canny of sd-controlnet-canny. Raises `UsageError` where it names none."""
    words = re.split(r"[^a-z0-9]+", folder.resolve().name.lower())
    known = {name: name for name in MAP_FOLDERS} | SYNONYMS
    for word in reversed(words):
        if word in known:
            return SYNONYMS.get(word, word)
    raise UsageError(
        f"tuner '{folder}': its name does not say what it is controlled by. Rename the folder so that it ends with the "
        "condition, e.g. my-controlnet-canny."
    )


def _factor(config: Mapping[str, Any]) -> int:
    """The autoencoder's factor that the adapter's map encoder is for."""
    if "downscale_factor" in config:
        return config["downscale_factor"] // (2 if "xl" in config.get("adapter_type", "") else 1)
    return 2 ** (len(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256))) - 1)


def _config(folder: Path) -> dict[str, Any]:
    return _json(folder / "config.json")


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
