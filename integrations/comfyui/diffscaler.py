"""DiffScaler (arXiv 2404.09976): what the Affiners add to the layers of ComfyUI's U-Net.

The formula is that of sctool's core/tuners/affiner.py, read off the names of the file's weights.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from functools import partial
from typing import Any

import comfy.utils
from torch import Tensor, nn

from .tuner import KEY, Hints, Options, Tuner, apply


class DiffScaler(Tuner):
    """The Affiner of every layer: y = (1 + a) W x + s W_up relu(W_down x) + b_hat + b (equation 5)."""

    def fit(self, unet: nn.Module, config: dict[str, Any], hints: Hints) -> None:
        """The layers go by diffusers' names in the file, and ComfyUI knows what they are called here."""
        if self.meta["conditions"] or self.meta.get("classes") or hints:
            raise ValueError(f"{self.name} is a DiffScaler; this node takes such without conditions, hints or classes.")
        names, modules = comfy.utils.unet_to_diffusers(config), dict(unet.named_modules())
        self.places: dict[str, str] = {}
        for key in dict.fromkeys(name.split(".")[1] for name in self.weights if name.startswith("affiners.")):
            place = names.get(f"{key.replace('/', '.')}.weight", "").removesuffix(".weight")
            there, here = self.width(key), width_of(modules.get(place))
            if any(ours and ours != theirs for ours, theirs in zip(there, here, strict=True)):
                raise self.misfit(key.replace("/", "."), shown(there), shown(here))
            self.places[place] = key

    def width(self, key: str) -> tuple[int, int]:
        """Inputs and outputs of an adapted layer; 0 for those that the weights do not tell."""
        down = self.weights.get(f"branches.{key}.down")
        own = [self.weights.get(f"affiners.{key}.{part}") for part in ("up", "scale", "shift")]
        return 0 if down is None else down.shape[1], next(len(weight) for weight in own if weight is not None)

    def delta(self, key: str, layer: Any, x: Tensor, y: Tensor) -> Tensor | None:
        """a (y - b_hat) + s W_up relu(W_down x) + b, for a layer's input x and output y; None for nothing.

        A convolution's W_down is 1x1 and reads the middle of each window, which all paddings here make x itself.
        """
        a, b, up, bias = (self.weights.get(f"affiners.{key}.{part}") for part in ("scale", "shift", "up", "bias"))
        down, inner, s = (self.weights.get(f"branches.{key}.{part}") for part in ("down", "bias", "gate"))
        if s is not None:
            up, bias = None if up is None else s * up, None if bias is None else s * bias
        shift = b if bias is None else bias if b is None else b + bias
        total = None if shift is None else along(shift, y).expand_as(y)
        if down is not None and up is not None:
            hidden = apply(x, down, inner, getattr(layer, "stride", 1)).relu()
            total = apply(hidden.to(y.dtype), up, shift)
        if a is None:
            return total
        scaled = along(a, y) * (y if layer.bias is None else y - along(layer.bias, y))
        return scaled if total is None else total + scaled


def width_of(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a layer; -1 where there is none."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return (layer.in_channels, layer.out_channels) if isinstance(layer, nn.Conv2d) else (-1, -1)


def shown(width: tuple[int, int]) -> str:
    """Inputs and outputs, for messages."""
    return "absent" if width[0] < 0 else f"{width[0] or 'any'} to {width[1]}"


def along(vector: Tensor, y: Tensor) -> Tensor:
    """A vector over the channels of y, (B, C, h, w) or (..., C), in its dtype."""
    return vector.to(y)[:, None, None] if y.dim() == 4 else vector.to(y)


def edit_layers(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """ComfyUI's wrapper of the U-Net's call: while it lasts, hooks add every tuner's delta to the layers' outputs."""
    options: Options = kwargs.get("transformer_options") or args[5]
    acting: dict[str, list[tuple[DiffScaler, str]]] = {}
    for one in options["patches"][KEY]:
        for place, key in one.places.items() if isinstance(one, DiffScaler) else ():
            acting.setdefault(place, []).append((one, key))
    unet = executor.class_obj
    handles = [unet.get_submodule(place).register_forward_hook(partial(edit_layer, on)) for place, on in acting.items()]
    try:
        return executor(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def edit_layer(acting: list[tuple[DiffScaler, str]], layer: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """The output y of a layer that was given x, plus every tuner's delta of the unedited y."""
    out = y
    for one, key in acting:
        delta = one.delta(key, layer, given[0], y)
        out = out if delta is None else out + one.strength * delta
    return out
