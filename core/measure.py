"""What work costs: activations saved for backward, seconds in turns, peak memory."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

REPEATS = 5
PATIENCE = 60.0
"""Seconds after which no further repeat is begun."""
ROUNDS = 3
"""Repeats that are made however long they take."""


def without_storage(model: nn.Module) -> None:
    """Puts fake tensors in the place of all weights; within a `FakeTensorMode`, for exact counts of a model's work.

    Fakes say that they are on the CPU: the meta device would select attention's slow path. Shared weights stay shared.
    """
    fakes: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if weight not in fakes:
                    fake = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
                    fakes[weight] = nn.Parameter(fake, weight.requires_grad)
                module._parameters[name] = fakes[weight]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of activations that autograd saves for backward during `forward()`, each storage once.

    The parameters and buffers of `model` do not count. Works on the meta device and on fake tensors too.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}  # the tensors stay alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            saved.setdefault(storage, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
        total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del output  # not before: the graph holds what was saved
    return total


def in_turns(
    works: dict[str, Callable[[], float]], repeats: int = REPEATS, patience: float = PATIENCE
) -> dict[str, float]:
    """Median of the seconds that each piece of work returns; in turns, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():  # the first run pays for allocations
        work()
    began = time.perf_counter()
    for number in range(repeats):
        if number >= min(ROUNDS, repeats) and time.perf_counter() - began > patience:
            break
        for name in works if number % 2 == 0 else reversed(works):
            seconds[name].append(works[name]())
    return {name: statistics.median(values) for name, values in seconds.items()}


class PeakMemory:
    """Peak bytes of one piece of work: allocated on the GPU, resident in the process on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.kind = "cuda allocated" if device == "cuda" else "resident set"

    def of(self, work: Callable[[], object]) -> int | None:
        """Peak in bytes while `work` runs; None where the system cannot reset the process's high-water mark."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            work()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        if not _reset_peak():
            return None
        work()
        return _peak_resident()


def peak_so_far(device: torch.device) -> int:
    """Peak bytes of this process so far: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak() -> bool:
    """Returns freed memory to the system and resets the resident set's high-water mark (Linux)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_resident() -> int:
    """VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
