"""Tasks of every method that can be routed: a mixed batch equals separate calls, in values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sctool.core.errors import UsageError
from sctool.core.sites.attaching import tuned
from sctool.core.sites.parts import family_of
from sctool.core.tuners import TUNERS, method_config, tuner_class

from ..tiny import dit, unet

ROUTED = [name for name in TUNERS if tuner_class(name).routes]
UNEQUAL: dict[str, list[dict[str, Any]]] = {
    "diffscaler": [{"dim": 3, "layers": ["whole"]}, {"dim": 5}], "lora": [{"rank": 2}, {"rank": 5}],
    "dora": [{"rank": 2}, {"rank": 3}],
}  # fmt: skip
TASKS = ["a", "b", "b", None, "a", "b"]
CONTROLLED = [name for name in ROUTED if TUNERS[name].control == "required"]
CASES = [pytest.param(name, base, id=f"{name}-{base}") for name in ROUTED for base in ("unet", "dit")
         if base == "unet" or name not in ("scedit", *CONTROLLED)]  # fmt: skip


def test_the_methods_that_act_on_single_samples() -> None:
    assert set(TUNERS) - set(ROUTED) == {"full", "bitfit", "difffit"}


def make(method: str, base: str) -> Any:
    """A net that the method fits, in float64."""
    deep = {"layers_per_block": 2, "block_out_channels": (20, 40)} if method == "controlnet-xs" else {}
    return (unet(**deep) if base == "unet" else dit(tied=True)).double()


def given(method: str, places: Any = slice(None), tasks: Any = None) -> dict[str, Any] | None:
    """What goes through the open channel: the samples' tasks, and a map for methods that need one."""
    maps = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    hint = {"hint": {"canny": maps[places]}} if method in CONTROLLED else {}
    return {**({"task": tasks} if tasks else {}), **hint} or None


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def shaken(method: str, net: Any, number: int, classes: tuple[str, ...]) -> Any:
    settings = UNEQUAL.get(method, [{}, {}])[number]
    torch.manual_seed(number)
    conditions = ("canny",) if method in CONTROLLED else ()
    tuner = tuner_class(method).build(method_config(method, settings), net, conditions, classes=classes).double()
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return tuner


def inputs(base: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    latents, t = torch.randn(6, 4, 8, 8), torch.tensor([3, 700, 10, 44, 999, 500])
    if base == "unet":
        return latents, t, {"prompt_embeds": torch.randn(6, 3, 8)}
    return latents, t, {"label": torch.tensor([4, 4, 5, 1, 0, 3])}  # ids from 4 on are the tuners' own classes


@pytest.mark.parametrize(("method", "base"), CASES)
def test_a_mixed_batch_equals_separate_calls(method: str, base: str) -> None:
    net = make(method, base)
    own = (("cat",), ("dog", "owl")) if base == "dit" else ((), ())
    tuners = {name: shaken(method, net, number, own[number]) for number, name in enumerate("ab")}
    latents, t, rows = inputs(base)
    family = family_of(net)
    with tuned(net, *tuners.values(), tasks=list(tuners)):
        mixed = family.output(net, latents, t, rows, given(method, tasks=TASKS))
    mixed.square().sum().backward()
    for name in (*tuners, None):
        places = [i for i, task in enumerate(TASKS) if task == name]
        part = {key: value[places] for key, value in rows.items()}
        if name is None:
            alone = family.output(net, latents[places], t[places], part)
        else:
            gradients = [parameter.grad for parameter in tuners[name].parameters()]
            tuners[name].zero_grad()
            with tuned(net, tuners[name]):
                alone = family.output(net, latents[places], t[places], part, given(method, places))
            alone.square().sum().backward()
            for one, parameter in zip(gradients, tuners[name].parameters(), strict=True):
                assert one is not None
                torch.testing.assert_close(one, parameter.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(mixed[places], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("method", "base"), CASES)
def test_a_tuner_added_later_changes_no_sample_of_the_others(method: str, base: str) -> None:
    net = make(method, base)
    first, second = (shaken(method, net, number, ()) for number in (0, 1))
    latents, t, rows = inputs(base)
    rows = {key: value.clamp(max=3) if key == "label" else value for key, value in rows.items()}
    family, old = family_of(net), ["a", None, "a", "a", None, "a"]
    with torch.no_grad(), tuned(net, first, tasks=["a"]):
        before = family.output(net, latents, t, rows, given(method, tasks=old))
    with torch.no_grad(), tuned(net, first, second, tasks=["a", "b"]):
        assert torch.equal(family.output(net, latents, t, rows, given(method, tasks=old)), before)


def test_methods_that_change_the_whole_denoiser_cannot_be_routed() -> None:
    for name in TUNERS.keys() - set(ROUTED):
        net = unet()
        tuner = tuner_class(name).build(method_config(name, {}), net)
        with pytest.raises(UsageError, match="whole batch and cannot have a task"), tuned(net, tuner, tasks=["a"]):
            pass
