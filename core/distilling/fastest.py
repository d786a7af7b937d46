"""The form of each low-rank layer that is the faster one on this machine: two thin products, or one dense one.

A thin layer does less arithmetic but writes its hidden channels to memory, and starts two kernels for one.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.thin import THIN, dense, replace

SECONDS = 0.02
"""How long each form of a layer is run in each of `TURNS`."""
TURNS = 3


def fastest(denoiser: nn.Module, run: Callable[[nn.Module], object]) -> nn.Module:
    """A copy of the denoiser in which the low-rank layers are ordinary ones where those are faster.

    run: calls a denoiser once, on the batch that the choice is for. Layers of one shape are timed once.
    """
    chosen: dict[tuple[Any, ...], bool] = {}
    own, wide = copy.deepcopy(denoiser), dict[str, nn.Module]()
    for name, x in inputs(own, run).items():
        layer = own.get_submodule(name)
        shape = (type(layer), repr(layer), x.shape, x.stride())
        if shape not in chosen:
            chosen[shape] = faster(dense(layer), layer, x)
        if chosen[shape]:
            wide[name] = dense(layer)
    replace(own, wide)
    return own


@torch.no_grad()
def faster(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    """Whether `one` needs less time than `other` for the input x: the medians of turns, so that load falls on both."""
    from torch.utils.benchmark import Timer  # imports torch's compiler tools, which nothing else here needs

    def seconds(layer: nn.Module) -> float:
        timer = Timer("layer(x)", globals={"layer": layer, "x": x}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=SECONDS).median

    turns = [(seconds(one), seconds(other)) for _ in range(TURNS)]
    return statistics.median(a for a, _ in turns) < statistics.median(b for _, b in turns)


@torch.no_grad()
def inputs(denoiser: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    """What each low-rank layer is given in `run`, by name."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return hook

    names = [name for name, module in denoiser.named_modules() if isinstance(module, THIN)]
    handles = [denoiser.get_submodule(name).register_forward_pre_hook(remember(name)) for name in names]
    try:
        run(denoiser)
    finally:
        for handle in handles:
            handle.remove()
    return seen
