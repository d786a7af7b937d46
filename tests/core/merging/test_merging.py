"""Merged tuners: what one adds is what all add together, in float64; what a base holds is what the tuner did."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils
from torch import Tensor, nn

from sctool.core.errors import DoesNotFit, UsageError
from sctool.core.merging import low_rank
from sctool.core.merging.affiners import tidied
from sctool.core.merging.low_rank import SEED
from sctool.core.merging.table import PRUNING, RULES, find_rule, merged
from sctool.core.sites.attaching import channel, tuned
from sctool.core.sites.parts import family_of
from sctool.core.tuners import TUNERS, method_config, tuner_class

from ..tiny import dit, unet

HINTS = ("canny", "color", "depth")


def tuner(net: nn.Module, method: str, seed: int, conditions: tuple = (), classes: tuple = (), **settings: Any) -> Any:
    """A tuner with random weights, in float64 as the net."""
    torch.manual_seed(seed)
    own = tuner_class(method).build(method_config(method, settings), net, conditions, 4, classes).double()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return own


def wide(make: Any) -> Any:
    return make().double()


def tied() -> nn.Module:
    return dit(tied=True)


def output(net: nn.Module, tuners: list, weights: list, hints: tuple = (), labels: tuple = (0, 1, 2, 3)) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(4, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(4, 3, 8, generator=generator, dtype=torch.float64)
    maps = {name: torch.rand(4, 3, 32, 32, generator=generator, dtype=torch.float64) for name in HINTS}
    family = family_of(net)
    rows = {"label": torch.tensor(labels)} if family.by_class else {"prompt_embeds": text}
    shown = channel({name: maps[name] for name in hints} or None)
    with torch.no_grad(), tuned(net, *tuners, scales=weights):
        return family.output(net, latents, torch.tensor([3, 70, 500, 999]), rows, shown)


CASES = {
    "SC-Tuners of unequal widths": (unet, "scedit", [{"ratio": 0.5}, {"ratio": 1.0}, {"ratio": 0.25}]),
    "SC-Tuners of unequal skips": (unet, "scedit", [{"skips": [0, 2]}, {"skips": [2, 3], "ratio": 0.5}]),
    "SC-Tuners, conv": (unet, "scedit", [{"operator": "conv", "ratio": 4.0}, {"operator": "conv", "ratio": 2.0}]),
    "one SC-Tuner, resprefix": (unet, "scedit", [{"operator": "resprefix", "ratio": 4.0}]),
    "CSC-Tuners": (unet, "scedit", [{"cond": ("canny",)}, {"cond": ("color", "depth"), "weights": {"color": 3.0}}]),
    "CSC-Tuners, heads, not normalised": (
        unet, "scedit",
        [{"cond": (name,), "cascade": "zero-heads", "normalize": False} for name in ("canny", "color")],
    ),
    "SC- and CSC-Tuners": (unet, "scedit", [{"ratio": 0.5}, {"cond": ("canny",), "skips": [1, 3]}, {"skips": [0]}]),
    "DiffScaler of unequal widths": (unet, "diffscaler", [{"dim": 3}, {"dim": 5, "gate": False}, {"dim": 2}]),
    "DiffScaler on unequal layers": (
        unet, "diffscaler", [{"dim": 3}, {"dim": 2, "layers": ["up_blocks", "mid_block"], "branch_bias": True}]
    ),
    "DiffScaler, parts of it": (
        unet, "diffscaler",
        [{"dim": 0, "shift": "none"}, {"dim": 2, "scale": False, "shift": "biased"}, {"dim": 0, "scale": False}],
    ),
    "DiffScaler with conditions": (
        unet, "diffscaler", [{"dim": 3, "cond": ("canny",)}, {"dim": 2}, {"dim": 4, "cond": ("color", "depth")}]
    ),
    "DiffScaler on a transformer": (tied, "diffscaler", [{"dim": 3}, {"dim": 2}]),
    "DiffScaler, grouped and separate": (tied, "diffscaler", [{"dim": 3}, {"dim": 2, "qkv": "separate"}]),
    "LoRAs of unequal ranks": (unet, "lora", [{"rank": 2}, {"rank": 3, "alpha": 8.0}, {"rank": 1}]),
    "LoRAs on unequal layers": (unet, "lora", [{"rank": 2}, {"rank": 3, "layers": ["up_blocks"], "alpha": 1.0}]),
    "LoRAs on a transformer": (tied, "lora", [{"rank": 2}, {"rank": 2}]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_exact_rules_add_what_all_add(case: str) -> None:
    make, method, settings = CASES[case]
    net = wide(make)
    tuners = [tuner(net, method, seed, **_split(own)) for seed, own in enumerate(settings)]
    _, rule = find_rule(method)
    assert rule.exact
    conditions = [name for one in tuners for name in one.conditions]
    shown = [(), *((name,) for name in conditions), tuple(conditions)] if conditions else [()]
    for weights in ([0.7, -0.4, 1.5][: len(tuners)], [1.0] * len(tuners)):
        whole = merged(tuners, weights, net, rule).double()
        for hints in shown:
            together = output(net, tuners, weights, hints)
            torch.testing.assert_close(output(net, [whole], [1.0], hints), together, rtol=0, atol=1e-6)
            if hints == shown[-1]:
                assert (together - output(net, [], [])).abs().max() > 0.01
    if len(tuners) > 1 and not conditions:  # what was merged can be merged again
        again = merged([whole, tuners[0]], [0.5, 0.25], net, rule).double()
        together = output(net, [whole, tuners[0]], [0.5, 0.25])
        torch.testing.assert_close(output(net, [again], [1.0]), together, rtol=0, atol=1e-6)


def _split(settings: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in settings.items() if key != "cond"}
    return {"conditions": settings.get("cond", ()), **rest}


def test_a_rescaled_tuner_is_the_tuner_at_that_scale() -> None:
    for make, method in itertools.product((unet, tied), ("diffscaler", "lora")):
        net = wide(make)
        one = tuner(net, method, 1)
        weaker = merged([one], [0.3], net, find_rule(method)[1]).double()
        torch.testing.assert_close(output(net, [weaker], [1.0]), output(net, [one], [0.3]), rtol=0, atol=1e-6)


def test_one_hot_weights_give_back_one_tuner_and_no_dead_units() -> None:
    net = wide(unet)
    tuners = [tuner(net, "diffscaler", seed, dim=dim) for seed, dim in enumerate((3, 5))]
    first = merged(tuners, [1.0, 0.0], net, find_rule("diffscaler")[1]).double()
    assert set(first.dims.values()) == {3}
    torch.testing.assert_close(output(net, [first], [1.0]), output(net, tuners[:1], [1.0]), rtol=0, atol=1e-6)


def test_parallel_units_become_one_and_equal_ones_cancel() -> None:
    net: Any = wide(unet)
    one = tuner(net, "diffscaler", 0, dim=3)
    rule = find_rule("diffscaler")[1]
    twice = merged([one, one], [0.25, 0.5], net, rule).double()
    assert set(twice.dims.values()) == {3}
    torch.testing.assert_close(output(net, [twice], [1.0]), output(net, [one], [0.75]), rtol=0, atol=1e-6)
    nothing = merged([one, one], [1.0, -1.0], net, rule).double()
    torch.testing.assert_close(output(net, [nothing], [1.0]), output(net, [], []), rtol=0, atol=1e-6)
    with torch.no_grad():  # a unit that is twice another, and one that points the other way
        for branch in one.branches.values():
            branch.down[1] = 2 * branch.down[0]
            branch.down[2] = -branch.down[0]
    small = tidied(one, net).double()
    assert set(small.dims.values()) == {2}
    torch.testing.assert_close(output(net, [small], [1.0]), output(net, [one], [1.0]), rtol=0, atol=1e-6)


def test_new_classes_come_along_with_their_weight() -> None:
    net = wide(tied)
    plain, adding = tuner(net, "diffscaler", 0, dim=2), tuner(net, "diffscaler", 1, classes=("cat", "dog"), dim=2)
    rule = find_rule("diffscaler")[1]
    whole = merged([plain, adding], [0.5, 0.25], net, rule).double()
    assert whole.classes == ("cat", "dog")
    labels = (1, 3, 4, 5)
    expected = output(net, [plain, adding], [0.5, 0.25], labels=labels)
    torch.testing.assert_close(output(net, [whole], [1.0], labels=labels), expected, rtol=0, atol=1e-6)
    with pytest.raises(DoesNotFit, match="could mean either's"):
        merged([adding, tuner(net, "diffscaler", 2, classes=("hat",), dim=2)], [1.0, 1.0], net, rule)


# ------------------------------------------------------------------------------------------------ peft's rules


def update(one: Any, site: Any) -> Tensor:
    """The whole change of a linear layer's weight."""
    layer = one.adapted[site]
    return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


def test_svd_is_the_best_approximation_of_the_sum() -> None:
    net = wide(unet)
    tuners, weights = [tuner(net, "lora", seed, rank=rank) for seed, rank in enumerate((2, 3))], [0.7, -0.4]
    rule = find_rule("lora", "svd")[1]
    whole: list[Any] = [merged(tuners, weights, net, rule, rank=rank) for rank in (2, 5)]
    small, full = whole
    for site in small.adapted:
        total = sum(weight * update(one, site) for one, weight in zip(tuners, weights, strict=True)).detach()
        values = torch.linalg.svdvals(total)
        left = torch.linalg.norm(total - update(small, site).detach())
        torch.testing.assert_close(left, values[2:].norm(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(update(full, site).detach().double(), total, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", low_rank.PEFT)
def test_a_rule_of_peft_s_is_what_its_own_model_does(name: str) -> None:
    net = wide(unet).float()
    tuners = [tuner(net, "lora", seed, rank=2, alpha=3.0).float() for seed in (0, 1)]
    options: dict[str, Any] = {"density": 0.5} if name.startswith(PRUNING) else {}
    ours: Any = merged(tuners, [0.7, 0.4], net, find_rule("lora", name)[1], **options)
    names = [site.name for site in tuners[0].adapted]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=names)
    model: Any = get_peft_model(copy.deepcopy(net), config, adapter_name="0")  # type: ignore[arg-type]
    model.add_adapter("1", config)
    for number, one in enumerate(tuners):
        for site, layer in one.adapted.items():
            theirs = model.get_base_model().get_submodule(site.name)
            theirs.lora_A[str(number)].weight.data.copy_(layer.lora_A["default"].weight)
            theirs.lora_B[str(number)].weight.data.copy_(layer.lora_B["default"].weight)
    torch.manual_seed(low_rank.SEED)
    model.add_weighted_adapter(["0", "1"], [0.7, 0.4], "merged", combination_type=name, **options)
    for site in ours.adapted:
        layer = model.get_base_model().get_submodule(site.name)
        theirs = layer.scaling["merged"] * layer.lora_B["merged"].weight @ layer.lora_A["merged"].weight
        torch.testing.assert_close(update(ours, site), theirs, rtol=1e-4, atol=1e-5)


def test_what_peft_refuses_is_said_with_the_exact_rule() -> None:
    net = wide(unet)
    tuners = [tuner(net, "lora", seed, rank=rank) for seed, rank in enumerate((2, 3))]
    with pytest.raises(DoesNotFit, match="--rule cat merges exactly"):
        merged(tuners, [1.0, 1.0], net, find_rule("lora", "linear")[1])
    with pytest.raises(UsageError, match="--density"):
        merged(tuners, [1.0, 1.0], net, find_rule("lora", "ties_svd")[1])
    with pytest.raises(UsageError, match="--rank has no meaning"):
        merged(tuners, [1.0, 1.0], net, find_rule("lora")[1], rank=3)


def test_dare_draws_the_same_weights_every_time() -> None:
    net = wide(unet)
    tuners = [tuner(net, "lora", seed, rank=2) for seed in (0, 1)]
    rule = find_rule("lora", "dare_linear")[1]
    first, second = (merged(tuners, [1.0, 1.0], net, rule, density=0.5) for _ in range(2))
    for own, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(own, theirs)


@pytest.mark.parametrize("method", ["full", "bitfit", "difffit"])
def test_weights_are_the_base_s_plus_the_differences(method: str) -> None:
    net = wide(unet)
    tuners = [tuner(net, method, seed) for seed in (0, 1)]
    rule = find_rule(method)[1]
    assert rule.exact
    assert not rule.additive
    whole = merged(tuners, [0.7, -0.4], net, rule)
    theirs = dict(net.named_parameters())
    for name, own in whole.named_parameters():
        start = theirs[name] if name in theirs else torch.ones_like(own)
        changes = [one.get_parameter(name) - start for one in tuners]
        expected = start + 0.7 * changes[0] - 0.4 * changes[1]
        torch.testing.assert_close(own.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["full", "bitfit", "difffit"])
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("ties", merge_utils.ties),
        ("dare_linear", merge_utils.dare_linear),
        ("dare_ties", merge_utils.dare_ties),
        ("magnitude_prune", merge_utils.magnitude_prune),
    ],
)
def test_a_rule_of_differences_is_peft_s_function_on_them(method: str, name: str, function: Any) -> None:
    net = wide(unet)
    tuners = [tuner(net, method, seed) for seed in (0, 1)]
    whole = merged(tuners, [0.7, 0.4], net, find_rule(method, name)[1], density=0.5)
    theirs = dict(net.named_parameters())
    torch.manual_seed(SEED)
    for key, own in whole.named_parameters():
        start = (theirs[key] if key in theirs else torch.ones_like(own)).detach().float()
        changes = [one.get_parameter(key).detach() - start for one in tuners]
        expected = start + function(changes, torch.tensor([0.7, 0.4], dtype=own.dtype), density=0.5)
        torch.testing.assert_close(own.detach(), expected.to(own.dtype), rtol=0, atol=1e-5)
        assert not torch.equal(own.detach(), start.to(own.dtype))


# -------------------------------------------------------------------------------------------------- what is refused


def test_what_one_file_cannot_hold_is_refused() -> None:
    net = wide(unet)
    rule = find_rule("scedit")[1]
    refused = [
        ([{"operator": "resprefix", "ratio": 4.0}] * 2, "softmax"),
        ([{"operator": "linear"}, {"operator": "conv", "ratio": 4.0}], "operator="),
        ([{"conditions": ("canny",)}] * 2, "controlled by canny"),
        ([{"conditions": ("canny",)}, {"conditions": ("color",), "kernel": 3}], "kernel="),
    ]
    for settings, message in refused:
        tuners = [tuner(net, "scedit", seed, **own) for seed, own in enumerate(settings)]
        with pytest.raises(DoesNotFit, match=message):
            merged(tuners, [1.0, 1.0], net, rule)
    tuners = [tuner(net, "diffscaler", seed, conditions=("canny",), dim=2) for seed in (0, 1)]
    with pytest.raises(DoesNotFit, match="same condition"):
        merged(tuners, [1.0, 1.0], net, find_rule("diffscaler")[1])


def test_every_method_has_a_rule_or_says_why_not() -> None:
    for method in TUNERS:
        if method in RULES:
            assert find_rule(method)[1].exact, "the default is exact"
        else:
            with pytest.raises(UsageError, match="side by side"):
                find_rule(method)
    with pytest.raises(UsageError, match="Did you mean 'ties'"):
        find_rule("lora", "tie")
