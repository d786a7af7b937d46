"""Every format there and back on SD 1.5, SD 2.1 and SDXL: their layers and key names, at a tenth of their widths."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from sctool.core.backbones.architectures import KNOWN
from sctool.core.backbones.families import family_of_denoiser
from sctool.core.exchange.importing import read_tuner
from sctool.core.exchange.table import format_for
from sctool.core.tuners import method_config, tuner_class

CASES = [
    *(("lora", to, {"rank": 2, "layers": ["whole"]}) for to in ("peft", "diffusers", "kohya")),
    *(("dora", to, {"rank": 2, "layers": ["attention"]}) for to in ("peft", "diffusers", "kohya")),
    *((method, "diffusers", {}) for method in ("controlnet", "t2i-adapter", "controlnet-xs")),
    ("scedit", "scepter", {}),
    ("scedit", "scepter", {"ratio": 0.1}),
    ("scedit", "scepter", {"kernel": 3, "normalize": False, "conditions": ("canny",)}),
]  # fmt: skip


def narrow(name: str) -> Any:
    """As much of the known base as a format looks at, with a tenth of its channels: its layers have the same names."""
    known = KNOWN[name]
    channels = [32 * width // 320 for width in known.get("block_out_channels", [320, 640, 1280, 1280])]
    config = {
        **known, "block_out_channels": channels, "cross_attention_dim": 32, "attention_head_dim": 4,
        "norm_num_groups": 8, "projection_class_embeddings_input_dim": None, "sample_size": 8,
    }  # fmt: skip
    if known.get("addition_embed_type"):
        config |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    torch.manual_seed(0)
    denoiser = UNet2DConditionModel(**config).eval()
    parts = {"id": name, "hash": "0" * 64, "licence": "openrail", "ancestors": (), "classes": ()}
    return SimpleNamespace(denoiser=denoiser, vae_scale=8, family=family_of_denoiser(denoiser.config), **parts)


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl"])
def base(request: pytest.FixtureRequest) -> Any:
    return narrow(request.param)


@pytest.mark.parametrize(("method", "to", "settings"), CASES)
def test_every_weight_comes_back_bit_for_bit(
    method: str, to: str, settings: dict[str, Any], base: Any, tmp_path: Path
) -> None:
    conditions = settings.get("conditions", () if method in ("lora", "dora", "scedit") else ("canny",))
    config = method_config(method, {name: value for name, value in settings.items() if name != "conditions"})
    tuner = tuner_class(method).build(config, base.denoiser, conditions, base.vae_scale)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    meta = {"method": method, "name": "canny", "conditions": list(conditions), "licence": "openrail"}
    files = format_for(to, method).write(tmp_path, tuner, base, meta)
    of_scepter = to == "scepter" and conditions  # their files do not say the condition, folders of diffusers do
    found = read_tuner(files[0].parent, base, conditions[0] if of_scepter else None)
    assert (found.tuner.method, found.tuner.conditions, list(found.unused)) == (method, tuple(conditions), [])
    ours, theirs = tuner.state_dict(), found.tuner.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
