"""Tiny random bases and picture sets, made in the test: no network, no weights, one thread."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    import torch

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two threads on busy cores slow each other several-fold; the cache must not be the user's."""
    import torch

    torch.set_num_threads(1)
    os.environ["SCTOOL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def make_tokenizer(folder: Path) -> Path:
    """A byte-level CLIP tokenizer without merges, saved under `folder`."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=16)
    tokenizer.save_pretrained(str(folder))
    return folder


def make_base(folder: Path, *, seed: int = 0, prediction: str = "epsilon") -> Path:
    """A diffusers-format Stable Diffusion folder with random weights: 32 px, 8x8x4 latents, 12 skips."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(str(make_tokenizer(folder / "tokenizer")))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=2,
        norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 3, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4, sample_size=32, layers_per_block=1,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: openrail\n---\n")
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion base on disk; see `make_base`."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


def make_pictures(folder: Path, count: int = 12, size: int = 32, *, canny: bool = False) -> Path:
    """An image folder with metadata.jsonl: coloured rectangles; optionally with canny maps; every fourth held out."""
    import cv2

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        picture = np.full((size, size, 3), rng.integers(0, 255, 3), np.uint8)
        x, y = rng.integers(2, size // 2, 2)
        cv2.rectangle(
            picture, (int(x), int(y)), (int(x) + size // 3, int(y) + size // 3), rng.integers(0, 255, 3).tolist(), -1
        )
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
        row = {"file_name": f"{i:03d}.png", "text": f"picture {i}", "split": "validation" if i % 4 == 3 else "train"}
        if canny:
            Image.fromarray(cv2.Canny(picture, 100, 200)).save(folder / f"{i:03d}.canny.png")
            row["canny_file_name"] = f"{i:03d}.canny.png"
        rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captioned 32 px pictures, three held out."""
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with canny maps."""
    return make_pictures(tmp_path_factory.mktemp("data") / "edges", canny=True)


@pytest.fixture(scope="session")
def base_maker() -> Callable[..., Path]:
    """`make_base`, for a test that wants a base of its own."""
    return make_base


class Means:
    """A stand-in for a feature extractor: the mean colour."""

    name, dim, label, key, mark = "means", 3, "FD (means)", "fd_means", " (means)"
    protocol = {"extractor": "means"}  # noqa: RUF012

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float().mean((2, 3))


@pytest.fixture
def mean_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every extractor but Inception is the mean colour; Inception is not at hand."""
    from sctool.core.errors import SctoolError

    def features(kind: str, **_: object) -> Means:
        if kind == "inception":
            raise SctoolError("no Inception here.")
        return Means()

    monkeypatch.setattr("sctool.eval.sets.extraction.choose_features", features)
