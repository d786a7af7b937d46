"""DiffScaler (Nair et al. 2024, arXiv 2404.09976): an Affiner on each chosen layer of a frozen denoiser.

Where the paper contradicts itself, its printed counts decide: a starts at 0, so that 1 + a is 1; a and b have a number
per output; (1 + a) scales W x and not the layer's bias. How a map enters the denoiser it does not say, beyond "no
separate encoder, no zero convolutions": here, as further columns of W_down at the layer that reads the latents.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from ..errors import DoesNotFit, SctoolError, UsageError
from ..sites.inputs import input_layer
from ..sites.layers import Layer, find_module
from ..sites.parts import chosen_layers, family_of
from ..sites.site import Call, Features, Inputs
from .affiner import NEAR, Affiner, Branch, middle
from .base import SiteTuner
from .configs import DiffScalerConfig

if TYPE_CHECKING:
    from ..backbones.loading import Backbone


class DiffScaler(SiteTuner):
    """Equation 5 on every site; with conditions also on the input layer, whose branch reads them beside the latents."""

    method = "diffscaler"
    config: DiffScalerConfig

    def __init__(
        self, config: DiffScalerConfig, denoiser: nn.Module, conditions: tuple[str, ...] = (), vae_scale: int = 8
    ) -> None:
        chosen, self.first = chosen_layers(denoiser, config.layers), entry(denoiser) if conditions else None
        sites = chosen if self.first is None or self.first in chosen else [self.first, *chosen]
        super().__init__(config, sites, conditions, vae_scale)
        family = family_of(denoiser)
        self.parts, self.chosen = config.layers or family.adapted, len(chosen)
        self.dim = family.bottleneck if config.dim is None else config.dim
        self._check(denoiser)
        grouped = family.grouped if config.qkv == "grouped" else ""
        self.branch_of = {site.name: shared_name(site, grouped) for site in sites}
        self.sharers = Counter(self.branch_of.values())
        self.dims = self._dims(sites)
        self.branches, self.affiners = nn.ModuleDict(), nn.ModuleDict()
        for site in sites:
            self._add(site, biased=find_module(denoiser, site.name).bias is not None)
        self._latent: Callable[[Tensor], Tensor] | None = None

    def _check(self, denoiser: nn.Module) -> None:
        config = self.config
        if not (self.dim or any(config.dims.values()) or config.scale or config.shift != "none"):
            raise UsageError("dim=0, scale=false and shift=none leave nothing to train; allow one of them.")
        if self.conditions and not config.dims.get(self.first.name if self.first else "", self.dim):
            raise UsageError("conditions enter through the branch, and dim=0 leaves it out; give dim, or drop --cond.")
        for site in self.sites:
            layer: Any = find_module(denoiser, site.name)
            if not site.linear and (layer.groups, layer.dilation, layer.padding_mode) != (1, (1, 1), "zeros"):
                raise DoesNotFit(f"{site.name} is grouped, dilated or not padded with zeros; leave it out of layers.")
            if min(middle(site)) < 0:
                raise DoesNotFit(f"{site.name} has more padding than half its kernel; leave it out of layers.")

    def _dims(self, sites: Sequence[Layer]) -> dict[str, int]:
        """d by layer. Raises `DoesNotFit` for a layer that is not adapted, and for layers that share a branch."""
        given = self.config.dims
        if strange := sorted(given.keys() - self.branch_of.keys()):
            raise DoesNotFit(f"dims names {strange[0]}, which is not an adapted layer.")
        dims = {site.name: given.get(site.name, self.dim) for site in sites}
        widths: dict[str, int] = {}
        for name, shared in self.branch_of.items():
            if widths.setdefault(shared, dims[name]) != dims[name]:
                raise DoesNotFit(f"dims gives {name} another width than the layers that share its branch.")
        return dims

    def _add(self, site: Layer, biased: bool) -> None:
        """The Affiner of a site, and its branch where no other site has brought it."""
        config, name, dim = self.config, self.branch_of[site.name], self.dims[site.name]
        shift = config.shift == "all" or (config.shift == "biased" and biased)
        self.affiners[key(site.name)] = Affiner(site, dim, config.scale, shift, config.gate, config.branch_bias)
        if dim and key(name) not in self.branches:
            columns = dict.fromkeys(self.conditions, self.width) if site == self.first else {}
            self.branches[key(name)] = Branch(site, dim, config.gate, config.branch_bias, columns)

    @property
    def width(self) -> int:
        """The channels of a condition's features: those of a latent, or of all pixels under one of its places."""
        assert self.first is not None
        return self.first.inputs if self.config.hint == "vae" else 3 * self.vae_scale**2

    def describe_sites(self) -> list[str]:
        """The parts, with the number of layers and d."""
        dims = sorted({*self.dims.values()}) or [self.dim]
        width = str(dims[0]) if len(dims) == 1 else f"{dims[0]} to {dims[-1]}"
        lines = [f"{self.chosen} layers of {', '.join(self.parts)}, d = {width}"]
        if self.first is not None:
            form = "its latent" if self.config.hint == "vae" else "pixels"
            lines.append(f"{self.first.name} with {self.width} channels a condition ({form})")
        return lines

    def site_metadata(self) -> dict[str, Any]:
        """The parts, the layers' number and widths, and d."""
        widths = {
            "inputs": sum(site.inputs for site in self.sites),
            "outputs": sum(site.outputs for site in self.sites),
        }
        return {"sites": {"parts": list(self.parts), "layers": len(self.sites), **widths}, "dim": self.dim}

    # ------------------------------------------------------------------------------------------------ conditions

    def use(self, backbone: Backbone) -> None:
        """The base whose autoencoder encodes maps, for hint=vae; it is moved to where the maps are."""

        def latent(hint: Tensor) -> Tensor:
            backbone.vae.to(hint.device)  # training leaves it on the CPU, see `Backbone.free_encoders`
            return backbone.encode_images(2 * hint.float() - 1)[0]

        self._latent = latent  # a function: copies of the tuner share the base

    def encode(self, hints: dict[str, Tensor], inputs: Inputs | None = None) -> Features:
        """e(c) (B, C, h, w) on the latents' grid, for each given hint (B, 3, H, W) in 0..1."""
        encoded = self._encoded if self.config.hint == "vae" else self._unshuffled
        return {name: encoded(hint) for name, hint in hints.items()}

    def _unshuffled(self, hint: Tensor) -> Tensor:
        """Every pixel, (B, 3 f f, h, w) for an autoencoder of factor f."""
        return F.pixel_unshuffle(hint, self.vae_scale)

    @torch.no_grad()
    def _encoded(self, hint: Tensor) -> Tensor:
        """The mean of the map's latent, scaled as the denoiser takes latents."""
        if hint.is_meta or isinstance(hint, FakeTensor):
            return hint.new_empty(len(hint), self.width, *(side // self.vae_scale for side in hint.shape[-2:]))
        if self._latent is None:
            raise SctoolError(
                "hint=vae needs the base's autoencoder, and this tuner was given a denoiser alone; "
                "load it for the whole base: load_tuner(path, load_backbone(base))."
            )
        with torch.autocast(hint.device.type, enabled=False):
            return self._latent(hint).to(hint.device, hint.dtype)

    # ------------------------------------------------------------------------------------------------ equation 5

    def delta(self, site: Layer, x: Tensor, call: Call) -> Tensor | None:
        """a (x - b_hat) + s W_up relu(W_down [input; conditions]) + b, where x is the layer's output."""
        h, gate = self._hidden(site, x, call)
        assert call.module is not None
        return self.affiners[key(site.name)](x, h, gate, call.module.bias)

    def edited(self, site: Layer, x: Tensor, call: Call) -> Tensor | None:
        """x + delta with less memory. Not where the layer's own weights are trained too: it computes with their sum."""
        layer: Any = call.module
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return None
        if "near" not in call.scratch:
            call.scratch["near"] = near_zero({one.name: self.affiners[key(one.name)].scale for one in self.sites})
        near = call.scratch["near"].get(site.name)
        h, gate = self._hidden(site, x, call)
        return self.affiners[key(site.name)].lean(x, h, gate, layer, call.given, near)

    def _hidden(self, site: Layer, x: Tensor, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """h and s of the site's branch; h is computed once for all layers of a group that are given the same tensor."""
        if not self.dims[site.name]:
            return None, None
        name = self.branch_of[site.name]
        branch: Any = self.branches[key(name)]
        last = call.scratch.pop("hidden", None)
        if last is not None and last[0] == name and last[1] is call.given:
            h, left = last[2:]
        else:
            h, left = branch(call.given, x, self._weighted(call) if site == self.first else ()), self.sharers[name] - 1
        if left:  # not longer: a layer that is computed again in backward computes h again too
            call.scratch["hidden"] = name, call.given, h, left - 1
        return h, branch.gate

    @staticmethod
    def _weighted(call: Call) -> list[tuple[str, float, Tensor]]:
        """The conditions that have a hint now, with their weights and features."""
        named = call.features.items()
        return [(name, call.alphas[name], features) for name, features in named if call.alphas[name] != 0]


def near_zero(scales: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The rows of each a where |1 + a| < NEAR, of the layers that have any; {} where the values are not known.

    All layers at once, for one look at the device's memory. The answer holds for one call only: an optimizer changes a,
    and a fused one without changing its version.
    """
    if any(a is None or a.is_meta or isinstance(a, FakeTensor) for a in scales.values()):
        return {}
    near = (1 + torch.cat([a.detach() for a in scales.values()])).abs() < NEAR
    if not near.any():
        return {}
    parts = near.split([len(a) for a in scales.values()])
    rows = {name: part.nonzero()[:, 0] for name, part in zip(scales, parts, strict=True)}
    return {name: found for name, found in rows.items() if len(found)}


def key(name: str) -> str:
    """A layer's name as that of a submodule, which may have no dots."""
    return name.replace(".", "/")


def entry(denoiser: nn.Module) -> Layer:
    """The layer that conditions join. Raises `DoesNotFit` for a denoiser where it is not known."""
    try:
        return input_layer(denoiser)
    except SctoolError as error:
        raise DoesNotFit(str(error)) from error


def shared_name(site: Layer, grouped: str) -> str:
    """The name of a site's branch: its own, or that of the fused layer it is part of in the original."""
    match = re.search(grouped, site.name) if grouped else None
    return match[1] if match else site.name
