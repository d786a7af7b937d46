"""SC- and CSC-Tuners as one (SCEdit, arXiv 2312.11392), exactly.

A tuner's T(x) = W_up gelu(W_down x + b_down) + b_up is a sum over its hidden units, so the units of several stand side
by side in one (equation 6), their weights on W_up and b_up. Conditions keep their own branches; a branch's weight
cannot go into its parameters, because c enters both T(x + c) and the sum (equation 7), so it becomes the condition's
fixed gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import DoesNotFit
from ..tuners.configs import SCEditConfig
from ..tuners.scedit import ResPrefix, SCEdit

OF_BRANCHES = ("ratio", "skips", "kernel", "dual", "cascade", "hint_channels")
"""Settings that all branches of a tuner share."""


def stacked(tuners: Sequence[SCEdit], weights: Sequence[float], denoiser: nn.Module) -> SCEdit:
    """sum_i w_i of what the tuners add. Raises `DoesNotFit` where one tuner cannot hold them."""
    alone = [(one, weight) for one, weight in zip(tuners, weights, strict=True) if one.sc]
    config = _config(tuners, weights, _ranks(alone))
    conditions = tuple(name for one in tuners for name in one.conditions)
    merged = SCEdit.build(config, denoiser, conditions, tuners[0].vae_scale)
    with torch.no_grad():
        for index, operation in merged.sc.items():
            _stack(operation, [(one.sc[index], weight) for one, weight in alone if index in one.sc])
        for one in tuners:
            for name in one.conditions:
                merged.csc[name].load_state_dict(one.csc[name].state_dict())
    return merged


def _ranks(alone: Sequence[tuple[SCEdit, float]]) -> dict[int, int] | None:
    """The hidden units of each skip, all tuners' together."""
    ranks: dict[int, int] = {}
    for one, _ in alone:
        for index, operation in one.sc.items():
            ranks[int(index)] = ranks.get(int(index), 0) + _rank(operation)
    if len(alone) > 1 and any(isinstance(part, ResPrefix) for one, _ in alone for part in one.sc.values()):
        raise DoesNotFit(
            "the prefixes of operator=resprefix share a softmax, so that two tuners cannot become one. "
            "Use them side by side: sctool sample --tuner A --tuner B."
        )
    return ranks or None


def _rank(operation: Any) -> int:
    return len(operation.key) if isinstance(operation, ResPrefix) else len(operation.down.weight)


def _config(tuners: Sequence[SCEdit], weights: Sequence[float], ranks: dict[int, int] | None) -> SCEditConfig:
    """The settings of the whole. Raises `DoesNotFit` for tuners whose settings cannot be in one file."""
    names = [name for one in tuners for name in one.conditions]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DoesNotFit(
            f"two of the tuners are controlled by {twice[0]}, and one file has one branch for each condition. "
            "Use them side by side: sctool sample --tuner A --tuner B."
        )
    controlled = [one.config for one in tuners if one.conditions]
    for key in ("operator", *(OF_BRANCHES if len(controlled) > 1 else ())):
        configs = [one.config for one in tuners] if key == "operator" else controlled
        values = {str(getattr(config, key)) for config in configs}
        if len(values) > 1:
            raise DoesNotFit(f"the tuners have {key}={' and '.join(sorted(values))}, and one file has one {key}.")
    gains = {
        name: weight * one.config.gains.get(name, 1.0)
        for one, weight in zip(tuners, weights, strict=True)
        for name in one.conditions
    }
    update = {
        "ranks": ranks,
        "weights": {name: value for one in tuners for name, value in one.config.weights.items()},
        "gains": {name: gain for name, gain in gains.items() if gain != 1},
        "normalize": all(config.normalize for config in controlled),
    }
    config = controlled[0] if controlled else tuners[0].config.model_copy(update={"skips": None})
    return config.model_copy(update=update)


def _stack(whole: Any, parts: Sequence[tuple[Any, float]]) -> None:
    """The hidden units of `parts` side by side in `whole`; a single ResPrefix keeps its own and is rescaled."""
    if isinstance(whole, ResPrefix):
        [(part, weight)] = parts
        whole.load_state_dict(part.state_dict())
        whole.out.weight.mul_(weight)
        whole.out.bias.mul_(weight)
        return
    whole.down.weight.copy_(torch.cat([part.down.weight for part, _ in parts]))
    whole.down.bias.copy_(torch.cat([part.down.bias for part, _ in parts]))
    whole.up.weight.copy_(torch.cat([weight * part.up.weight for part, weight in parts], 1))
    whole.up.bias.copy_(sum(weight * part.up.bias for part, weight in parts))
