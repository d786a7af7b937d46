"""The embedded base: it is a plain Stable Diffusion folder, small enough, and its card's figures meet the floors."""

from __future__ import annotations

import json

import pytest
import torch

from sctool.core.backbones.bases import EMBEDDED

MINI = EMBEDDED["mini"]
pytestmark = pytest.mark.skipif(
    not (MINI / "model_index.json").is_file(), reason="core/assets/mini is not built; see recipes/mini/README.md"
)


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(MINI, local_files_only=True, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_folder_is_at_most_32_mib_of_safetensors():
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    assert (MINI / "sheet.png").stat().st_size <= 400_000


def test_unmodified_pipeline_draws_the_same_picture_for_a_seed(pipe):
    def draw():
        generator = torch.Generator().manual_seed(3)
        return pipe("a photo of a red t-shirt", num_inference_steps=2, generator=generator, output_type="np").images

    first = draw()
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    assert first.shape == (1, side, side, 3)
    assert first.std() > 0.01
    assert (first == draw()).all()


def test_unet_has_the_12_skips_of_sd15(pipe):
    from sctool.core.sites.skips import skips

    assert len(skips(pipe.unet)) == 12


@pytest.mark.parametrize(
    "text", ["a photo of a navy pair of pants", "zürich — naïve 漢字 😀", "", "x" * 20, "tab\tand\nline"]
)
def test_any_text_round_trips_through_bytes(pipe, text):
    tokens = pipe.tokenizer(text)["input_ids"]
    assert tokens[0] == pipe.tokenizer.bos_token_id
    assert tokens[-1] == pipe.tokenizer.eos_token_id
    decoded = pipe.tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(decoded.split()) == "".join(text.split())


def test_text_longer_than_the_encoder_is_cut(pipe):
    limit = pipe.tokenizer.model_max_length
    tokens = pipe.tokenizer("word " * 100, truncation=True)["input_ids"]
    assert len(tokens) == limit == pipe.text_encoder.config.max_position_embeddings
    assert tokens[-1] == pipe.tokenizer.eos_token_id


def test_text_tower_of_the_clip_is_the_text_encoder(pipe):
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(MINI / "clip", dtype=torch.float32)
    tokens = pipe.tokenizer(["a hat", "a photo of a red dress"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        ours = pipe.text_encoder(tokens)
        theirs = clip.text_model(input_ids=tokens)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    # Pooling stands at the first end-of-text token, so padding never changes the feature of a text.
    short = pipe.tokenizer(["a hat"], return_tensors="pt").input_ids
    with torch.no_grad():
        alone = clip.text_model(input_ids=short).pooler_output[0]
    assert torch.allclose(alone, theirs.pooler_output[0], atol=1e-4)


def test_figures_meet_the_floors():
    figures = json.loads((MINI / "figures.json").read_text())
    quality = figures["quality"]
    assert quality["count"] >= 500
    assert quality["class_accuracy_samples"] >= 0.75
    assert quality["autoencoder_psnr_db"] >= 26.5
    card = (MINI / "README.md").read_text()
    assert f"{100 * quality['class_accuracy_samples']:.1f} %" in card
    assert f"{quality['autoencoder_psnr_db']:.2f} dB" in card
