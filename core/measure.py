"""What work costs: activations saved for backward, seconds in turns, peak memory."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of all storages made inside which are still alive: `now`, and its `peak`.

    Works on the meta device and on fake tensors too. Of a GPU it knows what tensors hold, not libraries' workspaces.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts the storages of its results that none of its arguments has."""
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self._known:
                    self._add(storage)
        return out

    def storages(self) -> dict[int, int]:
        """The bytes of every storage that is alive, by its address."""
        alive = (storage() for storage in self._known.values())
        return {storage._cdata: storage.nbytes() for storage in alive if storage is not None}

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: object) -> None:
            if self._known.pop(key, None) is not None:
                self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that are kept for backward after `forward()`, each storage once.

    They are what autograd saved, and all else that was made and is still alive, as what checkpointing holds; not the
    parameters and buffers of `model`, nor the output. Works on the meta device and on fake tensors too.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}  # the tensors stay alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            saved.setdefault(storage, tensor)
        return tensor

    with LiveBytes() as live, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
        results = {t.untyped_storage()._cdata for t in tree_leaves(output) if isinstance(t, torch.Tensor)}
        kept = {key: tensor.untyped_storage().nbytes() for key, tensor in saved.items()}
        kept |= {key: size for key, size in live.storages().items() if key not in results}
    del output  # not before: the graph holds what was saved
    return sum(kept.values())


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
