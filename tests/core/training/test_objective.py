"""What a step sees and minimises: order of the data, random draws, dropout, target, weighting."""

import pytest
import torch
from torch import nn

from sctool.core.backbones.families import FAMILIES
from sctool.core.backbones.noising import Noising
from sctool.core.config import TrainConfig
from sctool.core.data.records import BytesBlob, Record, Source
from sctool.core.errors import UsageError
from sctool.core.resolving import build
from sctool.core.training.batches import Draw, StepBatches, batch_share, training_draw, validation_draw
from sctool.core.training.objective import DiffusionObjective
from sctool.core.training.seeds import generator
from sctool.core.training.splits import split_records

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CPU = torch.device("cpu")


def noising(prediction="epsilon"):
    return Noising({**SCHEDULE, "prediction_type": prediction})


def alphas_cumprod():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


class Recorder(nn.Module):
    """Stands for the model: notes its inputs and predicts a given tensor."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction
        self.hints: dict[str, torch.Tensor] | None = None

    def forward(self, latents, t, rows, hints=None, kept=None, tasks=None):
        self.latents, self.t, self.rows, self.hints, self.kept = latents, t, rows, hints, kept
        return self.prediction


def batch(count=3):
    g = torch.Generator().manual_seed(0)
    return {
        "mean": torch.randn(count, 4, 2, 2, generator=g),
        "std": torch.rand(count, 4, 2, 2, generator=g),
        "text": {"prompt_embeds": torch.randn(count, 5, 6, generator=g), "label": torch.arange(count)},
        "hints": {
            name: torch.randint(1, 256, (count, 3, 16, 16), generator=g, dtype=torch.uint8)
            for name in ("canny", "color")
        },
    }


def draw(t=(10, 500, 990), caption=(False, True, False), hints=None):
    g = torch.Generator().manual_seed(1)
    never = torch.zeros(3, dtype=torch.bool)
    return Draw(
        torch.randn(3, 4, 2, 2, generator=g),
        torch.randn(3, 4, 2, 2, generator=g),
        torch.tensor(t),
        torch.tensor(caption),
        {"canny": never, "color": never} | {name: torch.tensor(drop) for name, drop in (hints or {}).items()},
    )


def objective(prediction="epsilon", **more):
    null = {"prompt_embeds": torch.full((5, 6), 7.0), "label": torch.tensor(99)}
    return DiffusionObjective(FAMILIES[0], noising(prediction), null, 16, CPU, torch.float32, **more)


# ----------------------------------------------------------------------------------------------------- the order


def test_every_epoch_visits_every_image_once_in_an_order_of_its_own():
    seen = [i for indices in StepBatches(64, 16, 0, 0, 12) for i in indices]
    epochs = [seen[start : start + 64] for start in (0, 64, 128)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert list(range(64)) not in epochs
    assert seen == [i for indices in StepBatches(64, 16, 0, 0, 12) for i in indices]
    assert seen != [i for indices in StepBatches(64, 16, 1, 0, 12) for i in indices]


def test_an_epoch_that_ends_within_a_batch_goes_on_with_the_next_order():
    seen = [i for indices in StepBatches(10, 4, 0, 0, 5) for i in indices]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert [i for indices in StepBatches(10, 4, 0, 3, 5) for i in indices] == seen[12:]
    parts = [list(StepBatches(10, 4, 0, 0, 5, rank, 2)) for rank in range(2)]
    assert [i for pair in zip(*parts, strict=True) for indices in pair for i in indices] == seen


def test_shares_cover_a_batch_without_overlap():
    shares = [batch_share(8, rank, 4) for rank in range(4)]
    assert [i for share in shares for i in range(8)[share]] == list(range(8))


# ----------------------------------------------------------------------------------------------------- the draws


def test_draws_depend_on_seed_and_step_and_on_nothing_else():
    config = TrainConfig(batch=4, cond=("canny",), hint_dropout=0.5)
    first, again = (training_draw(config, 7, (4, 2, 2), noising(), slice(0, 4)) for _ in range(2))
    assert torch.equal(first.noise, again.noise)
    later = training_draw(config, 8, (4, 2, 2), noising(), slice(0, 4))
    other = training_draw(config.model_copy(update={"seed": 1}), 7, (4, 2, 2), noising(), slice(0, 4))
    for name in ("posterior", "noise", "t"):
        assert not torch.equal(getattr(first, name), getattr(later, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert not torch.equal(first.posterior, first.noise)
    assert generator(0, "draw", 1).initial_seed() != generator(0, "draw", 2).initial_seed()


def test_captions_and_hints_are_dropped_as_often_as_asked_and_independently():
    config = TrainConfig(batch=4000, cond=("canny", "color"), caption_dropout=0.1, hint_dropout=0.4)
    made = training_draw(config, 0, (1, 1, 1), noising(), slice(0, 4000))
    rates = [made.drop_caption, made.drop_hint["canny"], made.drop_hint["color"]]
    assert [rate.float().mean().item() for rate in rates] == pytest.approx([0.1, 0.4, 0.4], abs=0.03)
    both = (made.drop_hint["canny"] & made.drop_hint["color"]).float().mean()
    assert both.item() == pytest.approx(0.16, abs=0.03)
    assert made.t.min() < 20
    assert made.t.max() > 980
    never = training_draw(config.model_copy(update={"caption_dropout": 0.0}), 0, (1, 1, 1), noising(), slice(0, 4000))
    assert not never.drop_caption.any()


def test_some_images_keep_all_hints_and_some_lose_all():
    names = ("canny", "color", "depth")
    shares = {"hint_dropout": 0.5, "hint_keep_all": 0.2, "hint_drop_all": 0.3}
    config = TrainConfig(batch=8000, cond=names, **shares)
    made = training_draw(config, 0, (1, 1, 1), noising(), slice(0, 8000))
    lost = torch.stack([made.drop_hint[name] for name in names]).sum(0)
    rates = [(lost == count).float().mean().item() for count in range(4)]
    alone = [0.5 * chance for chance in (1 / 8, 3 / 8, 3 / 8, 1 / 8)]
    assert rates == pytest.approx([0.2 + alone[0], *alone[1:3], 0.3 + alone[3]], abs=0.02)
    without = TrainConfig(batch=8000, cond=names, hint_dropout=0.5)
    plain = training_draw(without, 0, (1, 1, 1), noising(), slice(0, 8000))
    assert torch.equal(plain.noise, made.noise), "the other draws stay as they are"
    assert torch.equal(plain.t, made.t)
    halves = [training_draw(config, 0, (1, 1, 1), noising(), slice(a, a + 4000)) for a in (0, 4000)]
    for name in names:
        assert torch.equal(torch.cat([half.drop_hint[name] for half in halves]), made.drop_hint[name])
    with pytest.raises(UsageError, match="hint_drop_all are shares"):
        build(TrainConfig, {"hint_keep_all": 0.6, "hint_drop_all": 0.5})


def test_held_out_losses_are_measured_in_each_part_of_the_schedule_and_drop_nothing():
    config = TrainConfig(cond=("canny",), hint_dropout=1.0, caption_dropout=1.0)
    for part in range(4):
        made = validation_draw(config, 0, 500, (1, 1, 1), noising(), part, 4)
        assert part * 250 <= made.t.min() < part * 250 + 10
        assert part * 250 + 240 < made.t.max() < (part + 1) * 250
        assert not made.drop_caption.any()
        assert not made.drop_hint["canny"].any()
    same, other = (validation_draw(config, first, 2, (1, 1, 1), noising(), 0, 4).noise for first in (0, 2))
    assert torch.equal(same, validation_draw(config, 0, 2, (1, 1, 1), noising(), 0, 4).noise)
    assert not torch.equal(same, other)


# ------------------------------------------------------------------------------------------------- the objective


def test_dropped_captions_become_the_null_row_and_dropped_hints_black():
    net, items = Recorder(torch.zeros(3, 4, 2, 2)), batch()
    objective()(net, items, draw(hints={"canny": (True, False, True)}))
    rows = net.rows["prompt_embeds"]
    assert torch.equal(rows[[0, 2]], items["text"]["prompt_embeds"][[0, 2]])
    assert (rows[1] == 7).all()
    assert net.rows["label"].tolist() == [0, 99, 2]
    assert net.rows["label"].dtype == torch.int64
    assert net.hints is not None
    assert not net.hints["canny"][[0, 2]].any()
    torch.testing.assert_close(net.hints["canny"][1], items["hints"]["canny"][1] / 255)
    torch.testing.assert_close(net.hints["color"], items["hints"]["color"] / 255)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_that_of_the_papers(prediction, gamma):
    """x_t = sqrt(a) x_0 + sqrt(1 - a) e; v = sqrt(a) e - sqrt(1 - a) x_0; min-SNR weights of Hang et al. 2023."""
    items, numbers, guess = batch(), draw(), torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(5))
    net = Recorder(guess)
    losses = objective(prediction, snr_gamma=gamma)(net, items, numbers)
    a = alphas_cumprod()[numbers.t][:, None, None, None]
    x0 = (items["mean"] + items["std"] * numbers.posterior).double()
    noise = numbers.noise.double()
    torch.testing.assert_close(net.latents.double(), a.sqrt() * x0 + (1 - a).sqrt() * noise, rtol=1e-5, atol=1e-5)
    target = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0, "sample": x0}[prediction]
    expected = (guess.double() - target).square().mean((1, 2, 3))
    if gamma:
        snr = (a / (1 - a)).flatten()
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
        expected = expected * snr.clamp(max=gamma) / divisor
    torch.testing.assert_close(losses.double(), expected, rtol=2e-4, atol=1e-5)
    assert torch.equal(net.t, numbers.t)
    unweighted = objective(prediction, snr_gamma=gamma).unweighted()(net, items, numbers)
    assert torch.equal(unweighted, objective(prediction)(net, items, numbers))


def test_low_precision_inputs_and_autocast():
    seen = []

    class Net(nn.Module):
        def forward(self, latents, t, rows, hints=None, kept=None, tasks=None):
            seen.append((latents.dtype, rows["prompt_embeds"].dtype, torch.is_autocast_enabled("cpu")))
            return latents

    bf16 = objective(autocast=torch.bfloat16)
    assert bf16(Net(), batch(), draw()).dtype == torch.float32
    frozen = DiffusionObjective(FAMILIES[0], noising(), objective().null_rows, 16, CPU, torch.bfloat16)
    frozen(Net(), batch(), draw())
    assert seen == [(torch.float32, torch.float32, True), (torch.bfloat16, torch.bfloat16, False)]


def test_the_size_reaches_bases_that_are_conditioned_on_it():
    net = Recorder(torch.zeros(3, 4, 2, 2))
    sdxl = DiffusionObjective(FAMILIES[1], noising(), objective().null_rows, 48, CPU, torch.float32)
    sdxl(net, batch(), draw())
    assert net.rows["time_ids"].tolist() == [[48, 48, 0, 0, 48, 48]] * 3


# ---------------------------------------------------------------------------------------------------- the splits


def source(*splits):
    return Source("set", "textfolder", [Record(str(i), BytesBlob(b""), split=split) for i, split in enumerate(splits)])


def keys(records):
    return [record.key for record in records]


def test_unmarked_images_are_held_out_by_the_seed_and_never_trained_on():
    many = source(*[None] * 200)
    training, held_out = split_records(many, None, TrainConfig(val_count=12))
    assert len(held_out) == 12
    assert not set(keys(training)) & set(keys(held_out))
    assert sorted(keys(training) + keys(held_out)) == sorted(keys(many.records))
    assert len(split_records(many, None, TrainConfig(val_count=100))[1]) == 20, "at most a tenth"
    assert keys(split_records(many, None, TrainConfig(val_count=12))[1]) == keys(held_out)
    assert keys(split_records(many, None, TrainConfig(val_count=12, seed=1))[1]) != keys(held_out)


@pytest.mark.parametrize(
    ("splits", "training", "held_out"),
    [
        (("train", "validation", None, "test"), ["0", "2"], ["1"]),
        (("train", "test", None, "test"), ["0", "2"], ["1", "3"]),
        (("val", "validation", "train"), ["2"], ["1"]),
        (("test", "val", "train"), ["2"], ["1"]),
    ],
)
def test_marked_images_are_held_out(splits, training, held_out):
    assert tuple(map(keys, split_records(source(*splits), None, TrainConfig()))) == (training, held_out)


def test_a_set_of_its_own_is_held_out():
    training, held_out = split_records(source("train", "test"), source(None, None, None), TrainConfig(val_count=2))
    assert (keys(training), keys(held_out)) == (["0", "1"], ["0", "1"])
