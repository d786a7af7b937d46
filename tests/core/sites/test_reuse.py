"""Encoder reuse: key steps are plain steps, the others call no module of the encoder, and nothing is left behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sctool.core.backbones.architectures import architecture
from sctool.core.errors import DoesNotFit, SctoolError, UsageError
from sctool.core.fast import KEYS
from sctool.core.fast import STEPS as STEPS_OF_FAST
from sctool.core.measure import without_storage
from sctool.core.sites.attaching import attach, channel, tuned
from sctool.core.sites.parts import family_of
from sctool.core.sites.reuse import Recalled, reusing
from sctool.core.sites.skips import Skip
from sctool.core.tuners import TUNERS, method_config, tuner_class

from ..tiny import dit, unet

SCHEDULERS = (
    DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler,
    HeunDiscreteScheduler,
)  # fmt: skip
STEPS = 6


def randomised(tuner: Any) -> Any:
    """Weights that are not at their start, so that the tuner shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return tuner.eval()


def build(net: nn.Module, method: str, *conditions: str, **settings: Any) -> Any:
    return randomised(tuner_class(method).build(method_config(method, settings), net, conditions))


@torch.no_grad()
def drawn(net: Any, scheduler: Any = None, extra: Any = None, batch: int = 2, calls: int = 1, **kwargs: Any) -> Tensor:
    """A sampling loop with guidance: `batch` latents in `calls` calls a step, as a pipeline makes them."""
    scheduler = scheduler or DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * scheduler.init_noise_sigma
    text = torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(4))
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(latents, t)
        more = extra() if extra else {}
        parts = zip(inputs.chunk(calls), text.chunk(calls), strict=True)
        out = torch.cat([net(x, t, own, return_dict=False, **kwargs, **more)[0] for x, own in parts])
        latents = scheduler.step(out, t, latents, return_dict=False)[0]
    return latents


@contextmanager
def counting(net: Any, *names: str) -> Iterator[Counter[str]]:
    """How often each module of these names is called."""
    counts: Counter[str] = Counter({name: 0 for name in names})

    def count(name: str) -> Any:
        return lambda module, args: counts.update([name])

    handles = [net.get_submodule(name).register_forward_pre_hook(count(name)) for name in names]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


ENCODER = ("down_blocks.0", "down_blocks.0.resnets.0", "down_blocks.1", "mid_block", "mid_block.resnets.0")
DECODER = ("conv_in", "time_embedding", "up_blocks.0", "up_blocks.1", "conv_out")


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_with_all_steps_as_keys_it_is_plain_sampling(kind: Any) -> None:
    net = unet()
    plain = drawn(net, kind())
    with reusing(net, range(100)):
        assert torch.equal(drawn(net, kind()), plain)


@pytest.mark.parametrize("kind", SCHEDULERS[:4])
def test_between_key_steps_no_module_of_the_encoder_is_called(kind: Any) -> None:
    net = unet()
    plain = drawn(net, kind())
    with counting(net, *ENCODER, *DECODER) as counts, reusing(net, (0, 2)):
        reused = drawn(net, kind())
    assert {name: counts[name] for name in ENCODER} == dict.fromkeys(ENCODER, 2)
    assert {name: counts[name] for name in DECODER} == dict.fromkeys(DECODER, STEPS)
    assert not torch.equal(reused, plain)
    assert (reused - plain).abs().mean() < plain.abs().mean(), "near, since features change little"


def test_schedulers_that_repeat_a_timestep_compute_what_they_cannot_reuse() -> None:
    net = unet()
    for kind in (PNDMScheduler, HeunDiscreteScheduler):
        with counting(net, "mid_block", "conv_in") as counts, reusing(net, (0,)):
            assert drawn(net, kind(**({"skip_prk_steps": True} if kind is PNDMScheduler else {}))).isfinite().all()
        assert 1 <= counts["mid_block"] < counts["conv_in"]


def test_reused_features_are_those_of_the_key_step() -> None:
    """By hand: the decoder called with the features of another call, and its own timestep and first convolution."""
    net: Any = unet()
    text, one, two = torch.randn(1, 5, 8), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        emb = net.time_embedding(net.get_time_embed(one, 900))
        x, skips = net.conv_in(one), []
        for block in net.down_blocks:
            more = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
            x, states = block(x, emb, **more)
            skips += states
        x = net.mid_block(x, emb, encoder_hidden_states=text)
        emb, skips = net.time_embedding(net.get_time_embed(two, 700)), [net.conv_in(two), *skips]
        for block in net.up_blocks:
            count = len(block.resnets)
            own, skips = tuple(skips[-count:]), skips[:-count]
            more = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
            x = block(x, own, emb, **more)
        expected = net.conv_out(net.conv_act(net.conv_norm_out(x)))
        with reusing(net, (0,)):
            net(one, 900, text)
            torch.testing.assert_close(net(two, 700, text).sample, expected, rtol=0, atol=0)


def test_a_new_image_begins_with_a_key_step() -> None:
    net = unet()
    with reusing(net, (0, 3)):
        first, second = drawn(net), drawn(net)
        other = drawn(net, batch=4)
    assert torch.equal(first, second)
    with reusing(net, (0, 3)):
        assert torch.equal(drawn(net, batch=4), other)


def test_another_shape_or_gradients_are_computed_in_full() -> None:
    net = unet()
    text = torch.randn(1, 5, 8)
    small, wide = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 16)
    with torch.no_grad():
        plain = net(wide, 800, text).sample
    with reusing(net, (0,)) as reuse:
        with torch.no_grad():
            net(small, 900, text)
            assert torch.equal(net(wide, 800, text).sample, plain)
        latents = small.clone().requires_grad_()
        with counting(net, "mid_block") as counts:
            net(latents, 700, text).sample.sum().backward()
        assert counts["mid_block"] == 1
        assert latents.grad is not None
        assert reuse.step == 1


def test_calls_of_one_step_reuse_their_own_features() -> None:
    """A batch in two calls a step, as for guidance without doubling: equal to the batch in one."""
    net = unet()
    with reusing(net, (0, 2, 3)):
        whole = drawn(net)
        with counting(net, "mid_block") as counts:
            torch.testing.assert_close(drawn(net, calls=2), whole, rtol=1e-3, atol=1e-3)
        assert counts["mid_block"] == 6


# ------------------------------------------------------------------------------------------------------- restoring


def state(net: nn.Module) -> Any:
    """All that could be left changed: modules by name and identity, and hooks."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    return [(name, id(module)) for name, module in net.named_modules()], hooks


def test_the_denoiser_is_itself_again_after_every_call_and_after_the_block() -> None:
    net = unet()
    before, plain = state(net), drawn(net)
    with reusing(net, (0,)):
        drawn(net)
        assert [entry[1] for entry in state(net)[0]] == [entry[1] for entry in before[0]]
        assert not any(isinstance(module, Recalled) for module in net.modules())
    assert state(net) == before
    assert torch.equal(drawn(net), plain)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("inside", [True, False])
def test_also_after_an_exception_within_a_call(kind: type[BaseException], step: int, inside: bool) -> None:
    net: Any = unet()
    before, plain = state(net), drawn(net)
    with reusing(net, (0,)):
        reused = drawn(net)
    calls = iter(range(100))

    def fail(module: nn.Module, args: tuple, kwargs: Any) -> None:
        if next(calls) == step:
            raise kind("stop")

    handle = net.up_blocks[0].register_forward_pre_hook(fail, with_kwargs=True)
    with nullcontext() if inside else pytest.raises(kind), reusing(net, (0,)):
        with pytest.raises(kind) if inside else nullcontext():
            drawn(net)
        assert torch.equal(drawn(net), reused)
    handle.remove()
    assert state(net) == before
    assert torch.equal(drawn(net), plain)


def test_a_step_that_failed_leaves_nothing_to_reuse() -> None:
    net: Any = unet()
    text, one, two = torch.randn(1, 5, 8), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    with torch.no_grad(), reusing(net, (0,)):
        handle = net.mid_block.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            net(one, 900, text)
        handle.remove()
        with counting(net, "mid_block") as counts:
            net(two, 800, text)
        assert counts["mid_block"] == 1


def test_refusals() -> None:
    with pytest.raises(DoesNotFit, match=r"has none.*--scheduler"), reusing(dit(), (0,)):
        pass
    net = unet()
    with pytest.raises(UsageError, match="from 0"), reusing(net, (0, -1)):
        pass
    with reusing(net, (0,)):
        with pytest.raises(SctoolError, match="already"), reusing(net, (0,)):
            pass
        drawn(net)
    compiled = unet()
    compiled.compile()
    for one in (compiled, torch.compile(unet())):
        with pytest.raises(SctoolError, match="compiled"), reusing(one, (0,)):
            pass


# ---------------------------------------------------------------------------------------------------------- tuners


@pytest.mark.parametrize("method", list(TUNERS))
def test_every_method_samples_with_reuse_and_key_steps_are_exact(method: str) -> None:
    net = unet(layers_per_block=2)
    conditions = ("canny",) if TUNERS[method].control != "none" else ()
    tuner = build(net, method, *conditions)
    given: dict[str, Any] = {}
    if conditions:
        given = {"cross_attention_kwargs": channel({"canny": torch.rand(1, 3, 64, 64).round()})}
    base = drawn(net)
    with tuned(net, tuner):
        plain = drawn(net, **given)
        with reusing(net, range(STEPS)):
            assert torch.equal(drawn(net, **given), plain)
        with reusing(net, (0, 2)), counting(net, "mid_block", "conv_out") as counts:
            inner = drawn(net, **given)
        assert (counts["mid_block"], counts["conv_out"]) == (2, STEPS)
    with reusing(net, (0, 2)), tuned(net, tuner):  # the other way round
        assert torch.equal(drawn(net, **given), inner)
    assert not torch.equal(plain, base), "the tuner shows"
    assert torch.equal(drawn(net), base)


@pytest.mark.parametrize("conditions", [(), ("canny",)])
def test_edits_of_skips_are_computed_at_key_steps_and_are_those_of_the_reused_features(
    conditions: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = unet()
    tuner = build(net, "scedit", *conditions)
    hint = torch.rand(1, 3, 64, 64).round()
    given = {"cross_attention_kwargs": channel({"canny": hint})} if conditions else {}
    counts: Counter[int] = Counter()
    tuner.delta, delta = (lambda site, x, call: (counts.update([site.index]), delta(site, x, call))[1]), tuner.delta
    with tuned(net, tuner), reusing(net, (0, 2)):
        reused = drawn(net, **given)
    assert counts == {0: STEPS, 1: 2, 2: 2, 3: 2}, "the first convolution runs at every step"
    monkeypatch.setattr(Skip, "reused", False)  # every step edits the features that are reused
    with tuned(net, tuner), reusing(net, (0, 2)):
        assert torch.equal(drawn(net, **given), reused)
    assert set(counts.values()) == {2 + STEPS, 2 * STEPS}


@pytest.mark.parametrize("method", ["controlnet", "uni-controlnet", "elr"])
def test_a_copied_encoder_runs_at_key_steps_alone(method: str) -> None:
    net = unet(layers_per_block=2)
    tuner = build(net, method, "canny")
    calls, encode = [], tuner.encode
    tuner.encode = lambda *args: (calls.append(1), encode(*args))[1]
    given = {"cross_attention_kwargs": channel({"canny": torch.rand(1, 3, 64, 64).round()})}
    with tuned(net, tuner), reusing(net, (0, 2)):
        drawn(net, **given)
    assert len(calls) == 2


def test_two_hints_in_two_calls_a_step_are_each_reused_in_their_own_call() -> None:
    net = unet()
    tuner = build(net, "scedit", "canny")
    hints = torch.rand(2, 3, 64, 64).round()

    class Split(nn.Module):
        """The denoiser, called for one image at a time."""

        def __call__(self, x: Tensor, t: Any, text: Tensor, **kwargs: Any) -> Any:
            rows = zip(x.split(1), text.split(1), hints.split(1), strict=True)
            parts = [net(a, t, b, cross_attention_kwargs=channel({"canny": h}), **kwargs)[0] for a, b, h in rows]
            return (torch.cat(parts),)

    with tuned(net, tuner), reusing(net, (0, 2)):
        whole = drawn(net, cross_attention_kwargs=channel({"canny": hints}))
        torch.testing.assert_close(drawn(Split()), whole, rtol=1e-3, atol=1e-3)


def test_tasks_of_samples_are_reused_too() -> None:
    net = unet()
    one, two = build(net, "scedit"), build(net, "scedit")
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.mul_(-1)
    with reusing(net, (0, 2)):
        with tuned(net, one):
            alone = drawn(net)
        with tuned(net, one, two, tasks=["a", "b"]):
            mixed = drawn(net, cross_attention_kwargs=channel(None, ["a", "b"]))
    torch.testing.assert_close(mixed[0], alone[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(mixed[1], alone[1])


# ---------------------------------------------------------------------------------- what pipelines pass in themselves


@pytest.mark.parametrize("keys", [(0,), (0, 2)])
def test_a_t2i_adapters_features_are_added_at_key_steps_alone(keys: tuple[int, ...]) -> None:
    """Through the pipelines' argument as by this project's tuner; diffusers adds some of them in place."""
    net = unet()
    tuner = build(net, "t2i-adapter", "canny", start="random")
    hint = torch.rand(1, 3, 64, 64).round()
    [adapter] = tuner.in_diffusers().values()
    with torch.no_grad():
        states = adapter(hint)

    def passed(name: str) -> Any:
        return lambda: {name: [one.clone() for one in states]}

    with reusing(net, keys):
        theirs = drawn(net, extra=passed("down_intrablock_additional_residuals"))
        legacy = drawn(net, extra=passed("down_block_additional_residuals"))
    with tuned(net, tuner), reusing(net, keys):
        ours = drawn(net, cross_attention_kwargs=channel({"canny": hint}))
    assert torch.equal(theirs, legacy)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(theirs, drawn(net, extra=passed("down_intrablock_additional_residuals")))


def test_a_controlnets_residuals_are_added_at_every_step() -> None:
    """By hand: the residuals of the second call are added to the kept features of the first."""
    net: Any = unet()
    text, one, two = torch.randn(1, 5, 8), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)

    def residuals(value: float) -> dict[str, Any]:
        down = [torch.full((1, 1, 1, 1), value)] * 4
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": torch.tensor(value)}

    def seen() -> list[Tensor]:
        skips = [state for call in received for state in call["res_hidden_states_tuple"]]
        return [received[0]["hidden_states"], *skips]

    received: list[dict[str, Any]] = []
    for block in net.up_blocks:
        block.register_forward_pre_hook(lambda module, args, kwargs: received.append(kwargs), with_kwargs=True)
    with torch.no_grad(), reusing(net, (0,)):
        net(one, 900, text, **residuals(0.0))
        plain, received = seen(), []
        net(two, 800, text, **residuals(0.5))
    again = seen()
    fresh = len(plain) - 2  # the first convolution's output, which the last block receives first
    for place, (a, b) in enumerate(zip(again, plain, strict=True)):
        if place != fresh:
            torch.testing.assert_close(a, b + 0.5)
    assert not torch.allclose(again[fresh], plain[fresh] + 0.5)


def test_an_unmodified_pipeline_with_guidance(tiny_base: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipe.set_progress_bar_config(disable=True)
    config = method_config("scedit", {})
    tuner = randomised(tuner_class("scedit").build(config, pipe.unet, ("canny",), pipe.vae_scale_factor))
    given: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent", "height": 32, "width": 32}
    given["cross_attention_kwargs"] = channel({"canny": torch.rand(1, 3, 32, 32).round()})

    def image() -> Tensor:
        return cast(Any, pipe("a cat", generator=torch.Generator().manual_seed(0), **given)).images

    with tuned(pipe.unet, tuner):
        plain = image()
        with reusing(pipe.unet, range(5)):
            assert torch.equal(image(), plain)
        with reusing(pipe.unet, (0, 1)), counting(pipe.unet, "mid_block", "up_blocks.0") as counts:
            image()
    assert counts == {"mid_block": 2, "up_blocks.0": 5}


def test_sdxl() -> None:
    net = UNet2DConditionModel(
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, cross_attention_dim=8, sample_size=8,
        attention_head_dim=4, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=28, transformer_layers_per_block=(1, 2), use_linear_projection=True,
    ).requires_grad_(False).eval()  # fmt: skip
    rows = {"text_embeds": torch.randn(2, 4), "time_ids": torch.rand(2, 6)}
    tuner = build(net, "scedit", "canny")
    hint = channel({"canny": torch.rand(1, 3, 64, 64)})
    given = {"added_cond_kwargs": rows, "cross_attention_kwargs": hint}
    with tuned(net, tuner):
        plain = drawn(net, DPMSolverMultistepScheduler(), **given)
        with reusing(net, range(STEPS)):
            assert torch.equal(drawn(net, DPMSolverMultistepScheduler(), **given), plain)
        with reusing(net, (0, 3)), counting(net, "down_blocks.1", "up_blocks.1") as counts:
            assert not torch.equal(drawn(net, DPMSolverMultistepScheduler(), **given), plain)
    assert counts == {"down_blocks.1": 2, "up_blocks.1": STEPS}


# ----------------------------------------------------------------------------------------------------------- FLOPs


def flops(net: Any, t: int, side: int, hint: Tensor | None = None) -> int:
    rows = family_of(net).dummy_rows(net.config, 1, "cpu")
    given = channel({"canny": hint}) if hint is not None else None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        family_of(net).output(net, torch.empty(1, 4, side, side), cast(Any, t), rows, given)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "side", "conditions", "most"),
    [
        ("sd15", 64, (), 0.68),
        ("sd15", 64, ("canny",), 0.68),
        pytest.param("sd21", 96, ("canny",), 0.68, marks=pytest.mark.slow),
        pytest.param("sdxl", 128, ("canny",), 0.68, marks=pytest.mark.slow),
    ],
)
def test_what_a_step_without_the_encoder_costs(name: str, side: int, conditions: tuple[str, ...], most: float) -> None:
    """In SD 1.5 the decoder's 541.8 of 803.3 GFLOP, and a thousandth for the first convolution and its edit."""
    net: Any = architecture(name).denoiser().requires_grad_(False)
    tuner = tuner_class("scedit").build(method_config("scedit", {}), net, conditions)
    with FakeTensorMode():
        for module in (net, tuner):
            without_storage(module)
        hint = torch.empty(1, 3, 8 * side, 8 * side) if conditions else None
        alone = flops(net, 900, side)
        with tuned(net, tuner):
            _, plain = (flops(net, t, side, hint) for t in (900, 800))
            with reusing(net, (0,)):
                first, second = (flops(net, t, side, hint) for t in (700, 600))
        with reusing(net, (0,)):
            assert flops(net, 900, side) == alone
            decoder = flops(net, 800, side)
    assert alone < first
    assert decoder <= second <= most * alone
    assert second - decoder < 0.005 * alone, "of the tuner only the first skip's edit runs"
    for step, between in ((alone, decoder), (plain, second)):
        assert 50 * step >= 3 * (len(KEYS) * step + (STEPS_OF_FAST - len(KEYS)) * between), "--fast against 50 steps"


def test_a_tuner_may_be_taken_off_between_two_images() -> None:
    net = unet()
    with reusing(net, (0,)):
        plain = drawn(net)
        attachment = attach(net, build(net, "scedit"))
        edited = drawn(net)
        attachment.detach()
        assert torch.equal(drawn(net), plain)
    assert not torch.equal(edited, plain)
    assert not net._forward_pre_hooks
