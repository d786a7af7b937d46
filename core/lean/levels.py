"""The levels of memory by name: what a training keeps for backward, and what it computes again instead.

plain     what autograd keeps
normal    frozen layers keep what backward reads; nothing of weight is computed again
low       the first layers of feed-forward networks are computed again: 4 % more FLOPs for SC-Tuner on SD 1.5
lower     q, k and v of attention too, 7 %
minimum   every layer is computed again from its input, 34 %
"""

from __future__ import annotations

from torch import nn

from ..config import MemoryLevel
from .exchanging import Exchange
from .keeping import keep_less
from .recomputing import recompute_attention, recompute_feed_forward, recompute_layers


def economize(denoiser: nn.Module, level: MemoryLevel) -> Exchange:
    """Exchanges frozen modules of `denoiser`, in place, for those of a level, until what is returned is removed.

    To be called when all tuners are attached: what they train or look at stays as it is.
    """
    exchange = Exchange()
    if level != "plain":
        keep_less(denoiser, exchange)
    if level in ("low", "lower"):
        recompute_feed_forward(denoiser, exchange)
    if level == "lower":
        recompute_attention(denoiser, exchange)
    if level == "minimum":
        recompute_layers(denoiser, exchange)
    return exchange
