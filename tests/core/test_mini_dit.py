"""The embedded class-conditional base: a plain DiT folder, small enough, and its card's figures meet the floor."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline

from sctool.core.backbones.bases import EMBEDDED
from sctool.core.backbones.loading import Backbone, load_backbone
from sctool.core.config import SampleConfig
from sctool.core.sampling import Request, sample_images

MINI_DIT = EMBEDDED["mini-dit"]
GARMENTS = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")


@pytest.fixture(scope="module")
def base() -> Backbone:
    return load_backbone("mini-dit")


def test_the_folder_is_small_and_holds_safetensors_alone() -> None:
    files = [path for path in MINI_DIT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 13 * 2**20
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    embedded = sum(path.stat().st_size for path in MINI_DIT.parent.rglob("*") if path.is_file())
    assert embedded <= 48 * 2**20, "all embedded bases and tuners together"


def test_it_is_diffusers_own_layout_with_tied_embedders(base: Backbone) -> None:
    pipe = DiTPipeline.from_pretrained(MINI_DIT, dtype=torch.float32)
    blocks = pipe.transformer.transformer_blocks
    assert blocks[0].norm1.emb is not blocks[1].norm1.emb
    ours: Any = base.denoiser.transformer_blocks
    assert len({id(block.norm1.emb) for block in ours}) == 1
    latents, t, label = torch.randn(2, 6, 16, 16), torch.tensor([10, 900]), torch.tensor([3, 10])
    with torch.no_grad():
        assert torch.equal(pipe.transformer.eval()(latents, t, label).sample, base.denoiser(latents, t, label).sample)
    assert pipe.transformer.config.out_channels == 2 * pipe.transformer.config.in_channels, "it learns the variance"


def test_it_knows_the_garments_by_name(base: Backbone) -> None:
    assert base.labels == GARMENTS
    assert base.resolution == 64
    assert base.encode_prompts(["hat", "9", ""])["label"].tolist() == [1, 9, 10]


def test_classes_are_drawn_differently_and_by_seed(base: Backbone) -> None:
    def draw(label: str) -> torch.Tensor:
        [(_, image)] = sample_images(base, [Request(label, 3)], SampleConfig(steps=2, guidance=3.0))
        return torch.from_numpy(image).float()

    assert torch.equal(draw("hat"), draw("hat"))
    assert (draw("hat") - draw("pants")).abs().mean() > 5


def test_the_cards_figures_meet_the_floor() -> None:
    quality = json.loads((MINI_DIT / "figures.json").read_text())["quality"]
    assert quality["count"] >= 500
    assert quality["class_accuracy_samples"] >= 0.75
    assert f"{100 * quality['class_accuracy_samples']:.1f} %" in (MINI_DIT / "README.md").read_text()
