"""Tuners that replace weights of the base (full, BitFit, DiffFit) as one: arithmetic on what they changed.

Two such tuners cannot act side by side, so their sum W + sum_i w_i (W_i - W) is not compared to anything: it is task
arithmetic (Ilharco et al. 2023, arXiv 2212.04089) by definition. TIES (arXiv 2306.01708) and DARE (arXiv 2311.03099)
are peft's functions on the same differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from peft.utils import merge_utils
from torch import Tensor, nn

from ..tuners.swapping import WeightTuner
from .low_rank import SEED

PEFT: dict[str, Callable[..., Tensor]] = {
    "linear": merge_utils.task_arithmetic,
    "ties": merge_utils.ties,
    "dare_linear": merge_utils.dare_linear,
    "dare_ties": merge_utils.dare_ties,
    "magnitude_prune": merge_utils.magnitude_prune,
}
"""Functions (differences, weights, density) -> difference."""


def arithmetic(
    tuners: Sequence[WeightTuner], weights: Sequence[float], denoiser: nn.Module, rule: str = "linear",
    density: float | None = None,
) -> WeightTuner:  # fmt: skip
    """The base's weights plus what `rule` makes of the tuners' differences. density: the share of weights kept.

    DiffFit's scale factors start at 1, and its differences are those to 1.
    """
    theirs = dict(denoiser.named_parameters())
    merged = type(tuners[0]).build(tuners[0].config, denoiser, (), tuners[0].vae_scale)
    combine = PEFT[rule] if rule == "linear" else partial(PEFT[rule], density=density)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for name, own in merged.named_parameters():
            origin = theirs[name].float() if name in theirs else torch.ones_like(own)
            changes = [one.get_parameter(name).detach() - origin for one in tuners]
            own.copy_(origin + combine(changes, torch.tensor(weights, dtype=own.dtype)))
    return merged
