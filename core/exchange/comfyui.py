"""Files for ComfyUI: its own LoRA loader takes kohya's; SC-, CSC-Tuners and DiffScaler need `integrations/comfyui`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backbones.loading import Backbone
from ..checkpoint import save_tuner
from ..errors import DoesNotFit
from ..tuners.base import Tuner
from .foreign import Format
from .kohya import Kohya

LORAS = ("lora", "dora")


class ComfyUI(Format):
    """One .safetensors file. Read, it is kohya's or our own."""

    name = "comfyui"
    what = "files for ComfyUI"
    methods = (*LORAS, "scedit", "diffscaler")

    def write(self, out: Path, tuner: Tuner, backbone: Backbone, meta: Mapping[str, Any]) -> list[Path]:
        """out/NAME.safetensors. Raises `DoesNotFit` for what neither ComfyUI's loader nor the node takes."""
        if not hasattr(backbone.denoiser, "up_blocks"):
            raise DoesNotFit(f"in ComfyUI tuners are for U-Nets, and {backbone.id} is none; use sctool sample.")
        if tuner.method == "diffscaler" and (tuner.conditions or tuner.classes):
            raise DoesNotFit("the ComfyUI node takes no DiffScaler with conditions or new classes; use sctool sample.")
        if tuner.method in LORAS:
            return Kohya().write(out, tuner, backbone, meta)
        file = out / f"{meta['name']}.safetensors"
        save_tuner(file, tuner, backbone, maps=meta.get("maps"), task=meta.get("task"))
        return [file]
