"""One batch for several tasks: it equals separate calls, in values and gradients, whatever the sites."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from sctool.core.errors import SctoolError, UsageError
from sctool.core.resolving import Config
from sctool.core.sites.attaching import TunedBackbone, attach, tuned
from sctool.core.sites.layers import layers
from sctool.core.sites.parts import family_of
from sctool.core.sites.routing import EVERY, samples_of
from sctool.core.sites.skips import middle
from sctool.core.sites.wiring import Wiring
from sctool.core.tuners.base import SiteTuner
from sctool.core.tuners.configs import FullConfig, SCEditConfig
from sctool.core.tuners.full import Full
from sctool.core.tuners.scedit import SCEdit

from ..tiny import unet

BATCH = 6
EXACT = {"rtol": 1e-12, "atol": 1e-12}
MIXED = ["a", "b", None, "a", "b", "b"]
SORTED = ["a", "a", "b", "b", "b", None]


class NoSettings(Config):
    """None."""


class LowRank(SiteTuner):
    """y + U relu(D x) on the cross-attention's layers, which see samples, tokens and text."""

    method = "low-rank"

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(NoSettings(), layers(denoiser, r"attn2\.to_"))
        self.down = nn.ModuleList(nn.Linear(site.inputs, 2, bias=False) for site in self.sites)
        self.up = nn.ModuleList(nn.Linear(2, site.outputs, bias=False) for site in self.sites)

    def delta(self, site: Any, x: torch.Tensor, call: Any) -> torch.Tensor:
        number = self.sites.index(site)
        return self.up[number](self.down[number](call.given).relu())


class Reading(SiteTuner):
    """Timestep, text, latents and hint of each sample, added at the middle block."""

    method = "reading"
    reads_inputs = True

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(NoSettings(), [middle(denoiser)], ("canny",), 4)
        self.weight = nn.Parameter(torch.ones(()))

    def encode(self, hints: Any, inputs: Any = None) -> Any:
        own = inputs.conditioning["encoder_hidden_states"].mean((1, 2)) + inputs.latents.mean((1, 2, 3))
        return {name: inputs.timestep / 1000 + own + hint.mean((1, 2, 3)) for name, hint in hints.items()}

    def delta(self, site: Any, x: torch.Tensor, call: Any) -> torch.Tensor | None:
        if not call.features:
            return None
        return (self.weight * call.features["canny"])[:, None, None, None].expand_as(x)


def shaken(tuner: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.normal_(0, 0.3)
    return tuner.double()


def scedit(net: nn.Module, *conditions: str, seed: int = 0, **settings: Any) -> SCEdit:
    return shaken(SCEdit(SCEditConfig(**settings), net, conditions, 4), seed)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LATENTS, TEXT = numbers(BATCH, 4, 8, 8), numbers(BATCH, 3, 8, seed=1)
STEPS = torch.tensor([3, 700, 10, 44, 999, 500])


def maps(seed: int = 0, batch: int = BATCH) -> torch.Tensor:
    return numbers(batch, 3, 32, 32, seed=seed).sigmoid()


def call(net: Any, places: list[int] | None = None, **channel: Any) -> torch.Tensor:
    """The output (6, 4, 8, 8), or that of some places alone."""
    places = list(range(BATCH)) if places is None else places
    kwargs = {"cross_attention_kwargs": channel} if channel else {}
    return net(LATENTS[places], STEPS[places], TEXT[places], return_dict=False, **kwargs)[0]


def tuners_of(kind: str, net: nn.Module) -> tuple[Any, Any]:
    """Two tuners of a kind with different weights."""
    made = {
        "skips": lambda seed: scedit(net, seed=seed),
        "hints": lambda seed: scedit(net, "canny", seed=seed),
        "layers": lambda seed: shaken(LowRank(net), seed),
        "inputs": lambda seed: shaken(Reading(net), seed),
    }[kind]
    return made(1), made(2)


def gradients(tuner: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(tuner.parameters()), retain_graph=True, allow_unused=True))


@pytest.mark.parametrize("tasks", [MIXED, SORTED], ids=["scattered", "contiguous"])
@pytest.mark.parametrize("kind", ["skips", "hints", "layers", "inputs"])
def test_a_mixed_batch_equals_separate_calls(kind: str, tasks: list[str | None]) -> None:
    net = unet().double()
    tuners = dict(zip("ab", tuners_of(kind, net), strict=True))
    hint = maps()
    given = {"hint": {"canny": hint}} if kind in ("hints", "inputs") else {}
    with tuned(net, *tuners.values(), tasks=list(tuners)):
        mixed = call(net, task=tasks, **given)
    base = call(net)
    for task in (*tuners, None):
        places = [i for i, name in enumerate(tasks) if name == task]
        if task is None:
            torch.testing.assert_close(mixed[places], base[places], **EXACT)
            continue
        own = {"hint": {"canny": hint[places]}} if given else {}
        with tuned(net, tuners[task]):
            alone = call(net, places, **own)
        assert not torch.allclose(alone, base[places])
        torch.testing.assert_close(mixed[places], alone, **EXACT)
        together = gradients(tuners[task], mixed[places].square().sum())
        separate = gradients(tuners[task], alone.square().sum())
        for one, other in zip(together, separate, strict=True):
            torch.testing.assert_close(one, other, **EXACT)
        others = gradients(tuners[task], mixed[[i for i in range(BATCH) if i not in places]].square().sum())
        assert not any(gradient is not None and gradient.any() for gradient in others)


def test_tuners_without_a_task_act_on_all_samples() -> None:
    net = unet().double()
    named, unnamed = tuners_of("skips", net)
    with tuned(net, named, unnamed, tasks=["a", None]):
        mixed, every = call(net, task=["a"] * 3 + [None] * 3), call(net)
    with tuned(net, named, unnamed):
        both = call(net)
    with tuned(net, unnamed):
        one = call(net)
    torch.testing.assert_close(mixed, torch.cat([both[:3], one[3:]]), **EXACT)
    torch.testing.assert_close(every, both, rtol=0, atol=0)


def test_two_tuners_of_one_task_act_together_with_their_scales() -> None:
    net = unet().double()
    first, second = tuners_of("layers", net)
    with tuned(net, first, second, scales=[0.5, 2.0], tasks=["a", "a"]):
        mixed = call(net, task=["a", None])
    with tuned(net, first, second, scales=[0.5, 2.0]):
        both = call(net)
    torch.testing.assert_close(mixed[::2], both[::2], **EXACT)
    torch.testing.assert_close(mixed[1::2], call(net)[1::2], **EXACT)


def test_guidance_repeats_tasks_and_hints_alike() -> None:
    net = unet().double()
    a, b = tuners_of("hints", net)
    with torch.no_grad(), tuned(net, a, b, tasks=["a", "b"]):
        once = call(net, task=["a", "b", None] * 2, hint={"canny": maps(batch=3).repeat(2, 1, 1, 1)})
        for channel in (
            {"task": ["a", "b", None], "hint": {"canny": maps(batch=3)}},
            {"task": ["a", "b", None] * 2, "hint": {"canny": maps(batch=3)}},
            {"task": ["a", "b", None], "hint": {"canny": maps(batch=3).repeat(2, 1, 1, 1)}},
        ):
            torch.testing.assert_close(call(net, **channel), once, **EXACT)
        shared = call(net, task=["a", "b"], hint={"canny": maps(batch=1)})
        torch.testing.assert_close(
            shared, call(net, task=["a", "b"] * 3, hint={"canny": maps(batch=1).expand(6, -1, -1, -1)}), **EXACT
        )


def test_each_task_has_conditions_of_its_own_and_weights_that_sum_to_one() -> None:
    net = unet().double()
    a = scedit(net, "canny", "color", seed=1, weights={"canny": 3.0, "color": 1.0})
    b = scedit(net, "canny", seed=2, weights={"canny": 5.0})
    canny, color = maps(1), maps(2)
    color[3:] = 0  # b has no such condition
    with tuned(net, a, b, tasks=["a", "b"]):
        mixed = call(net, task=["a"] * 3 + ["b"] * 3, hint={"canny": canny, "color": color})
    with tuned(net, a):
        torch.testing.assert_close(mixed[:3], call(net, hint={"canny": canny, "color": color})[:3], **EXACT)
    with tuned(net, b):
        torch.testing.assert_close(mixed[3:], call(net, hint={"canny": canny})[3:], **EXACT)


def test_hints_are_encoded_once_for_each_division_into_tasks() -> None:
    net = unet().double()
    a, b = tuners_of("hints", net)
    hint = {"canny": maps()}
    with torch.no_grad(), tuned(net, a, b, tasks=["a", "b"]):
        wiring: Any = Wiring.of(net)
        counts, outs = [0], []
        for tasks in (MIXED, MIXED, SORTED, ["b"], None, MIXED):
            outs.append(call(net, hint=hint, **({"task": tasks} if tasks else {})))
            counts.append(wiring.encodings)
        assert [after - before for before, after in pairwise(counts)] == [1, 0, 1, 1, 1, 0]
        torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
        torch.testing.assert_close(outs[0], outs[5], rtol=0, atol=0)
    for tasks, out in ((MIXED, outs[0]), (SORTED, outs[2]), (["b"] * BATCH, outs[3])):
        for task, tuner in (("a", a), ("b", b)):
            places = [i for i, name in enumerate(tasks) if name == task]
            with torch.no_grad(), tuned(net, tuner):
                torch.testing.assert_close(out[places], call(net, hint=hint)[places], **EXACT)


def test_an_old_task_is_the_same_bit_for_bit_when_another_is_attached() -> None:
    net = unet()
    old, new = (SCEdit(SCEditConfig(), net, (), 4) for _ in range(2))
    for seed, tuner in enumerate((old, new)):
        shaken(tuner, seed).float()

    def drawn(*tuners: Any) -> torch.Tensor:
        with torch.no_grad(), tuned(net, *tuners, tasks=["old", "new"][: len(tuners)]):
            return net(
                LATENTS.float(), STEPS, TEXT.float(), return_dict=False, cross_attention_kwargs={"task": ["old"] * 6}
            )[0]

    plain = drawn(old)
    assert torch.equal(plain, drawn(old, new))
    with torch.no_grad(), tuned(net, old):
        assert torch.equal(plain, net(LATENTS.float(), STEPS, TEXT.float(), return_dict=False)[0])


def test_contiguous_samples_are_views() -> None:
    x = torch.zeros(6, 2)
    few = samples_of("b", tuple(SORTED), 6, x.device)
    assert few.of(x).data_ptr() == x[2:].data_ptr()
    assert few.count == 3
    scattered = samples_of("b", tuple(MIXED), 6, x.device)
    assert scattered.of(torch.arange(6)).tolist() == [1, 4, 5]
    assert EVERY.of(x) is x
    assert samples_of("a", ("a",), 6, x.device).of(x) is x
    assert samples_of("z", ("a",), 6, x.device).count == 0


def test_the_unedited_value_is_not_written_to() -> None:
    x = torch.zeros(6, 2)
    some = samples_of("b", tuple(SORTED), 6, x.device)
    first = some.added(x, torch.ones(3, 2), x)
    assert not x.any()
    assert some.added(first, torch.ones(1, 2), x)[:, 0].tolist() == [0, 0, 2, 2, 2, 0]


# ------------------------------------------------------------------------------------------------------- new classes


def dit() -> Any:
    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=5,
    )  # fmt: skip
    return shaken(net, 3).requires_grad_(False).eval()


class Nothing(SiteTuner):
    """A method without sites; its new classes are all it has."""

    method = "nothing"

    def __init__(self, config: Any, denoiser: nn.Module, conditions: Any = (), vae_scale: int = 8) -> None:
        super().__init__(config, [], conditions, vae_scale)


def with_classes(net: nn.Module, *classes: str, seed: int) -> Any:
    return shaken(Nothing.build(NoSettings(), net, (), 4, classes), seed)


def labelled(net: Any, ids: list[int], places: list[int], **channel: Any) -> torch.Tensor:
    rows = {"label": torch.tensor(ids)}
    return family_of(net).output(net, LATENTS[places], STEPS[places], rows, channel or None)


def test_new_classes_of_several_tasks_share_a_batch_and_the_ids_after_the_table() -> None:
    net = dit()
    tuners = {"a": with_classes(net, "hat", seed=1), "b": with_classes(net, "cup", "dog", seed=2)}
    ids, tasks, places = [6, 6, 7, 2, 6, 5], ["a", "b", "b", "a", None, "b"], list(range(6))
    with tuned(net, *tuners.values(), tasks=["a", "b"]):
        mixed = labelled(net, ids, places, task=tasks)
    null = labelled(net, [5] * 6, places)
    torch.testing.assert_close(mixed[4:], null[4:], **EXACT)
    for task, tuner in tuners.items():
        own = [i for i in places if tasks[i] == task]
        with tuned(net, tuner):
            alone = labelled(net, [ids[i] for i in own], own)
        torch.testing.assert_close(mixed[own], alone, **EXACT)
        for one, other in zip(
            gradients(tuner, mixed[own].square().sum()), gradients(tuner, alone.square().sum()), strict=True
        ):
            assert one.any()
            torch.testing.assert_close(one, other, **EXACT)


def test_two_tuners_with_classes_need_tasks() -> None:
    net = dit()
    a, b = with_classes(net, "hat", seed=1), with_classes(net, "cup", seed=2)
    for tasks, channel in (([None, None], {}), (["a", "b"], {}), (["a", None], {"task": ["a"]}), (["a", "a"], {})):
        with tuned(net, a, b, tasks=tasks), pytest.raises(UsageError, match="two tuners add classes"):
            labelled(net, [6], [0], **channel)
    with tuned(net, a, b, scales=[1.0, 0.0]):
        labelled(net, [6], [0])
    with tuned(net, a, b, tasks=["a", None]):
        labelled(net, [6], [0], task=[None])


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        (["flowres"] * 6, "Did you mean 'flowers'"), (["flowers"] * 4, "4 task names for 6 latents"),
        ([], "0 task names for 6"), ("flowers", "pass a list"), ([3] * 6, "unknown task '3'"),
        (["flowers"] * 12, "12 task names for 6"),
    ],
)  # fmt: skip
def test_wrong_tasks_are_refused(tasks: Any, reason: str) -> None:
    net = unet().double()
    with tuned(net, scedit(net), tasks=["flowers"]), pytest.raises(UsageError, match=reason):
        call(net, task=tasks)
    with tuned(net, scedit(net)), pytest.raises(UsageError, match="none, no tuner was attached with a task"):
        call(net, task=["flowers"])


def test_hints_that_do_not_fit_are_still_refused() -> None:
    net = unet().double()
    with tuned(net, scedit(net, "canny"), tasks=["a"]):
        for hint, reason in ((maps(batch=4), "4 maps for 6 latents"), (maps()[..., :16], "resize the hint")):
            with pytest.raises(UsageError, match=reason):
                call(net, task=["a", None], hint={"canny": hint})


def test_a_task_and_its_tuner_must_match_in_number_and_kind() -> None:
    net = unet().double()
    with pytest.raises(UsageError, match="1 tasks for 2 tuners"):
        attach(net, *tuners_of("skips", net), tasks=["a"])
    with pytest.raises(UsageError, match="method full changes the denoiser for a whole batch"):
        attach(net, scedit(net), Full(FullConfig(), net), tasks=["a", "b"])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def test_a_site_whose_first_dimension_is_not_the_batch_is_an_error() -> None:
    class AtTheWeights(SiteTuner):
        method = "odd"

        def delta(self, site: Any, x: torch.Tensor, call: Any) -> torch.Tensor:
            return x

    net = unet().double()
    tuner = AtTheWeights(NoSettings(), layers(net, "^time_embedding.linear_1$"))
    with tuned(net, tuner, tasks=["a"]):
        call(net, task=["a"])  # all samples: nothing is taken apart
        net.time_proj.register_forward_hook(lambda module, args, output: output[:1])
        with pytest.raises(SctoolError, match=r"task 'a' cannot act on a value of shape \(1, 32\)"):
            call(net, task=["a", None])


def test_the_training_model_passes_tasks_on() -> None:
    net = unet().double()
    a, b = tuners_of("hints", net)
    model = TunedBackbone(net, a, b, tasks=["a", "b"])
    out = model(LATENTS, STEPS, {"prompt_embeds": TEXT}, {"canny": maps()}, tasks=MIXED)
    torch.testing.assert_close(out, call(net, task=MIXED, hint={"canny": maps()}), rtol=0, atol=0)
    assert not torch.equal(out, model(LATENTS, STEPS, {"prompt_embeds": TEXT}, {"canny": maps()}))


@pytest.mark.slow
def test_a_mixed_batch_compiles() -> None:
    net = unet(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None
    ).double()
    a, b = tuners_of("hints", net)
    model = TunedBackbone(net, a, b, tasks=["a", "b"])
    arguments = (LATENTS, STEPS, {"prompt_embeds": TEXT}, {"canny": maps()}, None)
    for tasks in (MIXED, SORTED):
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend="aot_eager")
        expected, out = model(*arguments, tasks), compiled(*arguments, tasks)
        torch.testing.assert_close(out, expected)
        for one, other in zip(gradients(a, out.square().sum()), gradients(a, expected.square().sum()), strict=True):
            torch.testing.assert_close(one, other)
    torch._dynamo.reset()
