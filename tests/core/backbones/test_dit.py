"""A class-conditional transformer (DiT) as a family of its own: one class and one row, and everything else works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from sctool.annotators.training_sets import open_training_sets
from sctool.core.backbones import families
from sctool.core.backbones.architectures import architecture
from sctool.core.backbones.families.base import Family
from sctool.core.backbones.loading import load_backbone
from sctool.core.config import SampleConfig, TrainConfig
from sctool.core.counting import counts
from sctool.core.errors import UsageError
from sctool.core.runs import open_run
from sctool.core.sites.attaching import TunedBackbone
from sctool.core.training.plan import plan_run, show_plan
from sctool.core.training.train import train
from sctool.core.tuners import find_method
from sctool.eval.heldout import sample_heldout

LABELS = ("cat", "dog", "hat")


class ClassConditional(Family):
    """Rows: `label` (B,), a class id; the null row is the id after the last class."""

    name = "dit"
    pipeline = "DiTPipeline"
    denoiser_part = "transformer"
    conditioner_parts = ()

    def recognises(self, config: Any) -> bool:
        return config.get("_class_name") == "DiTTransformer2DModel"

    def check(self, config: Any, latent_channels: int, base: str) -> None:
        if config["in_channels"] != latent_channels:
            raise UsageError(f"--base {base} does not take latents alone.")

    def build_denoiser(self, config: Any) -> Any:
        return DiTTransformer2DModel.from_config(dict(config))

    def prompt_rule(self, trigger: str, template: str) -> Any:
        return lambda record: record.label or ""

    def encode_prompts(self, pipe: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
        null = pipe.transformer.config.num_embeds_ada_norm
        return {"label": torch.tensor([LABELS.index(prompt) if prompt else null for prompt in prompts])}

    def too_long(self, pipe: Any, prompt: str) -> bool:
        return False

    def dummy_rows(self, config: Any, batch: int, device: Any) -> dict[str, torch.Tensor]:
        return {"label": torch.zeros(batch, dtype=torch.long, device=device)}

    def predict(self, denoiser: Any, latents: Any, t: Any, rows: Any, hints: Any = None) -> torch.Tensor:
        options = {"cross_attention_kwargs": {"hint": hints}} if hints else {}
        out = denoiser(latents.to(denoiser.dtype), t, rows["label"], return_dict=False, **options)[0]
        return out[:, : latents.shape[1]]  # the rest is the learned variance

    def sample(self, pipe: Any, noise: Any, rows: Any, null: Any, config: Any, hints: Any = None) -> torch.Tensor:
        pipe.scheduler.set_timesteps(config.steps)
        latents, both = noise, {"label": torch.cat([null["label"].expand(len(noise)), rows["label"]])}
        for t in pipe.scheduler.timesteps:
            out = self.predict(pipe.transformer, torch.cat([latents] * 2), t.expand(2 * len(noise)), both, hints)
            unconditional, conditional = out.chunk(2)
            guided = unconditional + config.guidance * (conditional - unconditional)
            latents = pipe.scheduler.step(guided, t, latents).prev_sample
        return latents


@pytest.fixture
def dit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny DiT folder, and the row that makes it known."""
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, ClassConditional()))
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=len(LABELS), norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 3, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4, sample_size=32, layers_per_block=1,
    )  # fmt: skip
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Class folders, eight images each, without captions."""
    rng = np.random.default_rng(0)
    for label in LABELS:
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "data" / label / f"{i}.png")
    return tmp_path / "data"


def test_a_class_conditional_transformer_trains_and_samples(dit: Path, classes: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        method="full", base=str(dit), data=str(classes), steps=3, batch=4, validate_every=2, sample_every=3,
        preview_steps=2, val_count=2, caption_dropout=0.5,
    )  # fmt: skip
    source, held_out, _ = open_training_sets(config, 32, quiet=True)
    plan = plan_run(config, source, held_out)
    assert plan["activations_per_image"] > 0
    assert "at 32 px" in show_plan(plan)
    run = open_run(tmp_path / "runs", "dit", config)
    summary = train(config, run, source, quiet=True)
    assert summary.last is not None
    assert "val/loss_3" in summary.validation
    folders = sample_heldout(run, count=2, sampling=SampleConfig(steps=2), quiet=True)
    rows = [json.loads(line) for line in (folders[1] / "metadata.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} <= set(LABELS)
    base, tuned = (np.asarray(Image.open(folder / "000000.png")) for folder in folders)
    assert base.shape == (32, 32, 3)
    assert not np.array_equal(base, tuned)


def test_its_label_dropout_stays_off_while_it_trains(dit: Path) -> None:
    """It would draw from torch's global generator, on top of the objective's own dropout."""
    backbone = load_backbone(str(dit))
    method = find_method("full")
    tuner = method.load().build(method.config(), backbone.denoiser)
    model = TunedBackbone(backbone.denoiser, tuner).train()
    rows = backbone.encode_prompts(["cat"] * 64)
    latents, t = torch.randn(64, 4, 8, 8), torch.zeros(64, dtype=torch.long)
    assert torch.equal(model(latents, t, rows), model(latents, t, rows))
    model.attachment.detach()


def test_methods_that_need_skips_are_left_out_of_its_counts(dit: Path) -> None:
    assert [row.method for row in counts(architecture(str(dit)))] == ["full"]


def test_bases_without_text_encoders_do_not_share_cached_rows(dit: Path, tmp_path: Path) -> None:
    shutil.copytree(dit, tmp_path / "other")
    torch.manual_seed(1)
    backbone = load_backbone(str(dit))
    backbone.denoiser.proj_out_2.weight.data.normal_()
    backbone.denoiser.save_pretrained(tmp_path / "other" / "transformer")
    assert load_backbone(str(tmp_path / "other")).conditioning_id != backbone.conditioning_id


def test_its_predictions_leave_out_the_learned_variance(dit: Path) -> None:
    backbone = load_backbone(str(dit))
    latents, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    rows = backbone.encode_prompts(["dog", ""])
    assert rows["label"].tolist() == [1, 3]
    out = backbone.family.predict(backbone.denoiser, latents, t, rows)
    assert torch.equal(out, backbone.denoiser(latents, t, rows["label"]).sample[:, :4])
    assert backbone.resolution == 32
