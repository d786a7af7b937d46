"""LoRA and DoRA as peft's folder, and as the file that diffusers' pipelines load: both have peft's own key names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..backbones.loading import Backbone
from ..errors import UsageError
from ..files import replacing, save_tensors
from ..tuners.base import Tuner
from ..tuners.peft_layers import LoRA
from .foreign import Foreign, Format, Reading
from .lora import Factors, Layers, factors_of, reading

PARTS = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "lora.down.weight": "a", "lora.up.weight": "b", "alpha": "alpha",
}  # fmt: skip
"""What a key ends with; the fifth and sixth in older files of diffusers."""
METADATA = "lora_adapter_metadata"
"""diffusers' key in a file's metadata: peft's settings, as JSON."""
PREFIXES = ("base_model.model.", "unet.", "transformer.")
UNSUPPORTED = {
    "use_rslora": False,
    "bias": "none",
    "modules_to_save": None,
    "lora_bias": False,
    "fan_in_fan_out": False,
}
"""peft's settings that change what weights mean, and the only values that are read."""


class Peft(Format):
    """adapter_config.json and adapter_model.safetensors."""

    name = "peft"
    what = "LoRA of peft"
    methods = ("lora", "dora")

    def fits(self, foreign: Foreign) -> bool:
        """A peft_type of LoRA beside it, or peft's keys."""
        if "peft_type" in foreign.config:
            return foreign.config["peft_type"] == "LORA"
        return any(key.startswith("base_model.model.") and ".lora_A." in key for key in foreign.tensors)

    def read(self, foreign: Foreign, backbone: Backbone, condition: str | None) -> Reading:
        """Raises `UsageError` for settings of peft that have no counterpart."""
        return read_peft(foreign, foreign.config, backbone)

    def write(self, out: Path, tuner: Tuner, backbone: Backbone, meta: Mapping[str, Any]) -> list[Path]:
        """Both files; peft loads the folder onto the base's denoiser."""
        assert isinstance(tuner, LoRA)
        tensors = {f"base_model.model.{key}": value for key, value in peft_state(tuner).items()}
        config, file = peft_config(tuner, backbone), out / "adapter_model.safetensors"
        with replacing(file) as temporary:
            save_tensors(tensors, temporary, {"format": "pt", "sctool": json.dumps(dict(meta), sort_keys=True)})
        config.save_pretrained(str(out))
        return [file, out / "adapter_config.json"]


class Diffusers(Format):
    """pytorch_lora_weights.safetensors, or for adapters that are models of diffusers their folder."""

    name = "diffusers"
    what = "LoRA of diffusers"
    methods = ("lora", "dora", "controlnet", "t2i-adapter", "controlnet-xs")

    def fits(self, foreign: Foreign) -> bool:
        """Keys of a pipeline's denoiser with LoRA's factors, new or old."""
        return any(re.match(r"(unet|transformer)\..*lora", key) for key in foreign.tensors) or any(
            ".processor." in key and "_lora." in key for key in foreign.tensors
        )

    def read(self, foreign: Foreign, backbone: Backbone, condition: str | None) -> Reading:
        """With the settings in the file's metadata, where a newer diffusers wrote it."""
        settings = json.loads(foreign.config.get(METADATA, "{}"))
        part = backbone.family.denoiser_part
        own = {key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(f"{part}.")}
        return read_peft(foreign, own, backbone)

    def write(self, out: Path, tuner: Tuner, backbone: Backbone, meta: Mapping[str, Any]) -> list[Path]:
        """The file that `load_lora_weights` takes; of a ControlNet or adapter, what `from_pretrained` takes."""
        if not isinstance(tuner, LoRA):
            return write_models(out, tuner, backbone, meta)
        part, file = backbone.family.denoiser_part, out / "pytorch_lora_weights.safetensors"
        config = peft_config(tuner, backbone).to_dict()
        about = {f"{part}.{key}": sorted(v) if isinstance(v, set) else v for key, v in config.items() if _plain(v)}
        tensors = {f"{part}.{key}": value for key, value in peft_state(tuner).items()}
        metadata = {"format": "pt", METADATA: json.dumps(about, sort_keys=True), "sctool": json.dumps(dict(meta))}
        with replacing(file) as temporary:
            save_tensors(tensors, temporary, metadata)
        return [file]


def write_models(out: Path, tuner: Tuner, backbone: Backbone, meta: Mapping[str, Any]) -> list[Path]:
    """Each condition's model in diffusers' format; in a folder of its own, where there are several."""
    from ..checkpoint import save_in_diffusers

    models, files = tuner.in_diffusers(), []
    for condition, model in models.items():
        folder = out / condition  # of one that is alone too: the name says what it is controlled by
        save_in_diffusers(folder, model, condition, backbone, meta.get("maps"))
        files += sorted(folder.iterdir())
    return files


def read_peft(foreign: Foreign, settings: Mapping[str, Any], backbone: Backbone) -> Reading:
    """The factors in a file with peft's keys. Raises `UsageError` for settings that have no counterpart here."""
    for key, value in UNSUPPORTED.items():
        if settings.get(key, value) not in (value, None, [], {}):
            raise UsageError(f"{foreign.path}: {key}={settings[key]} is not supported; only {value} is.")
    layers, used = Layers(), dict[str, str]()
    for key, value in foreign.tensors.items():
        if place := placed(key):
            name, part = place
            own = layers.setdefault(name, Factors())
            setattr(own, part, float(value) if part == "alpha" else value)
            used[key] = f"{name}: {part}"
    for name, own in layers.items():
        if own.alpha is None and own.a is not None and "lora_alpha" in settings:
            pattern = settings.get("alpha_pattern") or {}
            own.alpha = float(pattern.get(get_pattern_key(list(pattern), name), settings["lora_alpha"]))
    return reading(layers, used, backbone.denoiser, str(foreign.path))


def placed(key: str) -> tuple[str, str] | None:
    """The layer and the part of `Factors` that a key is; None for another."""
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    key = re.sub(r"\.processor\.to_(q|k|v|out)_lora\.", _older, key)
    for ending, part in PARTS.items():
        if key.endswith(f".{ending}"):
            return key[: -len(ending) - 1], part
    return None


def _older(match: re.Match[str]) -> str:
    """diffusers' first files: attn1.processor.to_q_lora.down is attn1.to_q.lora.down today."""
    return f".to_{match[1]}{'.0' if match[1] == 'out' else ''}.lora."


def peft_state(tuner: LoRA) -> dict[str, Tensor]:
    """The tuner's tensors by peft's keys, without a prefix."""
    found: dict[str, Tensor] = {}
    for name, own in factors_of(tuner).items():
        assert own.a is not None
        assert own.b is not None
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = own.a, own.b
        if own.magnitude is not None:
            wide = own.magnitude.view(1, -1, 1, 1) if own.a.dim() == 4 else own.magnitude
            found[f"{name}.lora_magnitude_vector"] = wide
    return found


def peft_config(tuner: LoRA, backbone: Backbone) -> LoraConfig:
    """peft's settings of the tuner: full names of layers, and patterns for ranks and alphas that differ."""
    layers = factors_of(tuner)
    ranks = {name: own.rank for name, own in layers.items()}
    alphas = {name: own.alpha if own.alpha is not None else own.rank for name, own in layers.items()}
    rank, alpha = (max(set(values), key=list(values).count) for values in (ranks.values(), alphas.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes any number
        target_modules=sorted(layers),
        rank_pattern={re.escape(name): own for name, own in ranks.items() if own != rank},
        alpha_pattern={re.escape(name): own for name, own in alphas.items() if own != alpha},
        use_dora=tuner.method == "dora",
        base_model_name_or_path=backbone.id,
        inference_mode=True,
    )


def _plain(value: Any) -> bool:
    """Whether a setting can be written as JSON and says something."""
    return value is not None and isinstance(value, str | int | float | bool | list | set | dict)
