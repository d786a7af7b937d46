"""Condition maps on their way to the tuners: whether they fit, whether they changed, repetition for guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import UsageError
from .routing import EVERY, Samples


def tensor_version(tensor: Tensor) -> tuple[int, int]:
    """Changes when another tensor comes or this one is written to; inference tensors keep no version."""
    return id(tensor), -1 if tensor.is_inference() else tensor._version


def identity(hint: Tensor) -> tuple[Any, ...]:
    """Equal for the same part of the same memory as long as nothing is written to it, whichever tensor shows it.

    A batch that is drawn in chunks gives new views of one hint at every step, and they are equal here.
    """
    place = hint.untyped_storage()._cdata, hint.storage_offset(), tuple(hint.shape), tuple(hint.stride())
    return *place, hint.dtype, tensor_version(hint)[1]


class Encodings:
    """Features of hints, encoded once however the denoiser's calls divide the batch.

    They are kept as long as the hint's memory and the tuners' weights are the same. Changes made in place through
    `.data`, or to a hint made in inference mode, are not noticed: pass a new tensor.
    """

    def __init__(self) -> None:
        self._weights: Any = None
        self._known: dict[Any, tuple[list[StorageWeakRef], Any]] = {}

    def features(self, hints: Mapping[str, Tensor], kind: Any, weights: Any, encode: Callable[[], Any]) -> Any:
        """Those of the hints, by `encode` where they are not known for this `kind` and these `weights`."""
        if weights != self._weights:
            self._known.clear()
        self._weights = weights
        key = (kind, tuple((name, identity(hint)) for name, hint in hints.items()))
        if key not in self._known:
            # While a weak reference is held, the address of a hint's memory is not given to another one.
            self._known = {k: v for k, v in self._known.items() if not any(ref.expired() for ref in v[0])}
            memory = [StorageWeakRef(hint.untyped_storage()) for hint in hints.values()]
            self._known[key] = memory, encode()
        return self._known[key][1]


def checked(name: str, hint: Tensor, latents: Tensor, vae_scale: int, samples: Samples = EVERY) -> Tensor:
    """The hint (B, 3, H, W) of `samples` in the latents' dtype; uint8 becomes 0..1.

    Raises `UsageError` if the hint does not fit the latents (B, C, h, w) of the whole batch.
    """
    if hint.dim() != 4 or hint.shape[1] != 3:
        raise UsageError(f"hint '{name}' has shape {tuple(hint.shape)}; a hint is an RGB batch (B, 3, H, W).")
    height, width = (side * vae_scale for side in latents.shape[-2:])
    if tuple(hint.shape[-2:]) != (height, width):
        size = f"{hint.shape[-1]}x{hint.shape[-2]}"
        raise UsageError(f"hint '{name}' is {size} pixels but the image is {width}x{height}; resize the hint to it.")
    check_batch(name, hint, latents)
    scale = 255 if hint.dtype == torch.uint8 else 1
    return samples.of_maps(hint).to(latents.device, latents.dtype) / scale


def check_batch(name: str, hint: Tensor, latents: Tensor) -> None:
    """Raises `UsageError` unless there is one hint, one per latent, or a divisor of them (guidance doubles latents)."""
    if len(latents) % max(len(hint), 1) or len(hint) == 0:
        raise UsageError(f"hint '{name}' has {len(hint)} maps for {len(latents)} latents; pass 1, or one per image.")


def repeated(features: Any, batch: int) -> Any:
    """Features for `batch` latents: guidance stacks [unconditional, conditional], so those of b hints all repeat.

    A single one stays as it is and is broadcast. Goes through dicts and lists.
    """
    if isinstance(features, dict):
        return {name: repeated(value, batch) for name, value in features.items()}
    if isinstance(features, list | tuple):
        return [repeated(value, batch) for value in features]
    if isinstance(features, Tensor) and features.dim() and len(features) not in (1, batch):
        return features.repeat(batch // len(features), *[1] * (features.dim() - 1))
    return features
