"""How what several tuners add at one site becomes one change of its value: `RULES`, and the conditions' weights.

"sum" adds all. "routed" lets one tuner speak at each place, after MaxFusion (Nair et al. 2024, arXiv 2404.09977),
which found that the variance over channels shows where a condition is strong:

    v_i(p) = var_c D_i(p) / sum_p' var_c D_i(p')                       within each sample
    k(p)   = argmax_i v_i(p)
    D(p)   = the mean of s_i D_i(p) over k(p) and all i with corr_c(D_i(p), D_k(p)) > 0.7

D_i are the tuners' deltas of the unedited value and s_i their scales, which do not decide who speaks. The published
code normalises over the batch, so that an image depends on its neighbours, and knows two conditions only; here any
number may meet. Where a value has no places, as a timestep's, all shares are 1, and the mean of all is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError, unknown
from .routing import Samples

AGREE = 0.7
"""Above this correlation two deltas say the same; the threshold of MaxFusion's code."""


@dataclass(frozen=True)
class Part:
    """What one tuner adds to its samples (b, ...) of a site's value, its scale still to come."""

    delta: Tensor
    scale: float
    samples: Samples

    def scaled(self, dtype: torch.dtype) -> Tensor:
        """s D in the value's dtype."""
        return (self.delta if self.scale == 1 else self.scale * self.delta).to(dtype)


def summed(x: Tensor, parts: Iterable[Part], linear: bool = False) -> Tensor:
    """x plus all parts, each at its samples; x itself where there are none."""
    out = x
    for part in parts:
        out = part.samples.added(out, part.scaled(x.dtype), x)
    return out


def routed(x: Tensor, parts: Iterable[Part], linear: bool = False) -> Tensor:
    """x (B, C, h, w), or (B, ..., C) of a linear layer, plus at each place what the strongest of the parts adds there.

    A part counts at its own samples alone; where it is the only one, the result is that of `summed`.
    """
    parts = list(parts)
    if len(parts) < 2:
        return summed(x, parts)
    channels = 1 if x.dim() > 3 and not linear else -1
    wide = torch.promote_types(x.dtype, torch.float32)
    deltas = [_whole(part.delta.to(wide), part, x).movedim(channels, -1) for part in parts]
    speaks = speakers(torch.stack(deltas), torch.stack([_present(part, x) for part in parts]))
    total = torch.zeros_like(deltas[0])
    for part, heard in zip(parts, speaks, strict=True):
        own = _whole(part.scaled(x.dtype).to(wide), part, x).movedim(channels, -1)
        total = total + torch.where(heard[..., None], own, 0)
    mean = total / speaks.sum(0)[..., None]
    return x + mean.movedim(-1, channels).to(x.dtype)


def speakers(deltas: Tensor, present: Tensor) -> Tensor:
    """Which of N deltas (N, B, ..., C) are averaged at each place: bool (N, B, ...), at least one of them True.

    present (N, B): which have a say in a sample. Equal shares count alike, so that the order of tuners means nothing.
    """
    count, batch, *places, channels = deltas.shape
    centred = deltas.reshape(count, batch, -1, channels)
    centred = centred - centred.mean(-1, keepdim=True)
    energy = centred.square().sum(-1)  # (N, B, P): var_c, times C
    tiny = torch.finfo(energy.dtype).tiny
    share = (energy / energy.sum(2, keepdim=True).clamp(min=tiny)).masked_fill(~present[..., None], -1)
    strongest = share == share.amax(0)
    directions = centred / energy.sqrt().clamp(min=tiny)[..., None]
    agree = torch.einsum("nbpc,mbpc->nmbp", directions, directions) > AGREE
    heard = strongest | (strongest[:, None] & agree).any(0)
    return heard.view(count, batch, *places)


def _present(part: Part, x: Tensor) -> Tensor:
    """bool (B,): the samples that the part acts on."""
    rows, present = part.samples.rows, torch.ones(len(x), dtype=torch.bool, device=x.device)
    if rows is not None:
        present.zero_()
        present[rows] = True
    return present


def _whole(delta: Tensor, part: Part, x: Tensor) -> Tensor:
    """A delta of the part's samples, which may be one for all of them, in the shape of x; 0 elsewhere."""
    if part.samples.rows is None:
        return delta.expand_as(x)
    whole = delta.new_zeros(x.shape)
    whole[part.samples.rows] = delta
    return whole


RULES: Mapping[str, Callable[[Tensor, Iterable[Part], bool], Tensor]] = {"sum": summed, "routed": routed}
"""Name -> (value, parts, whether the site is a linear layer) -> edited value."""
DEFAULT = "sum"


def check_rule(name: str) -> str:
    """The name. Raises `UsageError` for a rule that is not there."""
    if name not in RULES:
        raise unknown("rule of composition", name, RULES)
    return name


def normalize(alphas: Sequence[dict[str, float]]) -> None:
    """Scales the condition weights of several tuners to a sum of 1. Raises `UsageError` where they sum to 0."""
    if not any(alphas):
        return
    total = sum(weight for own in alphas for weight in own.values())
    if abs(total) < 1e-6:
        raise UsageError("the condition weights sum to 0; change them, or set normalize=false.")
    for own in alphas:
        own.update({name: weight / total for name, weight in own.items()})
