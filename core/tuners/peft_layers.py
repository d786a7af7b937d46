"""LoRA, DoRA and LoKr: three papers in one file, since the layers are peft's own and only their settings differ.

LoRA (Hu et al. 2021, arXiv 2106.09685), DoRA (Liu et al. 2024, arXiv 2402.09353) and LoKr (LyCORIS, Yeh et al. 2023,
arXiv 2309.14859). Each chosen layer is wrapped by peft once, outside the denoiser; at the layer's site, peft's layer
is given the layer's input x and output y, and what it makes of y is the edit. So the denoiser keeps its modules and
their names, and these methods compose with all others: tuners attached together see the same y.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoKrConfig as PeftLoKrConfig
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn

from ..errors import DoesNotFit, SctoolError, UsageError
from ..sites.attaching import Attachment, all_or_none
from ..sites.layers import Layer, find_module, layer_site
from ..sites.parts import chosen_layers
from ..sites.site import Call
from .base import SiteTuner, Terms
from .configs import DoRAConfig, LoKrConfig, LoRAConfig
from .tree import place

ADAPTER = "default"
"""peft's name of an adapter; every layer has one."""


@dataclass(eq=False)
class Known:
    """What a peft layer wraps here: the denoiser's layer, whose output is known already.

    DoRA reads its weight and bias, LoKr the shape of its weight and the geometry of a convolution.
    """

    layer: Any

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y for x."""
        return y

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)
    stride = property(lambda self: self.layer.stride)
    padding = property(lambda self: self.layer.padding)
    dilation = property(lambda self: self.layer.dilation)
    groups = property(lambda self: self.layer.groups)


def standin(layer: nn.Linear | nn.Conv2d, weights: bool = True) -> nn.Module:
    """A float32 copy of a layer for peft to wrap; draws no random numbers. Without `weights` only its shape counts."""
    device, bias = layer.weight.device, layer.bias is not None
    if isinstance(layer, nn.Linear):
        copy = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, bias=bias, device=device)
    else:
        copy = nn.utils.skip_init(
            nn.Conv2d, layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, layer.groups, bias, device=device,
        )  # fmt: skip
    if not weights:
        return copy
    with torch.no_grad():  # not by state: a low-rank layer's weight is a product
        copy.weight.copy_(layer.weight)
        if layer.bias is not None:
            copy.bias.copy_(layer.bias)
    return copy


def wrapped(layer: Any, config: PeftConfig) -> Any:
    """peft's layer around a copy of `layer`, a `Linear` or `Conv2d`: new float32 adapters on its device."""
    reads_weights = getattr(config, "use_dora", False)  # for the magnitudes; the others start from shapes alone
    holder = nn.ModuleDict({"layer": standin(layer, weights=reads_weights)})
    inject_adapter_in_model(config, holder, ADAPTER)
    return holder["layer"]


class Wrapping:
    """peft's layers around those of a denoiser, until it is removed."""

    def __init__(self, adapted: Mapping[Layer, Any], denoiser: nn.Module) -> None:
        """Raises `SctoolError` when they are around some already, or the denoiser has others."""
        self.adapted = list(adapted.values())
        if any(hasattr(layer, "base_layer") for layer in self.adapted):
            raise SctoolError("this tuner is already attached to a denoiser; detach it first.")
        found = [find_module(denoiser, site.name) for site in adapted]
        for site, module in zip(adapted, found, strict=True):
            if not isinstance(module, nn.Linear | nn.Conv2d) or layer_site(site.name, module) != site:
                raise SctoolError(f"the denoiser's {site.name} is not as the tuner's; the tuner is for another base.")
        for layer, module in zip(self.adapted, found, strict=True):
            layer.base_layer = Known(module)

    def remove(self) -> None:
        """Lets the denoiser's layers go."""
        for layer in self.adapted:
            del layer.base_layer


class PeftTuner(SiteTuner):
    """peft's layers at the sites that `layers` chooses. A scale multiplies what they add, alpha / rank included."""

    needs_autocast = True  # peft computes in the precision of its weights: without autocast, in float32
    config: LoRAConfig | LoKrConfig

    def __init__(
        self,
        config: LoRAConfig | LoKrConfig,
        denoiser: nn.Module,
        conditions: tuple[str, ...] = (),
        vae_scale: int = 8,
    ) -> None:
        if conditions:
            raise UsageError(f"{self.method} takes no condition maps; drop --cond, or use --method scedit.")
        super().__init__(config, chosen_layers(denoiser, config.layers), (), vae_scale)
        for key in ("ranks", "alphas"):
            if strange := sorted(getattr(config, key, {}).keys() - {site.name for site in self.sites}):
                raise DoesNotFit(f"{key} names {strange[0]}, which is not an adapted layer.")
        self.adapted: dict[Layer, Any] = {}
        for site in self.sites:
            layer = wrapped(find_module(denoiser, site.name), self.settings(site))
            del layer.base_layer
            self.adapted[site] = layer
            place(self, site.name, layer)
        self.train(self.training)

    def settings(self, site: Layer) -> PeftConfig:
        """peft's own configuration of a layer."""
        raise NotImplementedError

    def describe_sites(self) -> list[str]:
        """How many layers, and the first and last."""
        first, last = self.sites[0], self.sites[-1]
        return [f"{len(self.sites)} layers, {first} ... {last}" if len(self.sites) > 1 else str(first)]

    def train(self, mode: bool = True) -> PeftTuner:
        """Leaves peft's layers in evaluation mode: in training, LoKr's draw from torch's global generator.

        They do so for dropouts, which no method here has; a resumed run could not repeat the draws.
        """
        super().train(mode)
        for layer in self.adapted.values():
            layer.eval()
        return self

    def act(self, denoiser: nn.Module, terms: Terms) -> Attachment:
        """As `SiteTuner.act`. A tuner is on one denoiser at a time, whose weights it reads.

        Raises `SctoolError` for a denoiser with other layers.
        """
        return all_or_none([partial(Wrapping, self.adapted, denoiser), partial(super().act, denoiser, terms)])

    def edited(self, site: Layer, x: Tensor, call: Call) -> Tensor:
        """What peft's layer makes of the layer's output x, given its input."""
        return self.adapted[site](call.given, x)

    def delta(self, site: Layer, x: Tensor, call: Call) -> Tensor:
        """What peft's layer makes of the layer's output x, given its input, less x."""
        return self.adapted[site](call.given, x) - x


class LoRA(PeftTuner):
    """y + (alpha / rank) B A x; A starts as peft's (Kaiming, uniform), B at zero."""

    method = "lora"
    config: LoRAConfig

    def settings(self, site: Layer) -> PeftConfig:
        """As peft names them."""
        rank = self.config.ranks.get(site.name, self.config.rank)
        alpha = self.config.alphas.get(site.name, self.config.alpha)
        return LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=["layer"])


class DoRA(LoRA):
    """m (W + (alpha / rank) B A) / |W + (alpha / rank) B A| x + b, with the norm over each row and m trained.

    m starts at the rows' norms. A scale s gives y + s (DoRA's output - y), linear in what the method adds.
    """

    method = "dora"
    config: DoRAConfig

    def settings(self, site: Layer) -> PeftConfig:
        """LoRA's with `use_dora`."""
        settings = super().settings(site)
        settings.use_dora = True
        return settings


class LoKr(PeftTuner):
    """y + (alpha / rank) (W1 kron W2) x, where W2, or both, are products of rank `rank` when that is smaller."""

    method = "lokr"
    config: LoKrConfig

    def settings(self, site: Layer) -> PeftConfig:
        """As peft names them."""
        config = self.config
        return PeftLoKrConfig(
            r=config.rank,
            alpha=config.rank if config.alpha is None else config.alpha,
            decompose_both=config.decompose_both,
            decompose_factor=config.decompose_factor,
            target_modules=["layer"],
        )
