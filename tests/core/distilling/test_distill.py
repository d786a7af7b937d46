"""Distillation: the losses against restatements, the teacher's cache, and runs that end as if never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sctool.core.backbones.families import family_of_denoiser
from sctool.core.backbones.loading import Backbone, load_backbone
from sctool.core.backbones.noising import Noising
from sctool.core.backbones.students import Student, first_teacher
from sctool.core.backbones.thin import THIN
from sctool.core.checkpoint import load_tuner, save_tuner
from sctool.core.config import DistillConfig, StudentConfig, TrainConfig
from sctool.core.distilling.distill import check_run, distill, distill_config, make_only, stages_of
from sctool.core.distilling.factorising import decompose, layers_to_divide
from sctool.core.distilling.making import make, save_student
from sctool.core.distilling.objective import DistillObjective, feature_error, outputs_of, weight
from sctool.core.distilling.ranks import by_ratio
from sctool.core.distilling.teacher import TeacherCache
from sctool.core.errors import SctoolError, UsageError
from sctool.core.runs import Run, open_run
from sctool.core.training.batches import Draw
from sctool.core.training.objective import DiffusionObjective
from sctool.core.tuners import method_config, tuner_class

from ..tiny import unet
from ..training.crashing import crash_before_step

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WEIGHTS = {
    "epsilon": lambda snr: torch.ones_like(snr),
    "truncated_snr": lambda snr: torch.maximum(torch.ones_like(snr), 1 / snr),
    "snr_plus_one": lambda snr: 1 + 1 / snr,
    "min_snr": lambda snr: snr.clamp(max=3.0) / snr,
}


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_weights_mean_the_same_for_every_prediction(kind: str, weighting: str) -> None:
    noising = Noising({**SCHEDULE, "prediction_type": kind})
    t = torch.tensor([0, 5, 300, 700, 999])
    kept = noising.scheduler.alphas_cumprod[t].double()
    generator = torch.Generator().manual_seed(0)
    noisy, ours, theirs = (torch.randn(5, 4, 3, 3, generator=generator).double() for _ in range(3))
    clean = [noising.clean(noisy, prediction, t).double() for prediction in (ours, theirs)]
    signal, noise = kept.sqrt().view(-1, 1, 1, 1), (1 - kept).sqrt().view(-1, 1, 1, 1)
    difference = [(noisy - signal * x) / noise for x in clean]
    of_noise = (difference[0] - difference[1]).square().flatten(1).mean(1)
    expected = WEIGHTS[weighting](kept / (1 - kept)) * of_noise
    native = (ours - theirs).square().flatten(1).mean(1)
    torch.testing.assert_close(weight(noising, t, weighting, 3.0).double() * native, expected, rtol=1e-4, atol=0)


def test_native_weights_are_one_and_v_is_snr_plus_one() -> None:
    noising, t = Noising({**SCHEDULE, "prediction_type": "v_prediction"}), torch.tensor([0, 500, 999])
    assert weight(noising, t, "native").tolist() == [1, 1, 1]
    assert weight(noising, t, "snr_plus_one").tolist() == [1, 1, 1]


def test_feature_errors_are_relative_to_the_teacher_s() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = {"a": torch.randn(2, 3, 4, generator=generator), "b": 100 * torch.randn(2, 5, generator=generator)}
    ours = {"x": 1.1 * theirs["a"], "b": 1.2 * theirs["b"]}
    error = feature_error(ours, theirs, [("x", "a"), ("b", "b")])
    torch.testing.assert_close(error, torch.full((2,), (0.01 + 0.04) / 2), rtol=1e-4, atol=0)


# -------------------------------------------------------------------------------------------------------- objective


def objective(settings: dict[str, Any], cache: TeacherCache | None = None) -> tuple[DistillObjective, Any, Any]:
    teacher, student = unet(), unet()
    decompose(student, by_ratio(layers_to_divide(student), 0.5)).requires_grad_(True)
    family, noising = family_of_denoiser(teacher.config), Noising({**SCHEDULE, "prediction_type": "epsilon"})  # type: ignore[arg-type]
    ordinary = DiffusionObjective(
        family, noising, {"prompt_embeds": torch.zeros(3, 8)}, 32, torch.device("cpu"), torch.float32
    )
    config = DistillConfig(**settings)
    own = DistillObjective(ordinary, teacher, student, config, stages_of(student, config), cache)

    def net(noisy: Any, t: Any, rows: Any, *rest: Any) -> Any:
        return family.output(student, noisy, t, rows)

    return own, net, noising


def batch_and_draw(seed: int = 0) -> tuple[dict[str, Any], Draw]:
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "mean": torch.randn(3, 4, 8, 8, generator=generator), "std": torch.full((3, 4, 8, 8), 0.1),
        "text": {"prompt_embeds": torch.randn(3, 3, 8, generator=generator)}, "hints": {},
    }  # fmt: skip
    posterior, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    return batch, Draw(posterior, noise, torch.tensor([3, 500, 900]), torch.tensor([False, True, False]), {})


def test_the_loss_is_the_sum_of_its_three_parts() -> None:
    batch, draw = batch_and_draw()
    parts = []
    for one in ({"output": 1, "feature": 0}, {"output": 0, "feature": 1}, {"output": 0, "feature": 0, "task": 1}):
        own, net, _ = objective(one)
        parts.append(own(net, batch, draw).detach())
    own, net, _ = objective({"output": 2.0, "feature": 0.5, "task": 0.25})
    total = own(net, batch, draw)
    torch.testing.assert_close(total.detach(), 2 * parts[0] + 0.5 * parts[1] + 0.25 * parts[2])
    sample = own.ordinary.sample(batch, draw)
    torch.testing.assert_close(parts[2], own.ordinary(net, batch, draw).detach())
    with torch.no_grad():
        ours, theirs = net(sample.noisy, sample.t, sample.rows), own._run(sample)
    torch.testing.assert_close(parts[0], (ours - theirs).square().flatten(1).mean(1))
    total.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in own.student.parameters())
    assert not any(module._forward_hooks for module in own.student.modules())


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    own, _, _ = objective({"output": 1.0, "feature": 1.0})
    batch, draw = batch_and_draw()
    twin = DistillObjective(own.ordinary, own.teacher, own.teacher, own.config, own.stages)
    loss = twin(twin._as_net, batch, draw)  # type: ignore[arg-type]
    assert torch.equal(loss, torch.zeros(3))
    held_out = own.unweighted()(twin._as_net, batch, draw)  # type: ignore[arg-type]
    assert (held_out > 0.1).all(), "held-out losses are against the data"


def test_stages_correspond() -> None:
    student = load_backbone("mini")
    for size, count in (("small", 8), ("base", 9)):
        denoiser, _ = make(student, StudentConfig(prune=size))  # type: ignore[arg-type]
        stages = stages_of(denoiser, DistillConfig(prune=size))  # type: ignore[arg-type]
        assert len(stages) == count
        rows = student.encode_prompts(["a hat"])
        inputs = torch.randn(1, 6, 16, 16), torch.tensor([10]), rows
        with torch.no_grad(), outputs_of(denoiser, [a for a, _ in stages]) as ours:
            student.family.output(denoiser, *inputs)
        with torch.no_grad(), outputs_of(student.denoiser, [b for _, b in stages]) as theirs:
            student.family.output(student.denoiser, *inputs)
        assert [ours[a].shape for a, _ in stages] == [theirs[b].shape for _, b in stages]


def test_the_cache_holds_the_teacher_s_outputs_for_few_fixed_draws(tmp_path: Path) -> None:
    _, _, noising = objective({})
    cache = TeacherCache(tmp_path, 2, 0, noising, 0.5)
    own, net, _ = objective({"feature": 0.0, "cache": 2}, cache)
    batch, draw = batch_and_draw()
    fixed, keys = cache.fixed(batch, draw)
    again, same = cache.fixed(batch, draw)
    assert keys == same
    assert torch.equal(fixed.noise, again.noise)
    seen = set()
    for t in range(40):
        other = Draw(draw.posterior, draw.noise, torch.full((3,), t), draw.drop_caption, {})
        seen |= set(cache.fixed(batch, other)[1])
    assert len(seen) == 6, "two draws for each of three images"
    loss = own(net, batch, draw)
    sample = own.ordinary.sample(batch, fixed)
    direct = own._output_error(sample, net(sample.noisy, sample.t, sample.rows), own._run(sample))
    torch.testing.assert_close(loss, direct, rtol=1e-2, atol=1e-4)
    calls = []
    reopened = TeacherCache(tmp_path, 2, 0, noising, 0.5)
    stored = reopened.outputs(keys, own.ordinary.sample(batch, fixed), lambda sample: calls.append(1) or sample.noisy)
    assert not calls, "what is on disk is not computed again"
    torch.testing.assert_close(stored.float(), own._run(own.ordinary.sample(batch, fixed)), rtol=1e-2, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- runs


def settings(base: Path, data: Path, *pairs: str) -> TrainConfig:
    flags = {"base": str(base), "data": str(data), "steps": 6, "batch": 4}
    quick = ["save_every=2", "validate_every=0", "sample_every=0", "lr=1e-3", "ema=0.5", "flip=true"]
    calibrated = any(pair.startswith(("start=", "prune=")) or "prune=" in pair for pair in pairs)
    return distill_config(flags, [*quick, *([] if calibrated else ["start=balanced"]), *pairs])


def run_in(folder: Path, config: TrainConfig, also: Any = ()) -> Run:
    from sctool.annotators.training_sets import open_training_sets

    run = open_run(folder, "run", config)
    source, held_out, _ = open_training_sets(config, 32, quiet=True)
    distill(config, run, source, held_out=held_out, also=also, quiet=True)
    return run


@pytest.mark.parametrize("pairs", [(), ("cache=2", "feature=0"), ("weighting=min_snr", "task=0.5", "form=spatial")])
def test_a_crashed_run_ends_bit_identical(pairs: tuple, tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, pictures, *pairs)
    straight = run_in(tmp_path / "a", config)
    with crash_before_step(5):
        run_in(tmp_path / "b", config)
    resumed = run_in(tmp_path / "b", config)
    file = "student/unet/diffusion_pytorch_model.safetensors"
    ours, theirs = (load_file(run.path / file) for run in (straight, resumed))
    start = load_file(straight.path / file.replace("student", "start"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert any(not torch.equal(value, start[name]) for name, value in ours.items())


def test_the_student_is_closer_to_its_teacher_than_it_was(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, pictures, "ema=0", "steps=40", "lr=3e-3", "save_every=40")
    run = run_in(tmp_path, config, also=("dense",))
    teacher, start, student, dense = (
        load_backbone(str(path)) for path in (tiny_base, *(run.path / name for name in ("start", "student", "dense")))
    )
    inputs = torch.randn(8, 4, 8, 8), torch.arange(8) * 120, teacher.encode_prompts(["a photo"] * 8)
    with torch.no_grad():
        theirs, before, after, multiplied = (
            one.family.output(one.denoiser, *inputs) for one in (teacher, start, student, dense)
        )
    assert (after - theirs).square().mean() < 0.8 * (before - theirs).square().mean()
    torch.testing.assert_close(multiplied, after, rtol=0, atol=1e-5)
    assert not any(isinstance(module, THIN) for module in dense.denoiser.modules())
    assert dense.ancestors == student.ancestors == (teacher.hash,)
    assert (run.path / "student" / "README.md").read_text().count(str(tiny_base)) >= 1
    assert not (run.path.parent / "latest").exists(), "a student's run has no tuner to sample with"


def test_what_a_student_s_training_cannot_have_is_refused(tiny_base: Path, pictures: Path) -> None:
    refused = {
        "mask=0.5": "the teacher sees all tokens", "cond=canny": "train a tuner on it afterwards",
        "init=x": "starts from its teacher", "method=lora": "all of a student's weights",
        "compile=true": "hides the blocks' outputs", "cache=2": "give feature=0",
        "budget=0.5 prune=small": "each decide", "ratoi=0.4": "unknown",
        "budget=0.5 ratio=0.3": "ratio and budget each",
        "prune=small start=whitened form=spatial": "form and start are about low-rank layers",
    }  # fmt: skip
    for pairs, message in refused.items():
        with pytest.raises(UsageError, match=message):
            settings(tiny_base, pictures, *pairs.split())
    with pytest.raises(UsageError, match="nothing to learn"):
        settings(tiny_base, pictures, "output=0", "feature=0")


def test_a_tuner_of_places_that_a_pruned_student_lacks_is_refused(tmp_path: Path) -> None:
    base = load_backbone("mini")
    pruned, own = made(base, tmp_path / "student", prune="base")
    second, _ = made(pruned, tmp_path / "second", ratio=0.3)
    up, down = (rf"^{side}_blocks\.1\.attentions\.{number}\." for side, number in (("up", 1), ("down", 0)))
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("scedit", {}, "it edits skip 2, "), ("scedit", {"skips": [1, 2]}, "it edits skip 2 of"),
        ("scedit", {"skips": [0, 1]}, ""), ("lora", {"layers": [up]}, r"it edits up_blocks\.1 of"),
        ("lora", {"layers": [down]}, ""),
    ]  # fmt: skip
    for method, config, message in cases:
        tuner = tuner_class(method).build(method_config(method, config), base.denoiser, (), base.vae_scale)
        file = save_tuner(tmp_path / "tuner", tuner, base)
        for student in (pruned, second):
            if message:
                with pytest.raises(SctoolError, match=f"blocks were removed: {message}"):
                    load_tuner(file, student)
            else:
                load_tuner(file, student)
    tuner = tuner_class("scedit").build(method_config("scedit", {}), pruned.denoiser, (), base.vae_scale)
    load_tuner(save_tuner(tmp_path / "own", tuner, pruned), second)
    assert (pruned.student, own.moved) == (own, (base.hash,))


def made(teacher: Backbone, folder: Path, **config: Any) -> tuple[Backbone, Student]:
    """A student of these settings, loaded from its folder."""
    config = config if "prune" in config else {"start": "balanced", **config}
    denoiser, student = make(teacher, StudentConfig(**config))
    return load_backbone(str(save_student(folder, teacher, denoiser, student, ""))), student


# ------------------------------------------------------------------------------------------- the student of a run


def file_of(run: Run, student: str = "student") -> bytes:
    return (run.path / student / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_run_trains_no_student_that_was_made_otherwise(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    run, pairs = Run(tmp_path / "run"), ("ratio=0.5", "lr=1e-3")
    make_only(run, settings(tiny_base, pictures, *pairs), quiet=True)
    before = file_of(run)
    make_only(run, settings(tiny_base, pictures, *pairs), quiet=True)
    assert file_of(run) == before
    for other in ("ratio=0.3", "form=spatial", "start=paper", "untouched=mid_block"):
        with pytest.raises(UsageError, match=r"made with other settings: .*before.*Choose another --name"):
            make_only(run, settings(tiny_base, pictures, *pairs, other), quiet=True)
    with pytest.raises(UsageError, match=r"ratio \(0.5 before, 0.3 now\)"):
        check_run(run, settings(tiny_base, pictures, *pairs, "ratio=0.3"))
    assert file_of(run) == before
    trained = run_in(tmp_path, settings(tiny_base, pictures, *pairs, "steps=2"))
    assert trained.path == run.path
    after = file_of(run)
    assert before != after
    with pytest.raises(UsageError, match="has trained its student"):
        make_only(run, settings(tiny_base, pictures, *pairs), quiet=True)
    assert file_of(run) == after
    with pytest.raises(UsageError, match=r"exists with other settings: distill.ratio \(0.5 before, 0.3 now\)\. Choose"):
        run_in(tmp_path, settings(tiny_base, pictures, *pairs, "ratio=0.3", "steps=2"))


def test_a_run_keeps_to_the_teacher_that_its_student_was_made_of(
    tiny_base: Path, pictures: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny_base, tmp_path / "teacher")
    config, run = settings(teacher, pictures), Run(tmp_path / "run")
    make_only(run, config, quiet=True)
    file = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "conv_in.bias": weights["conv_in.bias"] + 1}, file, {"format": "pt"})
    with pytest.raises(UsageError, match="with other weights than --base"):
        run_in(tmp_path, config)


def test_a_student_goes_back_to_its_first_teacher(tmp_path: Path) -> None:
    base = load_backbone("mini")
    first, _ = made(base, tmp_path / "first", ratio=0.5)
    made(first, tmp_path / "second", ratio=0.2)
    assert first_teacher(str(tmp_path / "second")) == first_teacher(str(tmp_path / "first")) == "mini"
    assert first_teacher("mini") == "mini"
    assert first_teacher(str(tmp_path / "gone")) == str(tmp_path / "gone")
