"""A base that holds a tuner computes what the base with the tuner attached computes."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn

from sctool.core.errors import DoesNotFit
from sctool.core.merging.folding import folded
from sctool.core.merging.measuring import Batch
from sctool.core.sites.parts import family_of

from ..tiny import dit, unet
from .test_merging import output, tuner, wide


def base(net: nn.Module) -> Any:
    return types.SimpleNamespace(denoiser=net, family=family_of(net))


EXACT = [
    ("full", {}), ("bitfit", {}), ("difffit", {}), ("lora", {"rank": 2, "alpha": 3.0}), ("dora", {"rank": 2}),
    ("lora", {"rank": 2, "layers": ["down_blocks"]}),
    ("lokr", {"rank": 2}), ("diffscaler", {"dim": 0, "shift": "biased"}), ("diffscaler", {"dim": 0, "shift": "none"}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "settings"), EXACT, ids=lambda value: str(value))
@pytest.mark.parametrize("make", [unet, dit], ids=["unet", "dit"])
def test_the_folded_base_is_the_tuned_base(make: Any, method: str, settings: dict) -> None:
    if make is dit and settings.get("layers"):
        settings = {**settings, "layers": ["blocks"]}
    net = wide(make)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    one = tuner(net, method, 1, **settings)
    plain = folded(base(net), one)
    expected = output(net, [one], [1.0])
    torch.testing.assert_close(output(plain, [], []), expected, rtol=0, atol=1e-5)
    assert (expected - output(net, [], [])).abs().max() > 0.01
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items()), "the base is untouched"


def batch() -> Batch:
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(4, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(4, 3, 8, generator=generator, dtype=torch.float64)
    return Batch(latents, torch.tensor([3, 70, 500, 999]), {"prompt_embeds": text}, [None])


def test_a_branch_that_is_always_on_folds_exactly_and_others_nearly() -> None:
    net = wide(unet)
    one = tuner(net, "diffscaler", 1, dim=3, branch_bias=True, shift="biased", layers=["down_blocks.0.resnets"])
    with torch.no_grad():
        for affiner in one.affiners.values():
            if affiner.scale is not None:
                affiner.scale.mul_(0.1)
        for branch in one.branches.values():
            branch.bias.fill_(1000.0)
        for affiner in one.affiners.values():
            affiner.up.mul_(1e-3)
    plain = folded(base(net), one, batch())
    torch.testing.assert_close(output(plain, [], []), output(net, [one], [1.0]), rtol=0, atol=1e-6)
    with torch.no_grad():
        for branch in one.branches.values():
            branch.bias.zero_()
        for affiner in one.affiners.values():
            affiner.up.mul_(1e3)
    plain, expected = folded(base(net), one, batch()), output(net, [one], [1.0])
    off, effect = (output(plain, [], []) - expected).abs().mean(), (output(net, [], []) - expected).abs().mean()
    assert 0 < off < effect


def test_what_does_not_fold_is_refused_by_name() -> None:
    net = wide(unet)
    refused = [
        (tuner(net, "scedit", 1), "skip connections"),
        (tuner(net, "diffscaler", 1, dim=2), "--approximate"),
        (tuner(net, "diffscaler", 1, dim=0), "has no bias"),
    ]
    for one, message in refused:
        with pytest.raises(DoesNotFit, match=message):
            folded(base(net), one)
    classes = tuner(wide(dit), "diffscaler", 1, classes=("cat",), dim=0)
    with pytest.raises(DoesNotFit, match="adds classes"):
        folded(base(wide(dit)), classes)
