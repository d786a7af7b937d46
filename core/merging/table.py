"""The rules by which tuners of a method become one: `RULES`, the name table of `sctool merge`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..backbones.loading import Backbone
from ..errors import DoesNotFit, UsageError, unknown
from ..tuners import TUNERS
from ..tuners.base import Tuner
from ..tuners.classes import NewClasses
from . import affiners, low_rank, pruning, skips, weights


@dataclass(frozen=True)
class Rule:
    """`merge` makes one tuner of (tuners, weights, denoiser).

    `exact`: it adds what all would add together. `additive`: they can also act side by side, so that the error is
    measurable. `options` are those of `sctool merge` that it takes, `needs` those that it cannot do without. `shrink`
    makes what was merged narrower by calibration on the base, given `rank`, and says how far that is off.
    """

    merge: Callable[..., Any]
    exact: bool
    additive: bool = True
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    shrink: Callable[[Any, Backbone, int], tuple[Any, pruning.Residual]] | None = None


MISSING = {
    "density": "this rule keeps a share of the weights; say which, e.g. --density 0.5.",
    "rank": "this rule keeps a number of units a layer; say how many, e.g. --rank 8.",
}
PRUNING = ("ties", "dare", "magnitude_prune")
"""How names of rules begin that keep a share of the weights."""


def _options(rule: str) -> tuple[str, ...]:
    density = ("density",) if rule.startswith(PRUNING) else ()
    return ("rank", *density) if rule.endswith("svd") else density


def _needs(rule: str) -> tuple[str, ...]:
    return tuple(name for name in _options(rule) if name == "density")


OF_WEIGHTS = {
    rule: Rule(partial(weights.arithmetic, rule=rule), rule == "linear", False, _options(rule), _needs(rule))
    for rule in weights.PEFT
}
RULES: Mapping[str, Mapping[str, Rule]] = {
    "scedit": {"stack": Rule(skips.stacked, True)},
    "diffscaler": {
        "stack": Rule(affiners.stacked, True),
        "prune": Rule(affiners.stacked, False, options=("rank",), needs=("rank",), shrink=pruning.pruned),
    },
    "lora": {
        "cat": Rule(low_rank.concatenated, True),
        **{
            rule: Rule(partial(low_rank.by_peft, rule=rule), False, True, _options(rule), _needs(rule))
            for rule in low_rank.PEFT
        },
    },
    "full": OF_WEIGHTS,
    "bitfit": OF_WEIGHTS,
    "difffit": OF_WEIGHTS,
}
"""Method -> rule -> what it does; the first of a method is its default, with a rank the first that takes one."""

WHY_NOT = {
    "dora": "DoRA normalises each layer's rows with its own update in them, so that two cannot be added",
    "lokr": "a sum of Kronecker products is no Kronecker product",
}


def find_rule(method: str, name: str | None = None, rank: int | None = None) -> tuple[str, Rule]:
    """The rule of that name for a method, or its default; where a rank is asked for, the first that takes one.

    Raises `UsageError` for a rule that is not there, and where no rule of the method makes a result of a given rank.
    """
    if method not in RULES:
        reason = WHY_NOT.get(method, f"{method} has no rule by which several become one")
        raise UsageError(f"{reason}. Use them side by side: sctool sample --tuner A --tuner B.")
    rules = RULES[method]
    if name is None:
        fit = [own for own, rule in rules.items() if rank is None or "rank" in rule.options]
        if not fit:
            raise UsageError(f"no rule for {method} makes a tuner of a given rank; leave --rank out.")
        name = fit[0]
    if name not in rules:
        raise unknown(f"rule for {method}", name, rules)
    return name, rules[name]


def check_options(rule: Rule, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were given. Raises `UsageError` for one that the rule does not take, or for lack of one it needs."""
    given = {name: value for name, value in options.items() if value is not None}
    if strange := sorted(given.keys() - set(rule.options)):
        raise UsageError(f"--{strange[0]} has no meaning for this rule; leave it out.")
    for name in rule.needs:
        if name not in given:
            raise UsageError(MISSING[name])
    return given


def merged(
    tuners: Sequence[Tuner], strengths: Sequence[float], denoiser: nn.Module, rule: Rule, **options: Any
) -> Tuner:  # fmt: skip
    """One tuner that adds sum_i w_i of what the tuners add, new classes included; before `shrink`. All of one method.

    Raises `DoesNotFit` where one tuner cannot hold them, and `UsageError` as `check_options`.
    """
    given = check_options(rule, options)
    whole = rule.merge(tuners, strengths, denoiser, **({} if rule.shrink else given))
    adding = [(one, weight) for one, weight in zip(tuners, strengths, strict=True) if one.new_classes is not None]
    if len(adding) > 1:
        raise DoesNotFit(
            "more than one of the tuners adds classes to the base, and a class id could mean either's. "
            "Keep them as tasks: sctool sample --tuner A --tuner B --task A,B."
        )
    for one, weight in adding:
        whole.classes, theirs = one.classes, one.new_classes
        assert theirs is not None
        whole.new_classes = NewClasses(denoiser, len(one.classes), one.vae_scale).to(theirs.offsets.device)
        with torch.no_grad():
            whole.new_classes.offsets.copy_(weight * theirs.offsets)
    return whole


def check_methods(methods: Sequence[str]) -> str:
    """The one method of all. Raises `UsageError` for several."""
    kinds = sorted(set(methods))
    if len(kinds) > 1:
        names = " and ".join(TUNERS[kind].summary for kind in kinds[:2])
        raise UsageError(
            f"tuners of {' and '.join(kinds)} cannot become one ({names}). "
            "Use them side by side: sctool sample --tuner A --tuner B."
        )
    return kinds[0]
