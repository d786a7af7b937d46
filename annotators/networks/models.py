"""What the annotators that run a network share: settings, weights, loading once a process, and batching by shape.

The same pixels give the same map in any batch, up to the rounding of the network's arithmetic.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ...core.config import Config
from ...core.devices import best_device, torch_dtype
from ...core.errors import SctoolError, UsageError
from ..base import Annotator, Params
from .weights import Found, locate

if TYPE_CHECKING:
    from torch import Tensor

PASS = 512 * 512
"""Pixels of one of the `batch` pictures of a forward pass; larger pictures go in smaller batches."""
KEPT = 8
"""Networks that a process keeps loaded."""


class ModelSettings(Config):
    """Settings of every annotator that runs a network; subclasses say which by default."""

    model: str
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="arithmetic of the network; auto is fp32 on CPU and 16 bits on CUDA"
    )
    batch: int = Field(8, ge=1, description="pictures of 512x512 in one forward pass; changes no map but for rounding")


class ModelAnnotator(Annotator):
    """An annotator whose map is a network's. Weights are hashed where it was made and loaded where it is called."""

    half: ClassVar[Literal["bf16", "fp16"]] = "fp16"
    """What `dtype=auto` means on CUDA: fp16 is finer; bf16 for networks whose activations overflow it."""

    @property
    def network_settings(self) -> ModelSettings:
        """The settings, known to be a network's."""
        assert isinstance(self.settings, ModelSettings)
        return self.settings

    @cached_property
    def weights(self) -> Found:
        """The weights that `model` names. Raises `SctoolError` naming the remedy when they are not at hand."""
        return locate(self.name, self.network_settings.model)

    def ready(self) -> None:
        """Raises `SctoolError`, naming the remedy, when the weights are not on this machine."""
        _ = self.weights

    @property
    def dtype(self) -> str:
        """The arithmetic that `dtype` means on this machine: fp32, bf16 or fp16."""
        wanted = self.network_settings.dtype
        return (self.half if best_device() == "cuda" else "fp32") if wanted == "auto" else wanted

    @property
    def made_by(self) -> dict[str, Any]:
        """What is noted with every map: settings, network, hash of its weights, revision, arithmetic.

        `model` finds the same network again, so that a map can be made again as the settings say.
        """
        found = self.weights
        noted = self.settings.model_dump(mode="json", exclude={"batch"})
        return noted | {
            "model": found.source,
            "weights_sha256": found.sha256,
            "revision": found.revision,
            "dtype": self.dtype,
        }

    @property
    def id(self) -> dict[str, Any]:
        """As in the contract: the weights' content counts, not where they lie."""
        libraries = {name: version(name) for name in ("torch", "transformers")}
        network = {"model": self.weights.name, "config_sha256": self.weights.config_sha256}
        made_by = {key: value for key, value in self.made_by.items() if key != "revision"}
        return {"name": self.name, "version": self.version} | made_by | network | libraries

    def annotate(self, image: np.ndarray, key: str) -> tuple[np.ndarray, Params]:
        """The map of one uint8 (H, W, 3) RGB picture; see `maps`."""
        return self([image], [key])[0]

    def __call__(self, images: list[np.ndarray], keys: list[str]) -> list[tuple[np.ndarray, Params]]:
        """Maps of a batch, as in the contract. Raises `SctoolError` when they do not fit into the GPU's memory."""
        import torch

        if not images:
            return []
        try:
            with torch.inference_mode():
                made = self.maps(images)
        except torch.OutOfMemoryError as error:
            batch = self.network_settings.batch
            raise SctoolError(
                f"{self.name}: the GPU's memory does not hold batch={batch}. Give less, e.g. --cond {self.name}:"
                f"batch={max(1, batch // 4)}, fewer --jobs, or smaller pictures with --size."
            ) from error
        made_by = self.made_by
        return [(map, {**made_by, **params}) for map, params in made]

    @abstractmethod
    def maps(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, Params]]:
        """The uint8 map of each uint8 (H, W, 3) picture and the parameters that this condition adds."""

    def passes(self, shapes: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """Indices of what goes through the network together: one shape (…, h, w), at most `batch` of 512x512."""
        batch = self.network_settings.batch
        for group in grouped(shapes):
            height, width = shapes[group[0]][-2:]
            most = max(1, batch * PASS // max(PASS, height * width))
            yield from (group[i : i + most] for i in range(0, len(group), most))


def grouped(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal keys, groups and members in order of appearance."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def on_device(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 (H, W, 3) pictures of one size as one uint8 (N, 3, H, W) on the device."""
    import torch

    stack = torch.from_numpy(np.stack(images)) if len(images) > 1 else torch.from_numpy(np.array(images[0])[None])
    return stack.to(best_device()).permute(0, 3, 1, 2)


class Transformer:
    """A transformers network and its image processor, on the device."""

    def __init__(self, network: Any, processor: Any, folder: Path) -> None:
        self.network, self.processor, self.folder, self.config = network, processor, folder, network.config

    def pixel_values(self, images: list[np.ndarray], **options: Any) -> list[Tensor]:
        """Each picture as the network's float32 (3, h, w): the model's own resize rule, in one go a picture size."""
        found: dict[int, Tensor] = {}
        for group in grouped([image.shape for image in images]):
            stack = on_device([images[i] for i in group])
            values = self.processor(
                images=list(stack),
                return_tensors="pt",
                device=stack.device,
                disable_grouping=False,
                input_data_format="channels_first",
                **options,
            )["pixel_values"]
            found.update(zip(group, values, strict=True))
        return [found[i] for i in range(len(images))]

    def __call__(self, values: Sequence[Tensor], **inputs: Any) -> Any:
        """The network's outputs for stacked pixel values; every floating tensor among them float32."""
        import torch

        outputs = self.network(torch.stack(list(values)).to(self.network.dtype), **inputs)
        for name, value in list(outputs.items()):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                outputs[name] = value.float()
        return outputs


def load_transformer(
    what: str, found: Found, dtype: str, architectures: tuple[str, ...], **options: Any
) -> Transformer:
    """The network in a folder, loaded once a process and kept.

    what: setting and value for messages. architectures: the transformers classes that do this work. options: to the
    image processor. Raises `UsageError` for another kind of network and `SctoolError` for files that cannot be read.
    """

    def load() -> Transformer:
        return _load_transformer(what, found.path, dtype, architectures, options)

    return kept(load, found, dtype, best_device(), architectures)


def kept(load: Callable[[], Any], found: Found, *key: Hashable) -> Any:
    """`load()`, or what it gave in this process for the same weights and key; the `KEPT` last used stay."""
    whole = (found.path, found.sha256, found.config_sha256, *key)
    network = _loaded.pop(whole) if whole in _loaded else load()
    _loaded[whole] = network
    while len(_loaded) > KEPT:
        del _loaded[next(iter(_loaded))]
    return network


_loaded: dict[Hashable, Any] = {}


def _load_transformer(
    what: str, folder: Path, dtype: str, architectures: tuple[str, ...], options: dict[str, Any]
) -> Transformer:
    import transformers
    from transformers.utils import logging

    if not folder.is_dir():
        raise UsageError(f"{what} is a file; give the folder that holds config.json and model.safetensors.")
    logging.disable_progress_bar()  # it would break ours
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        named = (config.architectures or ["no network"])[0]
        if named not in architectures:
            raise UsageError(f"{what} holds a {named}; this condition runs {', '.join(architectures)}.")
        network = getattr(transformers, named).from_pretrained(
            str(folder), local_files_only=True, dtype=torch_dtype(dtype), weights_only=True
        )
        processor = transformers.AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, **options)
    except SctoolError:
        raise
    except Exception as error:  # the files' readers and the network's classes each have their own kinds
        raise SctoolError(
            f"{what}: {folder} cannot be loaded ({str(error).strip().splitlines()[0]}). It is damaged or no folder "
            "in transformers' format; what came from the hub is checked by: sctool weights verify"
        ) from error
    return Transformer(network.eval().requires_grad_(False).to(best_device()), processor, folder)
