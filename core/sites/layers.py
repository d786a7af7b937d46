"""Linear and convolutional layers as sites: y = W x + b becomes y + delta(x, y), by public forward hooks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..backbones.upsampling import PhaseUpsample2D
from ..errors import SctoolError, UsageError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .site import SiteEdit


@dataclass(frozen=True)
class Layer:
    """A `Linear` or `Conv2d` by its name in the denoiser, with its widths; `kernel` is (1, 1) for a linear layer."""

    name: str
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)
    linear: bool = True

    def __str__(self) -> str:
        return f"{self.name} ({self.inputs} to {self.outputs})"

    @staticmethod
    def hook(denoiser: nn.Module, edits: Sequence[SiteEdit]) -> list[RemovableHandle]:
        """A forward hook on each layer. Raises `SctoolError` for a convolution whose upsampling is folded.

        A folded upsampler computes from its convolution's weights and never calls it: a hook would never fire.
        """
        folded = {id(module.conv) for module in denoiser.modules() if isinstance(module, PhaseUpsample2D)}
        layers = [(edit, find_module(denoiser, edit.site.name)) for edit in edits]
        for edit, layer in layers:
            if id(layer) in folded:
                raise SctoolError(
                    f"{edit.site.name} belongs to an upsampler that is folded already; attach before folding."
                )
        return [layer.register_forward_hook(_LayerHook(edit).edit) for edit, layer in layers]


class _LayerHook:
    """A bound method, so that a deep copy of the model uses the copy's tuners."""

    def __init__(self, edit: SiteEdit) -> None:
        self.layer = edit

    def edit(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """The edited output, given the layer's input."""
        return self.layer.edited(output, args[0], layer)


def find_module(denoiser: nn.Module, name: str) -> nn.Module:
    """The module of that name. Raises `SctoolError` where there is none."""
    try:
        return denoiser.get_submodule(name)
    except AttributeError as error:
        raise SctoolError(f"this {type(denoiser).__name__} has no {name}; the tuner is for another one.") from error


def layer_site(name: str, module: nn.Linear | nn.Conv2d) -> Layer:
    """The site of one layer."""
    if isinstance(module, nn.Linear):
        return Layer(name, module.in_features, module.out_features)
    geometry: dict[str, Any] = {"kernel": module.kernel_size, "stride": module.stride, "padding": module.padding}
    return Layer(name, module.in_channels, module.out_channels, **geometry, linear=False)


def layers(denoiser: nn.Module, pattern: str = "") -> list[Layer]:
    """Every `Linear` and `Conv2d` whose name contains a match of the regular expression, in the denoiser's order.

    Read from the modules, so it works on the meta device. Raises `UsageError` for a pattern that is not valid or
    matches no layer.
    """
    try:
        matcher = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"'{pattern}' is not a valid regular expression: {error}.") from error
    chosen = [
        layer_site(name, module)
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and matcher.search(name)
    ]
    if not chosen:
        raise UsageError(f"no linear or convolutional layer of the denoiser matches '{pattern}'.")
    return chosen
