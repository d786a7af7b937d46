"""CLIP score against the direct dot product, on tiny random models of both kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sctool.core.errors import SctoolError, UsageError
from sctool.eval.clip_score import ClipScore
from sctool.eval.features.choosing import MiniFeatures, choose_features
from sctool.eval.features.clip_models import MEAN, STD, MiniClip, OpenClip, TransformersClip, prepared
from sctool.eval.features.clip_weights import choose_clip

TEXTS = ["a red hat", "a photo of blue shoes"]


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (2, 3, 40, 24), dtype=torch.uint8)


@pytest.fixture(scope="module")
def open_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open") / "model"
    folder.mkdir()
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(1)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_open_clip_equals_the_direct_product(open_model: Path, pictures: torch.Tensor) -> None:
    clip = choose_clip("auto", model=str(open_model), offline=True)
    assert isinstance(clip, OpenClip)
    score = ClipScore()
    score.update(clip.images(pictures), clip.texts(TEXTS))
    resized = F.interpolate(pictures.float() / 255, (27, 16), mode="bicubic", antialias=True, align_corners=False)
    pixels = (resized.clamp(0, 1)[..., 5:21, :] - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        image, text = clip.net.encode_image(pixels), clip.net.encode_text(clip.tokenizer(TEXTS))
    cos = [float(i @ t / (i.norm() * t.norm())) for i, t in zip(image, text, strict=True)]
    found = score.compute()
    assert found["cos"] == pytest.approx(sum(cos) / 2, abs=1e-6)
    assert found["100"] == pytest.approx(50 * sum(cos), abs=1e-4)
    assert score.per_image()["cos"] == pytest.approx(dict(enumerate(cos)), abs=1e-6)
    assert found["w2.5"] == pytest.approx(1.25 * sum(max(c, 0) for c in cos), abs=1e-6)


def test_truncation_keeps_the_end_token(open_model: Path) -> None:
    clip = OpenClip(f"local-dir:{open_model}", None)
    before = clip.truncated
    first, second = clip.texts(["hat " * 30, "shoe " * 30])
    assert clip.truncated - before == 2
    assert not torch.allclose(first, second)  # without the end token both would be the same


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> MiniClip:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("mini") / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(str(tiny_base / "tokenizer"))
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(2)
    vision = tower | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder.parent / "tokenizer")
    return MiniClip(folder)


def test_mini_equals_transformers_logits(mini: MiniClip, pictures: torch.Tensor) -> None:
    tokens = mini.tokenizer(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        out = mini.model(pixel_values=prepared(pictures, 32, MEAN, STD, crop=False), **tokens)
    wanted = out.logits_per_image / mini.model.logit_scale.exp()
    torch.testing.assert_close(mini.images(pictures) @ mini.texts(TEXTS).T, wanted, rtol=1e-4, atol=1e-5)
    assert mini.images(pictures).dtype == torch.float32
    before = mini.truncated
    first, second = mini.texts(["hat" * 30, "shoe" * 30])
    assert mini.truncated - before == 2
    assert not torch.allclose(first, second)


def test_scores_merge() -> None:
    torch.manual_seed(3)
    image, text = (F.normalize(torch.randn(6, 4), dim=-1) for _ in range(2))
    whole, left, right = ClipScore(), ClipScore(), ClipScore()
    whole.update(image, text)
    left.update(image[:2], text[:2])
    right.update(image[2:], text[2:])
    left.merge(right)
    assert left.compute() == pytest.approx(whole.compute())
    assert left.intervals() == whole.intervals()
    with pytest.raises(SctoolError, match="prompts"):
        ClipScore().compute()


def test_which_model_is_taken(
    mini: MiniClip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, open_model: Path
) -> None:
    for module in ("features.clip_weights", "features.choosing"):
        monkeypatch.setattr(f"sctool.eval.{module}.mini_installed", lambda: True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: None)
    said: list[str] = []
    rule = {"base": "mini", "offline": True, "note": said.append, "mini": lambda: mini}
    assert choose_clip("auto", **rule) is mini
    chosen = choose_features("auto", **rule)
    assert isinstance(chosen, MiniFeatures)
    assert (chosen.label, chosen.key, chosen.dim) == ("FD (mini features)", "fd_mini", 8)
    assert "--clip-weights" in said[0]
    assert "--weights" in said[1]
    with pytest.raises(SctoolError) as error:
        choose_clip("auto", base="other", offline=True)
    assert all(word in str(error.value) for word in ("--clip-weights PATH", "download", "--features mini"))
    with pytest.raises(UsageError, match="Did you mean 'ViT-B-32'"):
        choose_clip("auto", model="ViT-B-3", offline=True)
    with pytest.raises(UsageError, match="no such file"):
        choose_clip("auto", weights="there/is/none.safetensors", offline=True)
    with pytest.raises(UsageError, match="neither"):
        choose_clip("auto", model=str(tmp_path))
    assert isinstance(choose_clip("mini", model=str(open_model)), OpenClip)
    assert isinstance(choose_clip("auto", model=str(mini_folder(mini))), TransformersClip)


def mini_folder(mini: MiniClip) -> Path:
    return Path(mini.model.config._name_or_path)


def test_sides_of_any_shape_and_grey_pictures_are_prepared() -> None:
    for height, width in ((16, 16), (16, 50), (7, 9)):
        grey = torch.full((1, 3, height, width), 9, dtype=torch.uint8)
        for crop in (True, False):
            assert prepared(grey, 16, MEAN, STD, crop=crop).shape == (1, 3, 16, 16)
