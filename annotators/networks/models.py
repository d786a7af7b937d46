"""Shared by the annotators that run a network: settings, weights, loading once per process, batching by shape.

The same pixels give the same map in any batch, up to floating-point rounding.
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

from ...core.devices import best_device, torch_dtype
from ...core.errors import SctoolError, UsageError
from ...core.resolving import Config
from ..base import Annotator, Params
from .weights import LocalWeights, find_weights

if TYPE_CHECKING:
    from torch import Tensor

BATCH_PIXELS = 512 * 512
"""Pixels per image that `batch` assumes; larger images go in smaller batches."""
MAX_LOADED = 8
"""Networks that a process keeps in memory."""


class ModelSettings(Config):
    """Settings of every annotator that runs a network; subclasses set the default model."""

    model: str
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="precision of the network; auto is fp32 on CPU and 16 bits on CUDA"
    )
    batch: int = Field(8, ge=1, description="images of 512x512 per forward pass; changes maps only by rounding")


class ModelAnnotator(Annotator):
    """An annotator that runs a network. Making it hashes the weights, calling it loads them."""

    half: ClassVar[Literal["bf16", "fp16"]] = "fp16"
    """What `dtype=auto` means on CUDA: fp16 is more precise; bf16 for networks whose activations overflow fp16."""

    @property
    def network_settings(self) -> ModelSettings:
        """The settings, with their type."""
        assert isinstance(self.settings, ModelSettings)
        return self.settings

    @cached_property
    def weights(self) -> LocalWeights:
        """The weights that `model` names. Raises `SctoolError` with the remedy if they are not on this machine."""
        return find_weights(self.name, self.network_settings.model)

    def ready(self) -> None:
        """Raises `SctoolError` with the remedy if the weights are not on this machine."""
        _ = self.weights

    @property
    def dtype(self) -> str:
        """The precision that `dtype` means on this machine: fp32, bf16 or fp16."""
        wanted = self.network_settings.dtype
        return (self.half if best_device() == "cuda" else "fp32") if wanted == "auto" else wanted

    @property
    def made_by(self) -> dict[str, Any]:
        """What is recorded with every map: settings, network, hash of its weights, revision, precision.

        `model` finds the same network again, so that a map can be made again from the record.
        """
        settings = self.settings.model_dump(mode="json", exclude={"batch"})
        return settings | {
            "model": self.weights.source,
            "weights_sha256": self.weights.sha256,
            "revision": self.weights.revision,
            "dtype": self.dtype,
        }

    def made_with_same_settings(self, params: Params) -> bool:
        """As in the base class. `batch` and `dtype=auto` do not count; a path may be recorded whole or as its name."""
        settings = self.settings.model_dump(mode="json", exclude={"batch"})
        if settings["dtype"] == "auto":
            del settings["dtype"]
        same_network = {
            key: params.get(key) in (model, Path(model).name, str(Path(model).expanduser().absolute()))
            for key, model in settings.items()
            if key in ("model", "detector")
        }
        return all(key in params and same_network.get(key, params[key] == value) for key, value in settings.items())

    @property
    def id(self) -> dict[str, Any]:
        """As in the base class; the content of the weights counts, not their location."""
        libraries = {name: version(name) for name in ("torch", "transformers")}
        network = {"model": self.weights.name, "config_sha256": self.weights.config_sha256}
        made_by = {key: value for key, value in self.made_by.items() if key != "revision"}
        return {"name": self.name, "version": self.version} | made_by | network | libraries

    def annotate(self, image: np.ndarray, key: str) -> tuple[np.ndarray, Params]:
        """The map of one uint8 (H, W, 3) RGB image; see `maps`."""
        return self([image], [key])[0]

    def __call__(self, images: list[np.ndarray], keys: list[str]) -> list[tuple[np.ndarray, Params]]:
        """As in the base class. Raises `SctoolError` if the batch does not fit into GPU memory."""
        import torch

        if not images:
            return []
        try:
            with torch.inference_mode():
                results = self.maps(images)
        except torch.OutOfMemoryError as error:
            batch = self.network_settings.batch
            raise SctoolError(
                f"{self.name}: out of GPU memory with batch={batch}. Use a smaller batch, e.g. --cond {self.name}:"
                f"batch={max(1, batch // 4)}, fewer --jobs, or smaller images with --size."
            ) from error
        made_by = self.made_by
        return [(map, {**made_by, **params}) for map, params in results]

    @abstractmethod
    def maps(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, Params]]:
        """The uint8 map of each uint8 (H, W, 3) image, and the parameters that this condition adds to the record."""

    def batches(self, shapes: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """Indices of images for one forward pass: of one shape (…, h, w), at most `batch` of 512x512."""
        batch = self.network_settings.batch
        for group in group_equal(shapes):
            height, width = shapes[group[0]][-2:]
            step = max(1, batch * BATCH_PIXELS // max(BATCH_PIXELS, height * width))
            yield from (group[i : i + step] for i in range(0, len(group), step))


def group_equal(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal keys, groups and members in order of appearance."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def to_device(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 (H, W, 3) images of one size as one uint8 (N, 3, H, W) tensor on the device."""
    import torch

    stack = torch.from_numpy(np.stack(images)) if len(images) > 1 else torch.from_numpy(np.array(images[0])[None])
    return stack.to(best_device()).permute(0, 3, 1, 2)


class Transformer:
    """A transformers network and its image processor, on the device."""

    def __init__(self, network: Any, processor: Any, folder: Path) -> None:
        self.network, self.processor, self.folder, self.config = network, processor, folder, network.config

    def pixel_values(self, images: list[np.ndarray], **options: Any) -> list[Tensor]:
        """The network's input for each image, float32 (3, h, w), by the model's own resize rule."""
        inputs: dict[int, Tensor] = {}
        for group in group_equal([image.shape for image in images]):
            stack = to_device([images[i] for i in group])
            values = self.processor(
                images=list(stack),
                return_tensors="pt",
                device=stack.device,
                disable_grouping=False,
                input_data_format="channels_first",
                **options,
            )["pixel_values"]
            inputs.update(zip(group, values, strict=True))
        return [inputs[i] for i in range(len(images))]

    def __call__(self, values: Sequence[Tensor], **inputs: Any) -> Any:
        """The network's outputs for a batch of pixel values; floating-point tensors are converted to float32."""
        import torch

        outputs = self.network(torch.stack(list(values)).to(self.network.dtype), **inputs)
        for name, value in list(outputs.items()):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                outputs[name] = value.float()
        return outputs


def load_transformer(
    what: str, weights: LocalWeights, dtype: str, architectures: tuple[str, ...], **options: Any
) -> Transformer:
    """The network in a folder, loaded once per process.

    what: setting and value, for messages. architectures: the accepted transformers classes. options: of the image
    processor. Raises `UsageError` for another kind of network and `SctoolError` for files that cannot be read.
    """

    def load() -> Transformer:
        return _load_transformer(what, weights.path, dtype, architectures, options)

    return load_once(load, weights, dtype, best_device(), architectures)


def load_once(load: Callable[[], Any], weights: LocalWeights, *key: Hashable) -> Any:
    """The result of `load()`, cached in this process by weights and key; the `MAX_LOADED` last used ones are kept."""
    full_key = (weights.path, weights.sha256, weights.config_sha256, *key)
    network = _loaded.pop(full_key) if full_key in _loaded else load()
    _loaded[full_key] = network
    while len(_loaded) > MAX_LOADED:
        del _loaded[next(iter(_loaded))]
    return network


_loaded: dict[Hashable, Any] = {}


def _load_transformer(
    what: str, folder: Path, dtype: str, architectures: tuple[str, ...], options: dict[str, Any]
) -> Transformer:
    import transformers
    from transformers.utils import logging

    if not folder.is_dir():
        raise UsageError(f"{what} is a file; give the folder with config.json and model.safetensors.")
    logging.disable_progress_bar()  # it would break the progress bar of sctool
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        architecture = (config.architectures or ["no network"])[0]
        if architecture not in architectures:
            raise UsageError(f"{what} contains a {architecture}; this condition needs {' or '.join(architectures)}.")
        network = getattr(transformers, architecture).from_pretrained(
            str(folder), local_files_only=True, dtype=torch_dtype(dtype), weights_only=True
        )
        processor = transformers.AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, **options)
    except SctoolError:
        raise
    except Exception as error:  # the file readers and the network classes raise many different types
        raise SctoolError(
            f"{what}: {folder} cannot be loaded ({str(error).strip().splitlines()[0]}). It is damaged, or not a "
            "folder in transformers' format. To check files from the hub, run: sctool weights verify"
        ) from error
    return Transformer(network.eval().requires_grad_(False).to(best_device()), processor, folder)
