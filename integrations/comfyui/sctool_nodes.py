"""The nodes: sctool's tuner files on ComfyUI's models. They need ComfyUI alone, not sctool.

All tuners on a model see the same unedited values, and what they add is summed, as in sctool.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
from typing import Any

import comfy.patcher_extension
import folder_paths
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .diffscaler import DiffScaler, edit_layers
from .scedit import SCEdit, edit_skip
from .tuner import KEY, Hints, Tuner

DIFFUSION_MODEL = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
METHODS: dict[str, type[Tuner]] = {"scedit": SCEdit, "diffscaler": DiffScaler}
EXPORTED = "ComfyUI's own node Load LoRA reads it after `sctool export --to comfyui`"
PUBLISHED = "ComfyUI's own node Load ControlNet Model reads it after `sctool export --to diffusers`"
INSTEAD = {"lora": EXPORTED, "dora": EXPORTED, "controlnet": PUBLISHED, "t2i-adapter": PUBLISHED}

folder_paths.add_model_folder_path(KEY, os.path.join(folder_paths.models_dir, KEY))


def load(path: str, strength: float) -> Tuner:
    """The tuner in a file. Raises `ValueError` for a file that is not sctool's, or of a method without a node."""
    name = os.path.basename(path)
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("sctool", "null"))
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{name} is not a safetensors file, or is damaged: {error}.") from error
    if meta is None:
        raise ValueError(f"{name} was not written by sctool: its metadata do not name a method.")
    method = meta["method"]
    if method not in METHODS:
        remedy = INSTEAD.get(method, "Where it can be folded, `sctool merge --into-base` writes a base with it inside")
        raise ValueError(f"{name} is of method {method}; this node takes {', '.join(METHODS)}. {remedy}.")
    return METHODS[method](name, meta, weights, strength)


class LoadSctoolTuner:
    """Model and tuner file in, tuned model out; several in a row add up."""

    CATEGORY, FUNCTION, RETURN_TYPES = "loaders", "load", ("MODEL",)
    DESCRIPTION = "Applies an SC-Tuner, CSC-Tuner or DiffScaler that sctool trained. Strength 0: the model as it is."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The sockets and widgets."""
        files = [name for name in folder_paths.get_filename_list(KEY) if name.endswith(".safetensors")]
        strength = ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01})
        required = {"model": ("MODEL",), "tuner": (files,), "strength": strength}
        return {"required": required, "optional": {"hints": ("SCTOOL_HINTS",)}}

    def load(self, model: Any, tuner: str, strength: float, hints: Hints | None = None) -> tuple[Any]:
        """A clone of the model with the tuner beside those that it has."""
        if strength == 0:
            return (model,)
        loaded = load(folder_paths.get_full_path_or_raise(KEY, tuner), strength)
        unet, config = model.model.diffusion_model, model.model.model_config.unet_config
        if "num_res_blocks" not in config:
            raise ValueError(f"{tuner} is for U-Nets as in SD 1.x, 2.x, SDXL; this model is a {type(unet).__name__}.")
        loaded.fit(unet, config, hints or {})
        model = model.clone()
        model.set_model_patch(loaded, KEY)
        if isinstance(loaded, DiffScaler):
            if not model.get_wrappers(DIFFUSION_MODEL, KEY):
                model.add_wrapper_with_key(DIFFUSION_MODEL, KEY, edit_layers)
        elif edit_skip not in model.model_options["transformer_options"]["patches"].get("output_block_patch", []):
            model.set_model_output_block_patch(edit_skip)
        return (model,)


class SctoolHint:
    """An image as the hint of a condition, added to those before it."""

    CATEGORY, FUNCTION, RETURN_TYPES = "conditioning", "hint", ("SCTOOL_HINTS",)
    DESCRIPTION = "A condition map for a CSC-Tuner. Leave the condition empty where the tuner has only one."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The sockets and widgets."""
        weight = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01})
        required = {"image": ("IMAGE",), "condition": ("STRING", {"default": ""}), "weight": weight}
        return {"required": required, "optional": {"hints": ("SCTOOL_HINTS",)}}

    def hint(self, image: Tensor, condition: str, weight: float, hints: Hints | None = None) -> tuple[Hints]:
        """The hints by condition. Raises `ValueError` for a second image of one condition."""
        name = condition.strip()
        if name in (hints or {}):
            raise ValueError(f"condition '{name}' has two images; give each its own condition.")
        return ({**(hints or {}), name: (image, weight)},)


NODE_CLASS_MAPPINGS = {"LoadSctoolTuner": LoadSctoolTuner, "SctoolHint": SctoolHint}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadSctoolTuner": "Load sctool tuner", "SctoolHint": "sctool hint"}
