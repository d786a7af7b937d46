"""Tuners folded into the base's own weights, where that is exact.

What cannot be folded is refused by name. For DiffScaler's branch there is an approximation, made only when asked for:
relu(z) is replaced by p z, where p is the share of z > 0 on a fixed batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.loading import Backbone
from ..errors import DoesNotFit
from ..sites.attaching import channel, tuned
from ..sites.layers import find_module
from ..tuners.base import Tuner
from ..tuners.difffit import DiffFit, gamma_name
from ..tuners.diffscaler import DiffScaler, key
from ..tuners.peft_layers import PeftTuner, standin
from ..tuners.scedit import SCEdit
from ..tuners.swapping import WeightTuner
from .measuring import Batch

NOT_LINEAR = "edits the skip connections with a function that is not linear, and no weight of the base computes it"


@torch.no_grad()
def folded(backbone: Backbone, tuner: Tuner, batch: Batch | None = None) -> nn.Module:
    """A copy of the base's denoiser whose weights hold the tuner; `batch` allows DiffScaler's approximation.

    Raises `DoesNotFit` for what does not fold, saying why and what there is instead.
    """
    if tuner.new_classes is not None:
        raise DoesNotFit(
            "the tuner adds classes to the base, which a folder of the base's own layout has no rows for; "
            "use it as a tuner."
        )
    denoiser = copy.deepcopy(backbone.denoiser)
    if isinstance(tuner, WeightTuner):
        _swap(denoiser, tuner)
    elif isinstance(tuner, PeftTuner):
        _by_peft(denoiser, tuner)
    elif isinstance(tuner, DiffScaler):
        _affine(denoiser, tuner, _shares(backbone, tuner, batch) if batch else None)
    elif isinstance(tuner, SCEdit):
        raise DoesNotFit(f"{tuner.method} {NOT_LINEAR}; use it as a tuner.")
    else:
        raise DoesNotFit(f"{tuner.method} does not become a part of the base's weights; use it as a tuner.")
    return denoiser


def _swap(denoiser: nn.Module, tuner: WeightTuner) -> None:
    theirs = dict(denoiser.named_parameters())
    for name, own in tuner.standins().items():
        theirs[name].copy_(own)
    if not isinstance(tuner, DiffFit):
        return
    for site in tuner.sites:  # gamma y of a part whose last layer is linear
        part: Any = find_module(denoiser, site.name)
        last = part.to_out[0] if hasattr(part, "to_out") else part.net[-1]
        if not isinstance(last, nn.Linear):
            raise DoesNotFit(f"difffit scales {site.name}, whose last layer is a {type(last).__name__}.")
        gamma = tuner.get_parameter(gamma_name(site))
        last.weight.mul_(gamma[:, None])
        if last.bias is not None:
            last.bias.mul_(gamma)


def _by_peft(denoiser: nn.Module, tuner: PeftTuner) -> None:
    """peft's own merge, layer by layer."""
    for site, adapted in tuner.adapted.items():
        layer: Any = find_module(denoiser, site.name)
        wrapped = copy.deepcopy(adapted)
        wrapped.base_layer = standin(layer)
        wrapped.merge()
        layer.weight.copy_(wrapped.base_layer.weight)


def _affine(denoiser: nn.Module, tuner: DiffScaler, shares: Mapping[str, Tensor] | None) -> None:
    """W' = diag(1 + a) W and b' = b_hat + b; with `shares` also s W_up diag(p) W_down in the layer's middle tap."""
    if any(tuner.dims.values()) and shares is None:
        raise DoesNotFit(
            "diffscaler's branch has a ReLU, and no weight of the base computes it. --approximate replaces it by a "
            "linear map and says how far that is off; otherwise use it as a tuner."
        )
    if tuner.conditions:
        raise DoesNotFit("diffscaler with conditions reads maps, which the base does not; use it as a tuner.")
    for site in tuner.sites:
        own: Any = tuner.affiners[key(site.name)]
        layer: Any = find_module(denoiser, site.name)
        weight = layer.weight.clone()
        if own.scale is not None:
            weight.mul_((1 + own.scale).view(-1, *[1] * (weight.dim() - 1)))
        branch: Any = tuner.branches[key(tuner.branch_of[site.name])] if tuner.dims[site.name] else None
        offset = own.offset(None if branch is None else branch.gate)
        if branch is not None and shares is not None:
            share = shares[tuner.branch_of[site.name]]
            up = (own.up if branch.gate is None else branch.gate * own.up) * share
            product = torch.einsum("md,d...->m...", up, branch.down)
            if branch.bias is not None:
                extra = up @ branch.bias
                offset = extra if offset is None else offset + extra
            _at_middle(weight, product, site)
        layer.weight.copy_(weight)
        if offset is None or not offset.any():
            continue
        if layer.bias is None:
            raise DoesNotFit(
                f"{site.name} has no bias in this kind of base, and the tuner's shift needs one. "
                "Train with tuner.shift=biased to fold it, or use it as a tuner."
            )
        layer.bias.add_(offset)


def _at_middle(weight: Tensor, product: Tensor, site: Any) -> None:
    """Adds a map (m, n) or (m, n, k, k) to a layer's weight, at the tap that the branch reads."""
    if site.linear or product.shape[2:] == weight.shape[2:]:
        weight.add_(product)
        return
    top, left = ((side - 1) // 2 for side in site.kernel)
    weight[:, :, top, left].add_(product[:, :, 0, 0])


def _shares(backbone: Backbone, tuner: DiffScaler, batch: Batch) -> dict[str, Tensor]:
    """Of every branch, the share of the batch's values at which each unit is active."""
    counts: dict[str, tuple[Tensor, int]] = {}
    handles = []

    def count(name: str) -> Callable[..., None]:
        def hook(branch: nn.Module, args: tuple, output: Tensor) -> None:
            active = (output > 0).movedim(1, -1) if output.dim() == 4 else output > 0
            seen, number = counts.get(name, (0, 0))
            flat = active.flatten(0, -2)
            counts[name] = seen + flat.sum(0).float(), number + len(flat)

        return hook

    for name in {shared for site, shared in tuner.branch_of.items() if tuner.dims[site]}:
        handles.append(tuner.branches[key(name)].register_forward_hook(count(name)))
    try:
        with tuned(backbone.denoiser, tuner):
            backbone.family.output(backbone.denoiser, batch.latents, batch.t, batch.rows, channel(None))
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen / number for name, (seen, number) in counts.items()}
