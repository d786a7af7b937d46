"""Merged DiffScaler tuners within a budget of units: against least squares on recorded inputs, in float64."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sctool.core.backbones.loading import load_backbone
from sctool.core.distilling.factorising import RIDGE
from sctool.core.errors import UsageError
from sctool.core.merging import pruning
from sctool.core.merging.measuring import compare, fixed_batch, outputs
from sctool.core.merging.pruning import Moments, fitted, groups_of, hidden_moments, pruned
from sctool.core.merging.table import check_options, find_rule, merged
from sctool.core.tuners.diffscaler import key

from ..tiny import dit, unet
from .test_merging import output, tied, tuner, wide

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def stacked(net: nn.Module, *settings: dict[str, Any], weights: tuple = (0.7, -0.4, 1.5)) -> Any:
    tuners = [tuner(net, "diffscaler", seed, **own) for seed, own in enumerate(settings)]
    return merged(tuners, weights[: len(tuners)], net, find_rule("diffscaler")[1]).double()


def moments_of(net: nn.Module, one: Any) -> dict[str, Moments]:
    return hidden_moments(one, list(groups_of(one)), lambda: output(net, [one], [1.0]))


def inputs_of(net: nn.Module, one: Any) -> dict[str, Tensor]:
    """What each adapted layer is given while the tuner acts, recorded by hooks of our own: (N, d, ...) each."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple) -> None:
            seen[name] = args[0].detach()

        return hook

    handles = [net.get_submodule(site.name).register_forward_pre_hook(record(site.name)) for site in one.sites]
    output(net, [one], [1.0])
    for handle in handles:
        handle.remove()
    return seen


def hidden(net: nn.Module, one: Any, name: str, x: Tensor) -> Tensor:
    """relu(D x) of a layer, (N, d), from the branch's own numbers."""
    layer: Any = net.get_submodule(name)
    down = one.branches[key(one.branch_of[name])].down.detach()
    if isinstance(layer, nn.Linear):
        return torch.einsum("...n,dn->...d", x, down).clamp(min=0).flatten(0, -2)
    if layer.padding == (0, 0) and layer.kernel_size == layer.stride and layer.kernel_size != (1, 1):
        return nn.functional.conv2d(x, down, stride=layer.stride).clamp(min=0).movedim(1, -1).flatten(0, 2)
    step = layer.stride[0]
    taken = x[..., ::step, ::step]
    return torch.einsum("bnhw,dn->bhwd", taken, down[:, :, 0, 0]).clamp(min=0).flatten(0, 2)


@pytest.mark.parametrize("make", [unet, tied], ids=["unet", "grouped transformer"])
def test_units_and_fit_are_least_squares_on_recorded_inputs(make: Any) -> None:
    net, rank = wide(make), 3
    one = stacked(net, {"dim": 4}, {"dim": 3})
    seen = inputs_of(net, one)
    small, residual = fitted(one, net, moments_of(net, one), rank)
    found, plain = {}, {}
    for layers in groups_of(one).values():
        h = hidden(net, one, layers[0], seen[layers[0]])
        ups = {name: one.affiners[key(name)].up.detach() for name in layers}
        length = sum(up.square().sum(0) for up in ups.values()).sqrt()
        kept = sorted(sorted(range(h.shape[1]), key=lambda j: -float(length[j] * h[:, j].mean()))[:rank])
        rest = [j for j in range(h.shape[1]) if j not in kept]
        penalty = RIDGE * h[:, kept].square().mean()
        rows = torch.cat([h[:, kept], (len(h) * penalty).sqrt() * torch.eye(rank, dtype=h.dtype)])
        for name, up in ups.items():
            target = torch.cat([h[:, rest] @ up[:, rest].mT, torch.zeros(rank, len(up), dtype=h.dtype)])
            expected = up[:, kept] + torch.linalg.lstsq(rows, target).solution.mT
            own = small.affiners[key(name)].up.detach().double()
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)  # stored in float32
            down = small.branches[key(small.branch_of[name])].down.detach()
            theirs = one.branches[key(one.branch_of[name])].down.detach()[kept]
            assert torch.equal(down, theirs.float())
            size = (h @ up.mT).norm()
            found[name] = float((h @ up.mT - h[:, kept] @ expected.mT).norm() / size)
            plain[name] = float((h[:, rest] @ up[:, rest].mT).norm() / size)
    assert residual.layers == len(found) == len(one.sites)
    assert residual.mean == pytest.approx(sum(found.values()) / len(found), rel=1e-6)
    assert residual.truncated == pytest.approx(sum(plain.values()) / len(plain), rel=1e-6)
    assert residual.largest == pytest.approx(found[residual.layer], rel=1e-6)
    assert residual.largest == pytest.approx(max(found.values()), rel=1e-6)
    assert all(found[name] <= plain[name] for name in found)


def test_the_full_width_changes_nothing_and_narrow_layers_stay_as_they_are() -> None:
    net = wide(unet)
    one = stacked(net, {"dim": 3}, {"dim": 2, "layers": ["down_blocks.0"], "branch_bias": True})
    for rank in (5, 99):
        same, residual = fitted(one, net, {}, rank)
        assert same is one
        assert (residual.layers, residual.mean, residual.largest) == (0, 0.0, 0.0)
    moments = {name: own for name, own in moments_of(net, one).items() if one.dims[name] > 4}
    small, residual = fitted(one, net, moments, 4)
    assert set(small.dims.values()) == {3, 4}
    assert residual.layers == sum(width == 5 for width in one.dims.values()) > 0
    for name, width in one.dims.items():
        for part in ("scale", "shift", "bias"):
            own, theirs = (getattr(t.affiners[key(name)], part) for t in (small, one))
            assert (own is None) == (theirs is None)
            assert own is None or torch.equal(own, theirs.float())
        if width <= 4:
            assert torch.equal(small.affiners[key(name)].up, one.affiners[key(name)].up.float())
            assert torch.equal(small.branches[key(name)].down, one.branches[key(name)].down.float())


def test_the_error_falls_with_the_rank_and_the_fit_beats_truncation() -> None:
    net = wide(unet)
    one = stacked(net, {"dim": 4}, {"dim": 4}, weights=(0.2, 0.2))
    moments, expected = moments_of(net, one), output(net, [one], [1.0])
    residuals, errors, cut = [], [], []
    for rank in range(1, 9):
        small, residual = fitted(one, net, {} if rank == 8 else moments, rank)
        residuals.append(residual.mean)
        errors.append(float((output(net, [small.double()], [1.0]) - expected).square().mean().sqrt()))
        plain, _ = fitted(one, net, {} if rank == 8 else moments, rank, ridge=1e30)
        cut.append(float((output(net, [plain.double()], [1.0]) - expected).square().mean().sqrt()))
        assert residual.mean <= residual.truncated
    assert all(more > less for more, less in itertools.pairwise(residuals)), residuals
    assert all(more > less for more, less in itertools.pairwise(errors)), errors
    assert errors[-1] == 0
    assert all(fit < plain for fit, plain in zip(errors[:-1], cut[:-1], strict=True)), (errors, cut)


def test_units_that_never_act_go_first() -> None:
    net = wide(unet)
    one = stacked(net, {"dim": 3, "branch_bias": True})
    with torch.no_grad():
        for branch in one.branches.values():
            branch.bias[1] = -1e6
    small, residual = fitted(one, net, moments_of(net, one), 2)
    assert residual.largest == residual.truncated == 0
    torch.testing.assert_close(output(net, [small.double()], [1.0]), output(net, [one], [1.0]), rtol=0, atol=1e-6)


def test_a_branch_that_never_ran_keeps_its_first_units() -> None:
    net = wide(unet)
    one = stacked(net, {"dim": 3})
    moments = hidden_moments(one, list(groups_of(one)), lambda: None)
    small, residual = fitted(one, net, moments, 2)
    assert residual.mean == 0
    name = one.sites[0].name
    assert torch.equal(small.branches[key(name)].down, one.branches[key(name)].down[:2].float())
    assert torch.equal(small.affiners[key(name)].up, one.affiners[key(name)].up[:, :2].float())


def test_new_classes_stay() -> None:
    net = wide(dit)
    one = merged(
        [tuner(net, "diffscaler", 0, classes=("cat",), dim=3)], [1.0], net, find_rule("diffscaler", "prune")[1], rank=2
    ).double()
    small, _ = fitted(one, net, moments_of(net, one), 2)
    assert small.classes == ("cat",)
    assert small.new_classes is one.new_classes is not None


# ------------------------------------------------------------------------------------------------------ on a base


@pytest.mark.parametrize("conditions", [(), ("canny", "color")], ids=["plain", "controlled"])
def test_calibration_draws_with_the_tuner_and_its_maps(
    conditions: tuple, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_backbone(str(tiny_base))
    torch.manual_seed(3)
    from sctool.core.tuners import method_config, tuner_class

    whole = tuner_class("diffscaler").build(method_config("diffscaler", {"dim": 4}), base.denoiser, conditions, 4)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    one: Any = merged([whole], [1.0], base.denoiser, find_rule("diffscaler", "prune")[1], rank=2)
    seen: list[int] = []
    original = base.family.predict

    def predict(*args: Any) -> Tensor:
        seen.append(len(args[4]) if len(args) > 4 and args[4] else 0)
        return original(*args)

    monkeypatch.setattr(type(base.family), "predict", lambda self, *args: predict(*args))
    monkeypatch.setattr(pruning, "IMAGES", 4)
    small, residual = pruned(one, base, 2)
    assert set(small.dims.values()) == {2}
    assert 0 < residual.mean < residual.truncated < 1.5
    assert (set(seen) == {0, 1, 2}) == bool(conditions), "without maps, with each and with all"
    again, _ = pruned(one, base, 2)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    batch = fixed_batch(base, conditions)
    error = compare(base, list(outputs(base, batch, [one], [1.0])), batch, [small], [1.0])
    assert 0 < error.mean < error.effect
    assert pruned(one, base, 4)[0] is one
    assert not base.denoiser._forward_pre_hooks


def test_a_rank_alone_chooses_the_rule_that_takes_one() -> None:
    assert find_rule("diffscaler", rank=3)[0] == "prune"
    assert find_rule("lora", rank=3)[0] == "svd"
    assert find_rule("diffscaler")[0] == "stack"
    for method in ("scedit", "full"):
        with pytest.raises(UsageError, match="given rank"):
            find_rule(method, rank=3)
    rule = find_rule("diffscaler", "prune")[1]
    assert not rule.exact
    with pytest.raises(UsageError, match="how many"):
        check_options(rule, {"rank": None})
    with pytest.raises(UsageError, match="--density has no meaning"):
        check_options(rule, {"rank": 3, "density": 0.5})
