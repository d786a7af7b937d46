"""DiT folders: tied embedders, classes, the learned variance, token masking, sampling; trained and sampled whole."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from sctool.annotators.training_sets import open_training_sets
from sctool.core.backbones.architectures import architecture
from sctool.core.backbones.families.dit import DiT, untied
from sctool.core.backbones.loading import Backbone, load_backbone
from sctool.core.backbones.noising import Noising
from sctool.core.checkpoint import load_tuner, read_meta
from sctool.core.config import SampleConfig, TrainConfig
from sctool.core.counting import counts
from sctool.core.data.prompts import count_prompts
from sctool.core.data.records import BytesBlob, Record
from sctool.core.errors import UsageError
from sctool.core.runs import free_keys, open_run
from sctool.core.sampling import Request, sample_images
from sctool.core.sites.attaching import TunedBackbone, tuned
from sctool.core.sites.tokens import TokenMask, kept_places
from sctool.core.training.batches import kept_tokens, mask_ratio, training_draw
from sctool.core.training.objective import DiffusionObjective
from sctool.core.training.plan import plan_run, show_plan
from sctool.core.training.train import train
from sctool.core.tuners import find_method
from sctool.eval.heldout import sample_heldout

LABELS = ("cat", "dog", "hat")
CPU = torch.device("cpu")


def transformer(classes: int = len(LABELS), seed: int = 0) -> DiTTransformer2DModel:
    """A tiny DiT; embedders differ between blocks, as diffusers makes them."""
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=classes, norm_num_groups=4,
    )  # fmt: skip


def tie(denoiser: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Equal embedders in all blocks, as in facebook/DiT-XL-2-256."""
    first, second = denoiser.transformer_blocks
    second.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return denoiser


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 3, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4, sample_size=32, layers_per_block=1,
    )  # fmt: skip


def save(denoiser: DiTTransformer2DModel, folder: Path, labels: Sequence[str] = LABELS) -> Path:
    DiTPipeline(denoiser, autoencoder(), DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    index = folder / "model_index.json"
    names = {"id2label": {str(number): label for number, label in enumerate(labels)}} if labels else {}
    index.write_text(json.dumps(json.loads(index.read_text()) | names))
    return folder


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    """A tiny DiT folder in diffusers' layout."""
    return save(tie(transformer()), tmp_path / "dit")


def pictures(folder: Path, *labels: str, count: int = 8) -> Path:
    """Class folders without captions."""
    rng = np.random.default_rng(0)
    for label in labels:
        (folder / label).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / label / f"{i}.png")
    return folder


# ------------------------------------------------------------------------------------------------------ as a whole


def test_it_trains_new_classes_plans_and_samples(dit: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", "cat", "owl", "fox")
    config = TrainConfig(
        method="full", base=str(dit), data=str(data), steps=3, batch=4, validate_every=2, sample_every=3,
        preview_steps=2, val_count=2, caption_dropout=0.5, mask=0.5,
    )  # fmt: skip
    source, held_out, _ = open_training_sets(config, 32, prompt=DiT().prompt_rule("", ""), quiet=True)
    plan = plan_run(config, source, held_out)
    assert plan["activations_per_image"] > 0
    assert plan["classes_added"] == ["fox", "owl"]
    assert "at 32 px" in show_plan(plan)
    assert "2 classes added: fox, owl" in show_plan(plan)
    run = open_run(tmp_path / "runs", "dit", config)
    summary = train(config, run, source, quiet=True)
    assert summary.last is not None
    assert "val/loss_3" in summary.validation
    assert read_meta(run.path)["classes"] == ["fox", "owl"]
    folders = sample_heldout(run, count=2, sampling=SampleConfig(steps=2), quiet=True)
    rows = [json.loads(line) for line in (folders[1] / "metadata.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} <= {"cat", "owl", "fox"}
    base, tuned_image = (np.asarray(Image.open(folder / "000000.png")) for folder in folders)
    assert base.shape == (32, 32, 3)
    assert not np.array_equal(base, tuned_image)
    backbone = load_backbone(str(dit))
    offsets = load_tuner(run.path, backbone).state_dict()["new_classes.offsets"]
    assert offsets.shape == (1, 2, 8), "the tables are tied: one row per class"
    assert offsets.any()


def test_going_on_from_a_tuner_keeps_its_classes_and_refuses_others(dit: Path, tmp_path: Path) -> None:
    def run_on(name: str, data: Path, init: str | None = None) -> Any:
        config = TrainConfig(
            method="full", base=str(dit), data=str(data), steps=1, batch=2, validate_every=0, sample_every=0, init=init
        )
        source, _, _ = open_training_sets(config, 32, quiet=True)
        run = open_run(tmp_path / "runs", name, config)
        train(config, run, source, quiet=True)
        return run

    first = run_on("first", pictures(tmp_path / "one", "fox", "owl", count=2))
    again = run_on("again", pictures(tmp_path / "two", "owl", count=2), str(first.path))
    assert read_meta(again.path)["classes"] == ["fox", "owl"]
    with pytest.raises(UsageError, match="has no class elk"):
        run_on("third", pictures(tmp_path / "three", "elk", count=2), str(first.path))


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
    methods = {row.method for row in counts(architecture(str(dit)))}
    assert "full" in methods
    assert "scedit" not in methods


def test_bases_without_text_encoders_do_not_share_cached_rows(dit: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(dit))
    before = backbone.conditioning_id
    backbone.classes = ("owl",)
    assert backbone.conditioning_id != before, "the same label may be another id with other classes"
    other = save(tie(transformer()), tmp_path / "relabelled", ("dog", "cat", "hat"))
    assert load_backbone(str(other)).conditioning_id != before
    backbone.denoiser.proj_out_2.weight.data.normal_()
    shutil.copytree(dit, tmp_path / "other")
    with untied(backbone.denoiser):
        backbone.denoiser.save_pretrained(tmp_path / "other" / "transformer")
    assert load_backbone(str(tmp_path / "other")).conditioning_id != before


# --------------------------------------------------------------------------------------------------------- tying


def test_equal_embedders_are_tied_and_unequal_ones_are_not(dit: Path, tmp_path: Path) -> None:
    latents, t, label = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 3])
    for folder, tied in ((dit, True), (save(transformer(), tmp_path / "free"), False)):
        backbone = load_backbone(str(folder))
        blocks: Any = backbone.denoiser.transformer_blocks
        first, second = blocks
        assert (first.norm1.emb is second.norm1.emb) == tied
        plain = DiTPipeline.from_pretrained(folder).transformer.eval()
        assert torch.equal(backbone.denoiser(latents, t, label).sample, plain(latents, t, label).sample)


def test_counts_with_embedders_tied_as_dit_has_them_and_untied_as_diffusers_stores_them() -> None:
    shapes = architecture("dit-xl-2")
    denoiser = shapes.denoiser()
    assert sum(p.numel() for p in denoiser.parameters()) == 674_834_720
    with torch.device("meta"):
        apart = DiTTransformer2DModel.from_config(dict(shapes.config))
    assert sum(p.numel() for p in apart.parameters()) == 749_826_464


def test_a_tied_denoiser_is_written_in_diffusers_layout(dit: Path, tmp_path: Path) -> None:
    denoiser = load_backbone(str(dit)).denoiser
    with untied(denoiser):
        assert denoiser.transformer_blocks[0].norm1.emb is not denoiser.transformer_blocks[1].norm1.emb
        denoiser.save_pretrained(tmp_path / "again")
    assert denoiser.transformer_blocks[0].norm1.emb is denoiser.transformer_blocks[1].norm1.emb
    stored = DiTPipeline.from_pretrained(dit).transformer.state_dict()
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "again").state_dict()
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], value) for name, value in again.items())


# ------------------------------------------------------------------------------------------------------- classes


def test_classes_are_labels_or_ids_and_the_empty_one_is_the_null_class(dit: Path) -> None:
    backbone = load_backbone(str(dit))
    assert backbone.labels == LABELS
    backbone.classes = ("owl", "fox")
    rows = backbone.encode_prompts(["dog", "", "2", "owl", "fox", "5"])
    assert rows["label"].tolist() == [1, 3, 2, 4, 5, 5]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("9", "class 9 is out of range: 0 to 2 of the base, 3 for none, 4 to 4 of the tuner."),
        ("owk", "unknown class 'owk'. Did you mean 'owl'?"),
    ],
)
def test_a_class_that_is_not_there_is_named(dit: Path, label: str, words: str) -> None:
    backbone = load_backbone(str(dit))
    backbone.classes = ("owl",)
    with pytest.raises(UsageError) as caught:
        backbone.encode_prompts([label])
    assert words in str(caught.value)


def test_a_base_without_labels_takes_ids(tmp_path: Path) -> None:
    backbone = load_backbone(str(save(tie(transformer()), tmp_path / "dit", ())))
    assert backbone.encode_prompts(["1"])["label"].tolist() == [1]
    with pytest.raises(UsageError, match="names no labels; give an id from 0 to 2"):
        backbone.encode_prompts(["cat"])
    assert backbone.family.added(backbone.pipe, ["1", "7", "cat", ""]) == ("7", "cat")


def test_the_trigger_names_the_class_of_images_without_a_label() -> None:
    rule = DiT().prompt_rule("faces", "a photo of a {label}")
    labelled = Record("a", BytesBlob(b""), text="a caption", label="cat")
    assert (rule(labelled), rule(Record("b", BytesBlob(b""), text="a caption"))) == ("cat", "faces")


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_class_starts_as_the_null_class_and_changes_no_other(tied: bool, tmp_path: Path) -> None:
    denoiser = transformer()
    backbone = load_backbone(str(save(tie(denoiser) if tied else denoiser, tmp_path / "dit")))
    net, family = backbone.denoiser, backbone.family
    method = find_method("full")
    tuner = method.load().build(method.config(), net, classes=("owl", "fox"))
    assert tuner.new_classes is not None
    latents, t = torch.randn(6, 4, 8, 8), torch.tensor([1, 5, 9, 300, 700, 999])
    old, new = torch.tensor([0, 1, 2, 3, 3, 3]), torch.tensor([0, 1, 2, 3, 4, 5])
    expected = family.predict(net, latents, t, {"label": old})
    assert torch.equal(family.predict(net, latents, t, {"label": new}), expected), "no tuner: the null class"
    with tuned(net, tuner):
        assert torch.equal(family.predict(net, latents, t, {"label": new}), expected)
        with torch.no_grad():
            tuner.new_classes.offsets.normal_()
        out = family.predict(net, latents, t, {"label": new})
        table = net.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
        row = table(torch.tensor([5]))
    assert torch.equal(out[:4], expected[:4])
    assert not torch.isclose(out[4:], expected[4:]).all(dim=-1).any()
    torch.testing.assert_close(row[0], table.weight[3] + tuner.new_classes.offsets[0, 1])


# ------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_samples_are_those_of_the_pipeline(guidance: float, tmp_path: Path) -> None:
    """`DiTPipeline` has the null class of ImageNet, 1000, written into it."""
    folder = save(tie(transformer(1000)), tmp_path / "dit", ())
    backbone = load_backbone(str(folder))
    pipe = DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    config = SampleConfig(steps=4, guidance=guidance)
    images = [image for _, image in sample_images(backbone, [Request("7", 3)], config)]
    theirs = pipe([7], guidance, torch.Generator().manual_seed(3), 4, output_type="np").images
    assert np.abs(images[0] / 255 - theirs[0]).max() < 1.01 / 255
    assert np.std(images[0]) > 1


def test_guidance_rescale_moves_the_samples(dit: Path) -> None:
    backbone = load_backbone(str(dit))
    plain, rescaled = (
        next(image for _, image in sample_images(backbone, [Request("cat", 0)], SampleConfig(steps=3, rescale=share)))
        for share in (0.0, 0.7)
    )
    assert not np.array_equal(plain, rescaled)


# ----------------------------------------------------------------------------------------------- learned variance


def schedule() -> tuple[torch.Tensor, torch.Tensor]:
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    return betas, torch.cumprod(1 - betas, 0)


def bound(x0: Any, xt: Any, t: int, eps: Any, v: Any) -> torch.Tensor:
    """The variational bound of one sample, restated in double precision from Nichol & Dhariwal's eqs. 2 to 15."""
    betas, kept = schedule()
    before = kept[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
    log_beta = betas[t].log()
    smallest = betas * (1 - torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])) / (1 - kept)
    log_small = smallest[max(t, 1)].log()
    log_variance = (v + 1) / 2 * log_beta + (1 - v) / 2 * log_small
    a, b = before.sqrt() * betas[t] / (1 - kept[t]), (1 - betas[t]).sqrt() * (1 - before) / (1 - kept[t])
    guess = (xt - (1 - kept[t]).sqrt() * eps) / kept[t].sqrt()
    mean, true = a * guess + b * xt, a * x0 + b * xt
    if t:
        p, q = (
            torch.distributions.Normal(true, (log_small / 2).exp()),
            torch.distributions.Normal(mean, (log_variance / 2).exp()),
        )
        return torch.distributions.kl_divergence(p, q).mean() / math.log(2)
    std = (log_variance / 2).exp()

    def below(z: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    high, low = below((x0 - mean + 1 / 255) / std), below((x0 - mean - 1 / 255) / std)
    mass = torch.where(x0 < -0.999, high, torch.where(x0 > 0.999, 1 - low, high - low)).clamp(min=1e-12)
    return -mass.log().mean() / math.log(2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_variance_is_trained_by_the_variational_bound(prediction: str) -> None:
    config = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    noising = Noising({**config, "prediction_type": prediction})
    g = torch.Generator().manual_seed(0)
    x0, eps, guess, v = (torch.randn(4, 4, 4, 4, generator=g) for _ in range(4))
    v, x0 = v.tanh(), x0 * 1.5
    t = torch.tensor([0, 1, 500, 999])
    noisy, (_, kept) = noising.add_noise(x0, eps, t), schedule()
    values = noising.variance_bound(x0, noisy, t, guess.requires_grad_(), v.requires_grad_())
    a = kept[t][:, None, None, None]
    as_noise = {
        "epsilon": guess.double(),
        "v_prediction": a.sqrt() * guess.double() + (1 - a).sqrt() * noisy.double(),
        "sample": (noisy.double() - a.sqrt() * guess.double()) / (1 - a).sqrt(),
    }[prediction]
    expected = [bound(x0[i].double(), noisy[i].double(), int(t[i]), as_noise[i], v[i].double()) for i in range(4)]
    torch.testing.assert_close(values.double().mean((1, 2, 3)), torch.stack(expected), rtol=2e-3, atol=1e-4)
    values.sum().backward()
    assert guess.grad is None, "no gradient into the mean"
    assert v.grad is not None


def objective(prediction: str = "epsilon", **more: Any) -> DiffusionObjective:
    null = {"label": torch.tensor(3)}
    noising = Noising({"prediction_type": prediction})
    return DiffusionObjective(DiT(), noising, null, 32, CPU, torch.float32, patch=2, **more)


def step(tokens: int = 0, mask: float = 0.0) -> tuple[dict[str, Any], Any]:
    g = torch.Generator().manual_seed(0)
    batch = {
        "mean": torch.randn(3, 4, 8, 8, generator=g), "std": torch.zeros(3, 4, 8, 8), "hints": {},
        "text": {"label": torch.tensor([0, 1, 2])},
    }  # fmt: skip
    config = TrainConfig(batch=3, caption_dropout=0.0, mask=mask, mask_anneal=0.0)
    return batch, training_draw(config, 0, (4, 8, 8), Noising({}), slice(0, 3), tokens)


def test_the_loss_is_the_error_plus_the_bound_and_held_out_losses_are_the_error_alone(dit: Path) -> None:
    model = TunedBackbone(load_backbone(str(dit)).denoiser)
    batch, draw = step()
    loss = objective()
    noisy = loss.noising.add_noise(batch["mean"], draw.noise, draw.t)
    out = model(noisy, draw.t, batch["text"])
    error = F.mse_loss(out[:, :4], draw.noise, reduction="none").mean((1, 2, 3))
    term = loss.noising.variance_bound(batch["mean"], noisy, draw.t, out[:, :4], out[:, 4:]).mean((1, 2, 3))
    torch.testing.assert_close(loss(model, batch, draw), error + term)
    torch.testing.assert_close(loss.unweighted()(model, batch, draw), error)
    weighted = objective(snr_gamma=5.0)(model, batch, draw)
    torch.testing.assert_close(weighted, error * loss.noising.snr_weights(draw.t, 5.0) + term)


# -------------------------------------------------------------------------------------------------- token masking


def test_masked_tokens_equal_full_length_attention_with_those_keys_masked() -> None:
    denoiser = tie(transformer()).double().eval()
    tokens = TokenMask(*DiT().token_layers(denoiser))
    latents, t, label = torch.randn(2, 4, 8, 8, dtype=torch.double), torch.tensor([3, 900]), torch.tensor([0, 3])
    kept = torch.stack([torch.randperm(16)[:8].sort().values for _ in range(2)])
    tokens.kept = kept
    short = denoiser(latents, t, label).sample
    tokens.kept = None
    hidden = torch.full((2, 16), -math.inf, dtype=torch.double).scatter(1, kept, 0.0)

    def mask_keys(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": hidden[:, None]}

    for block in denoiser.transformer_blocks:
        block.register_forward_pre_hook(mask_keys, with_kwargs=True)
    full = denoiser(latents, t, label).sample
    places = kept_places(kept, (8, 8), 2).expand_as(full)
    assert (short - full)[places].abs().max() < 1e-12
    assert not short[~places].any()
    assert places.double().mean() == 0.5


def test_the_loss_of_masked_tokens_is_that_of_the_kept_places(dit: Path) -> None:
    model = TunedBackbone(load_backbone(str(dit)).denoiser)
    batch, draw = step(tokens=16, mask=0.5)
    assert draw.kept is not None
    assert draw.kept.shape == (3, 8)
    plain = objective().unweighted()
    out = model(plain.noising.add_noise(batch["mean"], draw.noise, draw.t), draw.t, batch["text"], None, draw.kept)
    places = kept_places(draw.kept, (8, 8), 2).expand(3, 4, 8, 8)
    expected = torch.stack([((o - n)[p] ** 2).mean() for o, n, p in zip(out[:, :4], draw.noise, places, strict=True)])
    torch.testing.assert_close(plain(model, batch, draw), expected)


def test_kept_places_are_the_patches_of_the_tokens() -> None:
    places = kept_places(torch.tensor([[1, 4]]), (4, 6), 2)
    assert places[0, 0].int().tolist() == [[0, 0, 1, 1, 0, 0]] * 2 + [[0, 0, 1, 1, 0, 0]] * 2
    assert kept_places(torch.tensor([[2, 3]]), (4, 6), 2)[0, 0].int().tolist() == [
        [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0],
    ]  # fmt: skip


def test_masking_falls_to_nothing_at_the_end() -> None:
    config = TrainConfig(mask=0.5, mask_anneal=0.2, steps=101)
    ratios = [mask_ratio(config, number) for number in range(101)]
    assert ratios[:80] == [0.5] * 80
    assert ratios[-1] == pytest.approx(0, abs=1e-12)
    assert all(a >= b for a, b in pairwise(ratios))
    middle = 100 - round(0.1 * 101)
    assert ratios[middle] == pytest.approx(0.5 * math.cos(math.pi / 2 * (1 - (100 - middle) / 20.2)) ** 4)
    assert [mask_ratio(TrainConfig(mask=0.5, mask_anneal=0.0, steps=9), number) for number in (0, 8)] == [0.5, 0.5]
    assert "steps" not in free_keys(config), "the number of steps decides the masking"
    assert "steps" in free_keys(config.model_copy(update={"mask_anneal": 0.0}))


def test_tokens_are_drawn_per_sample_by_seed_and_step_and_shared_among_processes() -> None:
    config = TrainConfig(batch=4, mask=0.5, mask_anneal=0.0, steps=10, accumulate=2)
    first, again, later = (kept_tokens(config, micro, 16) for micro in (0, 0, 1))
    assert first is not None
    assert again is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, later)  # pyright: ignore[reportArgumentType]
    assert not torch.equal(first[0], first[1])
    assert all(len(set(row)) == 8 and row == sorted(row) for row in first.tolist())
    shares = [training_draw(config, 0, (4, 8, 8), Noising({}), slice(2 * r, 2 * r + 2), 16).kept for r in (0, 1)]
    assert torch.equal(torch.cat([share for share in shares if share is not None]), first)
    plain, masked = (
        training_draw(c, 0, (4, 8, 8), Noising({}), slice(0, 4), 16) for c in (TrainConfig(batch=4), config)
    )
    assert torch.equal(plain.noise, masked.noise), "masking changes no other draw"
    assert plain.kept is None
    assert kept_tokens(config.model_copy(update={"mask_anneal": 1.0}), 19, 16) is None, "the last step has all"


def test_masking_needs_tokens(tmp_path: Path) -> None:
    config = TrainConfig(mask=0.5, steps=1)
    source, _, _ = open_training_sets(config, 64, quiet=True)
    with pytest.raises(UsageError, match="mini has none: it is not a transformer"):
        train(config, open_run(tmp_path, "run", config), source, quiet=True)


# ------------------------------------------------------------------------------------------------- what is refused


def altered(folder: Path, **config: Any) -> Path:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [({"num_embeds_ada_norm": None}, "has no class table"), ({"in_channels": 9}, "takes 9 input channels")],
)
def test_transformers_that_cannot_be_trained_on_are_refused(dit: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_backbone(str(altered(dit, **config)))


def test_its_size_is_a_multiple_of_its_patches(dit: Path) -> None:
    backbone: Backbone = load_backbone(str(dit))
    assert backbone.resolution == 32
    backbone.check_size(24)
    with pytest.raises(UsageError, match="not divisible by 8"):
        backbone.check_size(36)


def test_its_predictions_leave_out_the_learned_variance(dit: Path) -> None:
    backbone = load_backbone(str(dit))
    latents, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    rows = backbone.encode_prompts(["dog", ""])
    out = backbone.family.predict(backbone.denoiser, latents, t, rows)
    assert torch.equal(out, backbone.denoiser(latents, t, rows["label"]).sample[:, :4])


def test_class_labels_are_no_makeshift_captions_and_images_without_one_are_counted() -> None:
    records = [Record("a", BytesBlob(b""), label="cat"), Record("b", BytesBlob(b""), text="a caption")]
    rule = DiT().prompt_rule("", "a photo of a {label}")
    assert str(count_prompts(records, rule)) == "1 of 2 images have no class label"
    assert str(count_prompts(records, DiT().prompt_rule("faces", ""))) == ""
