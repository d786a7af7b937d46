"""Tuners that act together: the rule that lets the strongest speak at each place, against its definition by loops."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sctool.core.errors import UsageError
from sctool.core.sites.attaching import attach, tuned
from sctool.core.sites.composing import AGREE, Part, routed, summed
from sctool.core.sites.routing import EVERY, samples_of
from sctool.core.sites.wiring import Wiring
from sctool.core.tuners import method_config, tuner_class

from ..tiny import dit, unet
from .test_routing import BATCH, LATENTS, STEPS, call, maps, numbers

EXACT = {"rtol": 0, "atol": 1e-12}


def by_loops(deltas: list[Tensor], scales: list[float]) -> Tensor:
    """The definition, for deltas (B, C, h, w) of one sample set: one place after another."""
    out = torch.zeros_like(deltas[0])
    batch, _, height, width = out.shape
    for b in range(batch):
        variances = [[[float(d[b, :, y, z].var(correction=0)) for z in range(width)] for y in range(height)]
                     for d in deltas]  # fmt: skip
        shares = []
        for own in variances:
            whole = sum(map(sum, own))
            shares.append([[value / whole for value in row] for row in own])
        for y, z in itertools.product(range(height), range(width)):
            columns = [d[b, :, y, z] for d in deltas]
            best = max(range(len(deltas)), key=lambda i: shares[i][y][z])
            heard = [
                i
                for i, column in enumerate(columns)
                if i == best or float(torch.corrcoef(torch.stack([column, columns[best]]))[0, 1]) > AGREE
            ]
            out[b, :, y, z] = sum(scales[i] * columns[i] for i in heard) / len(heard)
    return out


def alike(count: int = 3, batch: int = 2) -> list[Tensor]:
    """Deltas of which some agree: a common part of a strength that changes from place to place."""
    common, strength = numbers(batch, 6, 5, 4, seed=90), 3 * numbers(batch, 1, 5, 4, seed=91).relu()
    return [(1 + i) * (numbers(batch, 6, 5, 4, seed=i) + strength * common) for i in range(count)]


def parts(deltas: list[Tensor], scales: list[float]) -> list[Part]:
    return [Part(delta, scale, EVERY) for delta, scale in zip(deltas, scales, strict=True)]


@pytest.mark.parametrize("count", [2, 3])
def test_routing_is_its_definition(count: int) -> None:
    deltas, scales, x = alike(count), [1.0, 0.5, -2.0][:count], numbers(2, 6, 5, 4, seed=50)
    expected = by_loops(deltas, scales)
    torch.testing.assert_close(routed(x, parts(deltas, scales)), x + expected, **EXACT)
    means = [(expected - scales[i] * deltas[i]).abs().amax(1) < 1e-12 for i in range(count)]
    assert all(one.any() for one in means), "each speaks somewhere"
    assert (~torch.stack(means).any(0)).any(), "and somewhere some agree"


def test_a_linear_layer_s_places_are_tokens() -> None:
    deltas, x = alike(3), numbers(2, 6, 5, 4, seed=50)
    tokens = [delta.flatten(2).mT for delta in deltas]
    expected = routed(x, parts(deltas, [1.0] * 3)).flatten(2).mT
    torch.testing.assert_close(routed(x.flatten(2).mT, parts(tokens, [1.0] * 3), True), expected, **EXACT)
    wide = [delta.movedim(1, -1) for delta in deltas]  # (B, h, w, C), still a linear layer's
    found = routed(x.movedim(1, -1), parts(wide, [1.0] * 3), True)
    torch.testing.assert_close(found.flatten(1, 2), expected, **EXACT)


def test_the_order_of_tuners_means_nothing_and_samples_are_alone() -> None:
    deltas, scales, x = [*alike(3), numbers(2, 6, 5, 4, seed=7)], [1.0, 0.5, -2.0, 1.5], numbers(2, 6, 5, 4, seed=50)
    deltas[3][:, :, 0, 0] = deltas[0][:, :, 0, 0] * 0  # no variance at a place
    expected = routed(x, parts(deltas, scales))
    for order in itertools.permutations(range(4)):
        found = routed(x, parts([deltas[i] for i in order], [scales[i] for i in order]))
        torch.testing.assert_close(found, expected, **EXACT)
    deltas[1][1] *= 1000  # another sample's strength
    again = routed(x, parts(deltas, scales))
    torch.testing.assert_close(again[:1], expected[:1], **EXACT)
    torch.testing.assert_close(routed(x[:1], parts([d[:1] for d in deltas], scales)), expected[:1], **EXACT)


def test_a_tuner_s_size_does_not_decide_and_scales_multiply() -> None:
    deltas, x = alike(2), torch.zeros(2, 6, 5, 4, dtype=torch.float64)
    once = routed(x, parts(deltas, [1.0, 1.0]))
    torch.testing.assert_close(routed(x, parts(deltas, [-1.7, -1.7])), -1.7 * once, **EXACT)
    first, second = routed(x, parts(deltas, [1.0, 0.0])), routed(x, parts(deltas, [0.0, 1.0]))
    torch.testing.assert_close(first + second, once, **EXACT)
    torch.testing.assert_close(routed(x, parts(deltas, [2.0, -3.0])), 2 * first - 3 * second, **EXACT)


def test_equal_tuners_are_one_and_silent_ones_say_nothing() -> None:
    [delta], x = alike(1), numbers(2, 6, 5, 4, seed=50)
    torch.testing.assert_close(routed(x, parts([delta, delta], [1.0, 1.0])), x + delta, **EXACT)
    assert torch.equal(routed(x, parts([delta, 0 * delta], [1.0, 1.0])), x + delta)
    assert torch.equal(routed(x, parts([0 * delta, 0 * delta], [1.0, 1.0])), x)
    assert torch.equal(routed(x, []), x)


def test_values_without_places_take_the_mean() -> None:
    deltas, x = [numbers(3, 8, seed=i) for i in range(3)], numbers(3, 8, seed=9)
    mean = (deltas[0] + 2 * deltas[1] + deltas[2]) / 3
    torch.testing.assert_close(routed(x, parts(deltas, [1.0, 2.0, 1.0]), True), x + mean, **EXACT)


def test_one_delta_for_all_samples_is_broadcast() -> None:
    one, other = alike(2)
    x = numbers(2, 6, 5, 4, seed=50)
    expected = routed(x, parts([one[:1].expand_as(x), other], [1.0, 1.0]))
    assert torch.equal(routed(x, parts([one[:1], other], [1.0, 1.0])), expected)


def test_half_precision_decides_in_single() -> None:
    deltas, x = [1e-3 * delta for delta in alike(2)], numbers(2, 6, 5, 4, seed=50)
    half = [delta.to(torch.float16) for delta in deltas]
    found = routed(x.to(torch.float16), parts(half, [1.0, 1.0]))
    assert found.dtype == torch.float16
    expected = routed(x.to(torch.float16).double(), parts([delta.double() for delta in half], [1.0, 1.0]))
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-4)


def test_tuners_of_tasks_meet_only_where_they_share_samples() -> None:
    tasks, x = ("a", "b", None, "a"), numbers(4, 6, 5, 4, seed=50)
    everywhere, mine, theirs = alike(3, 4)
    own, other = (samples_of(name, tasks, 4, x.device) for name in ("a", "b"))
    apart = [Part(own.of(mine), 1.0, own), Part(other.of(theirs), 0.5, other)]
    assert torch.equal(routed(x, apart), summed(x, apart)), "the two never meet"
    found = routed(x, [*apart, Part(everywhere, 1.0, EVERY)])
    for place, task in enumerate(tasks):
        there = {"a": [(mine, 1.0)], "b": [(theirs, 0.5)], None: []}[task]
        those = [Part(d[place : place + 1], s, EVERY) for d, s in [*there, (everywhere, 1.0)]]
        torch.testing.assert_close(found[place : place + 1], routed(x[place : place + 1], those), **EXACT)


# ------------------------------------------------------------------------------------------------ on a denoiser


def made(net: nn.Module, method: str, seed: int, conditions: tuple = (), **settings: Any) -> Any:
    torch.manual_seed(seed)
    one = tuner_class(method).build(method_config(method, settings), net, conditions, 4).double()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return one


KINDS = {
    "SC-Tuners": ("scedit", [(), ()], {}),
    "CSC-Tuners": ("scedit", [("canny",), ("color",)], {}),
    "DiffScaler": ("diffscaler", [(), ()], {"dim": 2}),
    "DiffScaler with conditions": ("diffscaler", [("canny",), ("color",)], {"dim": 2}),
    "LoRAs": ("lora", [(), ()], {"rank": 2}),
    "ControlNets": ("controlnet", [("canny",), ("color",)], {}),
    "T2I-Adapters": ("t2i-adapter", [("canny",), ("color",)], {}),
    "ControlNet-XS": ("controlnet-xs", [("canny",), ("color",)], {}),
}


def hints(names: Any, places: list[int]) -> dict[str, Any]:
    own = {name: maps(len(name))[places] for name in sorted(names)}
    return {"hint": own} if own else {}


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_denoiser_one_is_the_sum_and_a_batch_is_its_samples(kind: str) -> None:
    method, conditions, settings = KINDS[kind]
    net = unet(layers_per_block=2).double() if method == "controlnet-xs" else unet().double()
    tuners = [made(net, method, seed, own, **settings) for seed, own in enumerate(conditions)]
    names, every = {name for own in conditions for name in own}, list(range(BATCH))
    with torch.no_grad():
        for one in tuners:  # alone, exactly the sum
            own = hints(one.conditions, every)
            with tuned(net, one, scales=0.7):
                expected = call(net, **own)
            with tuned(net, one, scales=0.7, compose="routed"):
                assert torch.equal(call(net, **own), expected)
        with tuned(net, *tuners, scales=[1.0, 0.5], compose="routed"):
            together = call(net, **hints(names, every))
            pair = call(net, [1, 4], **hints(names, [1, 4]))
            single = [call(net, [place], **hints(names, [place])) for place in (1, 4)]
        torch.testing.assert_close(pair, torch.cat(single), rtol=0, atol=1e-10)
        torch.testing.assert_close(pair, together[[1, 4]], rtol=0, atol=1e-10)
        with tuned(net, *reversed(tuners), scales=[0.5, 1.0], compose="routed"):
            torch.testing.assert_close(call(net, **hints(names, every)), together, rtol=0, atol=1e-10)
        with tuned(net, *tuners, scales=[1.0, 0.5]):
            assert (call(net, **hints(names, every)) - together).abs().max() > 1e-3


def test_each_skip_is_routed_between_what_the_tuners_add_alone() -> None:
    """alpha is normalised within each tuner: beside others a condition is as strong as alone."""
    net = unet().double()
    tuners = [made(net, "scedit", seed, (name,)) for seed, name in enumerate(("canny", "color"))]
    seen: dict[str, Any] = {}

    def skips(name: str) -> Any:
        def note(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.setdefault(name, kwargs["res_hidden_states_tuple"])

        return note

    def run(name: str, *chosen: Any) -> None:
        with tuned(net, *chosen, compose="routed"):
            handle = net.up_blocks[0].register_forward_pre_hook(skips(name), with_kwargs=True)
            call(net, **hints({one for tuner in chosen for one in tuner.conditions}, list(range(BATCH))))
            handle.remove()

    with torch.no_grad():
        run("base")
        run("canny", tuners[0])
        run("color", tuners[1])
        run("both", *tuners)
    for x, canny, color, both in zip(*(seen[name] for name in ("base", "canny", "color", "both")), strict=True):
        torch.testing.assert_close(both - x, by_loops([canny - x, color - x], [1.0, 1.0]), rtol=0, atol=1e-10)


def test_a_transformer_is_routed_by_token() -> None:
    net = dit(tied=True).double()
    tuners = [made(net, "diffscaler", seed, dim=2) for seed in range(2)]
    labels = torch.tensor([0, 1, 2, 3, 0, 1])

    def out(places: list[int]) -> Tensor:
        with torch.no_grad(), tuned(net, *tuners, compose="routed"):
            return net(LATENTS[places], STEPS[places], labels[places], return_dict=False)[0]

    torch.testing.assert_close(out([0, 3]), torch.cat([out([0]), out([3])]), rtol=0, atol=1e-10)


def test_the_rule_is_taken_back_and_copied_and_nested() -> None:
    net = unet().double()
    first, second, third = (made(net, "scedit", seed) for seed in range(3))
    with torch.no_grad():
        with tuned(net, first, second):
            added = call(net)
        with tuned(net, first, second, compose="routed"):
            strongest = call(net)
            assert torch.equal(call(copy.deepcopy(net)), strongest)
        outer = attach(net, first)
        with tuned(net, second, compose="routed"):
            torch.testing.assert_close(call(net), strongest)
            with tuned(net, third):  # says nothing, so the rule stays
                wiring = Wiring.of(net)
                assert wiring is not None
                assert wiring.compose == "routed"
        with tuned(net, second):
            torch.testing.assert_close(call(net), added)
        outer.detach()


def test_routed_tuners_learn() -> None:
    net = unet().double()
    tuners = [made(net, "scedit", seed) for seed in range(2)]
    with tuned(net, *tuners, compose="routed"):
        loss = call(net).square().mean()
    for one in tuners:
        for gradient in torch.autograd.grad(loss, list(one.parameters()), retain_graph=True):
            assert gradient.isfinite().all()
            assert gradient.abs().max() > 0


def test_what_cannot_be_routed_is_refused_and_nothing_attached() -> None:
    net = unet()
    with pytest.raises(UsageError, match="Did you mean 'routed'"):
        attach(net, made(net, "scedit", 0), compose="route")
    full = tuner_class("bitfit").build(method_config("bitfit", {}), net, (), 4)
    with pytest.raises(UsageError, match="bitfit changes the denoiser itself"):
        attach(net, made(net, "scedit", 0), full, compose="routed")
    assert not net._forward_pre_hooks
