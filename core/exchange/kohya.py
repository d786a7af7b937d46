"""LoRA in the form of kohya's sd-scripts, which the web UI and ComfyUI read: `lora_unet_NAME.lora_down.weight`.

NAME is a layer's, its dots written as underscores: diffusers' for SD 1.5 and 2.1, the original code's for SDXL. DoRA's
magnitude is `dora_scale`, as LyCORIS writes it with `wd_on_output`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.loading import Backbone
from ..errors import DoesNotFit, UsageError
from ..files import replacing, save_tensors
from ..tuners.base import Tuner
from ..tuners.peft_layers import LoRA
from .foreign import Foreign, Format, Reading
from .ldm import ldm_name
from .lora import Factors, Layers, factors_of, reading

PREFIX = "lora_unet_"
PARTS = {
    "lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha", "dora_scale": "magnitude",
}  # fmt: skip
OTHERS = {
    "lora_mid": "LoCon with a third factor", "hada_": "LoHa", "lokr_": "LoKr of LyCORIS", "oft_": "OFT",
    "diff": "full differences",
}  # fmt: skip
"""Other methods in such files, by what their keys have in them."""


class Kohya(Format):
    """One .safetensors file."""

    name = "kohya"
    what = "LoRA of kohya's sd-scripts"
    methods = ("lora", "dora")

    def fits(self, foreign: Foreign) -> bool:
        """Keys that begin with lora_unet_."""
        return any(key.startswith(PREFIX) for key in foreign.tensors)

    def read(self, foreign: Foreign, backbone: Backbone, condition: str | None) -> Reading:
        """Layers under either of their names. Raises `UsageError` for other methods in such a file."""
        names = names_of(backbone.denoiser)
        layers, used = Layers(), dict[str, str]()
        for key, value in foreign.tensors.items():
            stem, _, part = key.removeprefix(PREFIX).partition(".")
            if other := next((what for mark, what in OTHERS.items() if part.startswith(mark)), None):
                raise UsageError(f"{foreign.path} is {other}, which is not supported; LoRA and DoRA are.")
            if not key.startswith(PREFIX) or part not in PARTS:
                continue
            if stem not in names:
                raise UsageError(
                    f"{foreign.path} adapts {stem}, which is no layer of --base {backbone.id}; give the base that it "
                    "is for."
                )
            own = layers.setdefault(names[stem], Factors())
            setattr(own, PARTS[part], _value(key, part, value, own, foreign))
            used[key] = f"{names[stem]}: {PARTS[part]}"
        return reading(layers, used, backbone.denoiser, str(foreign.path))

    def write(self, out: Path, tuner: Tuner, backbone: Backbone, meta: Mapping[str, Any]) -> list[Path]:
        """out/NAME.safetensors, with alpha for every layer."""
        assert isinstance(tuner, LoRA)
        tensors: dict[str, Tensor] = {}
        layers = factors_of(tuner)
        for name, own in layers.items():
            stem = PREFIX + _written(name, backbone)
            assert own.a is not None
            assert own.b is not None
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = own.a, own.b
            tensors[f"{stem}.alpha"] = torch.tensor(float(own.alpha if own.alpha is not None else own.rank))
            if own.magnitude is not None:
                tensors[f"{stem}.dora_scale"] = own.magnitude.view(-1, *[1] * (own.a.dim() - 1))
        ranks = {own.rank for own in layers.values()}
        about = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(max(ranks)),
            "ss_sd_model_name": backbone.id,
            "sctool": json.dumps(dict(meta), sort_keys=True),
        }
        file = out / f"{meta['name']}.safetensors"
        with replacing(file) as temporary:
            save_tensors(tensors, temporary, about)
        return [file]


def _value(key: str, part: str, value: Tensor, own: Factors, foreign: Foreign) -> Tensor | float:
    """A tensor of the file as it is kept. Raises `UsageError` for a magnitude over inputs."""
    if part == "alpha":
        return float(value)
    if part == "dora_scale":
        if value.dim() > 1 and value.shape[0] == 1 and value.numel() > 1:
            raise UsageError(f"{foreign.path}: {key} is DoRA with a norm over inputs; only one over outputs is known.")
        return value.flatten()
    return value


def names_of(denoiser: nn.Module) -> dict[str, str]:
    """The layers' names in diffusers, by both names that such files give them."""
    found: dict[str, str] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            found[_flat(name)] = name
            if theirs := ldm_name(name, denoiser):
                found[_flat(theirs)] = name
    return found


def _flat(name: str) -> str:
    return re.sub(r"\.", "_", name)


def _written(name: str, backbone: Backbone) -> str:
    """A layer's name in a new file. Raises `DoesNotFit` for a base that has no such files."""
    if not hasattr(backbone.denoiser, "up_blocks"):
        raise DoesNotFit(f"kohya's files are for Stable Diffusion's U-Nets, and {backbone.id} is none; --to peft fits.")
    if backbone.family.name != "sdxl":
        return _flat(name)
    theirs = ldm_name(name, backbone.denoiser)
    if theirs is None:
        raise DoesNotFit(f"{name} has no name in kohya's files; --to peft fits.")
    return _flat(theirs)
