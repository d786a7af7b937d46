"""DiffScaler's tuners as one (arXiv 2404.09976), exactly. The paper promises a merging scheme and describes none.

What a tuner adds to a layer is a (W x) + s W_up relu(W_down x) + b (equation 5), so a weighted sum is

    a = sum w_i a_i,  b = sum w_i b_i,  W_down = [W_down1; ...],  W_up = [w_1 s_1 W_up1, ...],  s = 1

for any real weights and any widths. A weight must be on W_up: through the ReLU a negative one would not come back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DoesNotFit
from ..sites.layers import Layer
from ..sites.parts import family_of
from ..tuners.configs import DiffScalerConfig
from ..tuners.diffscaler import DiffScaler, key

Weighted = Sequence[tuple[DiffScaler, float]]


def stacked(tuners: Sequence[DiffScaler], weights: Sequence[float], denoiser: nn.Module) -> DiffScaler:
    """sum_i w_i of what the tuners add, without units that are dead or parallel to others.

    Raises `DoesNotFit` where one tuner cannot hold them.
    """
    parts = list(zip(tuners, weights, strict=True))
    conditions = tuple(dict.fromkeys(name for one in tuners for name in one.conditions))
    if len(conditions) < sum(len(one.conditions) for one in tuners):
        raise DoesNotFit(
            "two of the tuners are controlled by the same condition, and one file has one set of columns for each. "
            "Use them side by side: sctool sample --tuner A --tuner B."
        )
    qkv = "grouped" if all(one.config.qkv == "grouped" for one in tuners) else "separate"
    config = _config(tuners, qkv, denoiser)
    dims = {name: sum(one.dims.get(name, 0) for one in tuners) for one in tuners for name in one.dims}
    merged = DiffScaler.build(with_dims(config, dims), denoiser, conditions, tuners[0].vae_scale)
    with torch.no_grad():
        for site in merged.sites:
            _fill(merged, site, [(one, weight) for one, weight in parts if site.name in one.dims])
    return tidied(merged, denoiser)


def with_dims(config: DiffScalerConfig, dims: dict[str, int]) -> DiffScalerConfig:
    """The settings with these widths: the most frequent as `dim`, the others by layer."""
    [(most, _)] = Counter(dims.values()).most_common(1)
    return config.model_copy(update={"dim": most, "dims": {name: dim for name, dim in dims.items() if dim != most}})


def _config(tuners: Sequence[DiffScaler], qkv: Any, denoiser: nn.Module) -> DiffScalerConfig:
    configs, family = [one.config for one in tuners], family_of(denoiser)
    hints = {one.config.hint for one in tuners if one.conditions}
    if len(hints) > 1:
        raise DoesNotFit("the tuners have hint=unshuffle and hint=vae, and one file has one form of hint.")
    shifts = {config.shift for config in configs}
    update = {
        "layers": tuple(dict.fromkeys(name for config in configs for name in config.layers or family.adapted)),
        "qkv": qkv,
        "scale": any(config.scale for config in configs),
        "shift": shifts.pop() if len(shifts) == 1 else "all" if "all" in shifts else "biased",
        "gate": False,
        "branch_bias": any(config.branch_bias for config in configs),
        **({"hint": hints.pop()} if hints else {}),
    }
    return configs[0].model_copy(update=update)


def _fill(merged: DiffScaler, site: Layer, parts: Weighted) -> None:
    """a, b, W_up and the shared branch of one layer."""
    affiner: Any = merged.affiners[key(site.name)]
    ups, biases, branches = [], [], []
    for one, weight in parts:
        own: Any = one.affiners[key(site.name)]
        for name in ("scale", "shift"):
            if getattr(own, name) is not None:
                getattr(affiner, name).add_(weight * getattr(own, name))
        if one.dims[site.name]:
            branch: Any = one.branches[key(one.branch_of[site.name])]
            strength = weight if branch.gate is None else weight * branch.gate
            branches.append(branch)
            ups.append(strength * own.up)
            biases.append(0 if own.bias is None else strength * own.bias)
    if not branches:
        return
    affiner.up.copy_(torch.cat(ups, 1))
    if affiner.bias is not None:
        affiner.bias.copy_(sum(biases))
    whole: Any = merged.branches[key(merged.branch_of[site.name])]
    whole.down.copy_(torch.cat([branch.down for branch in branches]))
    if whole.bias is not None:
        given = [branch.down.new_zeros(len(branch.down)) if branch.bias is None else branch.bias for branch in branches]
        whole.bias.copy_(torch.cat(given))
    for name, column in whole.columns.items():
        own = [
            branch.columns[name] if name in branch.columns else column.new_zeros(len(branch.down), *column.shape[1:])
            for branch in branches
        ]
        column.copy_(torch.cat(own))


# ---------------------------------------------------------------------------------------- dead and parallel units


def tidied(tuner: DiffScaler, denoiser: nn.Module) -> DiffScaler:
    """The same function with fewer units: those that never act are left out, parallel ones become one.

    relu(c z) = c relu(z) for c > 0, so where W_down's rows are multiples, their columns of W_up add up.
    """
    groups = groups_of(tuner)
    joined = {shared: _joined(tuner, shared, names) for shared, names in groups.items()}
    dims = {name: len(joined[tuner.branch_of[name]]) if dim else 0 for name, dim in tuner.dims.items()}
    if dims == tuner.dims or not any(dims.values()):
        return tuner
    if tuner.first is not None and not dims[tuner.first.name]:
        return tuner  # hints would have nowhere to enter
    ups = {}
    for shared, names in groups.items():
        for name in names if joined[shared] else ():
            source = tuner.affiners[key(name)].up.detach()
            columns = [sum(factor * source[:, unit] for unit, factor in members) for _, members in joined[shared]]
            ups[name] = torch.stack(columns, 1)
    return narrowed(tuner, denoiser, {name: [leader for leader, _ in own] for name, own in joined.items()}, ups)


def groups_of(tuner: DiffScaler) -> dict[str, list[str]]:
    """The layers with a branch, by the name of the branch that they share."""
    groups: dict[str, list[str]] = {}
    for name, shared in tuner.branch_of.items():
        if tuner.dims[name]:
            groups.setdefault(shared, []).append(name)
    return groups


@torch.no_grad()
def narrowed(
    tuner: DiffScaler, denoiser: nn.Module, kept: Mapping[str, Sequence[int]], ups: Mapping[str, Tensor]
) -> DiffScaler:
    """The tuner with the units `kept` of each branch, and with W_up (m, units) of each layer that has any."""
    dims = {name: len(kept[tuner.branch_of[name]]) if dim else 0 for name, dim in tuner.dims.items()}
    small = DiffScaler.build(with_dims(tuner.config, dims), denoiser, tuner.conditions, tuner.vae_scale)
    small.classes, small.new_classes = tuner.classes, tuner.new_classes
    for name, own in small.affiners.items():
        theirs: Any = tuner.affiners[name]
        for part in ("scale", "shift", "bias"):
            if getattr(own, part) is not None and getattr(theirs, part) is not None:
                getattr(own, part).copy_(getattr(theirs, part))
    for shared, units in kept.items():
        if not units:
            continue
        branch: Any = small.branches[key(shared)]
        theirs = tuner.branches[key(shared)]
        for own, source in zip(_rows(branch), _rows(theirs), strict=True):
            own.copy_(source[list(units)])
        if branch.gate is not None:
            branch.gate.copy_(theirs.gate)
    for name, up in ups.items():
        small.affiners[key(name)].up.copy_(up)
    return small


def _rows(branch: Any) -> list[Tensor]:
    """All that decides a unit, each with a row per unit."""
    return [branch.down, *branch.columns.values(), *([branch.bias] if branch.bias is not None else [])]


def _joined(tuner: DiffScaler, shared: str, names: Sequence[str]) -> list[tuple[int, list[tuple[int, float]]]]:
    """The units that are kept, each with those that it stands for and their factors."""
    branch: Any = tuner.branches[key(shared)]
    rows = torch.cat([part.detach().double().flatten(1) if part.dim() > 1 else part.detach().double()[:, None]
                      for part in _rows(branch)], 1)  # fmt: skip
    lengths, used = rows.norm(dim=1), sum(tuner.affiners[key(name)].up.detach().abs().sum(0) for name in names)
    alive = ((lengths > 0) & (used > 0)).tolist()
    same: dict[bytes, int] = {}
    kept: list[tuple[int, list[tuple[int, float]]]] = []
    for unit, direction in enumerate(rows / lengths.clamp(min=torch.finfo(torch.float64).tiny)[:, None]):
        if not alive[unit]:
            continue
        # equal to float32's rounding: tuners made from one another, not merely similar ones
        fingerprint = (direction * 2**20).round().to(torch.int32).numpy().tobytes()
        if fingerprint not in same:
            same[fingerprint] = len(kept)
            kept.append((unit, []))
        leader, members = kept[same[fingerprint]]
        members.append((unit, float(lengths[unit] / lengths[leader])))
    return kept
