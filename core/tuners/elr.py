"""ELR-Diffusion's stage II (anonymous submission, 2023): control by Kronecker updates of a frozen encoder copy.

The adapter is Uni-ControlNet's. Its copy keeps the base's weights, which are not stored again, neither in memory nor in
the tuner's file; every linear and convolutional layer of it is given an update dW = sum_i A_i (x) (u_i v_i) (eq. 9).
Norms, features and zero convolutions are trained as in Uni-ControlNet, of low rank where `ratio` says so. The base may
be of low rank itself, as the paper's stage I makes it. The paper gives neither n nor the rank; the copy's biases and
norms stay frozen, as it speaks of weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DoesNotFit, SctoolError
from ..sites.attaching import Attachment, all_or_none
from ..sites.layers import find_module
from .base import Terms
from .configs import ELRConfig, UniControlNetConfig
from .encoder_copy import DECODER, check_encoder, inject, shared_copy
from .fdn import Conv
from .kronecker import Kronecker
from .unicontrolnet import LocalAdapter, UniControlNet


class ELR(LocalAdapter):
    """The adapter with the base's own encoder as its copy, and updates of the copy's layers."""

    method = "elr"
    config: ELRConfig

    def __init__(self, config: ELRConfig, denoiser: Any, conditions: tuple[str, ...] = (), vae_scale: int = 8) -> None:
        super().__init__(config, denoiser, conditions, vae_scale)
        self.fdn = nn.ModuleList(nn.ModuleList(pair) for pair in self.norms(denoiser))
        self.updates = nn.ModuleDict()
        for name, layer in copied_layers(denoiser).items():
            try:
                self.updates[key(name)] = Kronecker(layer, config.n, config.rank)
            except DoesNotFit as error:
                raise DoesNotFit(f"{name}: {error}") from error
        self.shared: Sharing | None = None

    def describe_sites(self) -> list[str]:
        """Also how many layers are updated, and that the copy costs nothing."""
        config = self.config
        updates = f"{len(self.updates)} layers of the copy updated, n = {config.n}, rank {config.rank}"
        return [*super().describe_sites(), updates, "the copy's weights are the base's own"]

    def site_metadata(self) -> dict[str, Any]:
        """Also the number of updated layers."""
        return {**super().site_metadata(), "updates": len(self.updates)}

    def act(self, denoiser: nn.Module, terms: Terms) -> Attachment:
        """As `LocalAdapter.act`. A tuner is on one denoiser at a time, whose weights it reads.

        Raises `SctoolError` for a denoiser with other layers.
        """
        return all_or_none([partial(Sharing, self, denoiser), partial(super().act, denoiser, terms)])

    def encoder(self) -> Any:
        """The base's encoder with the updates."""
        assert self.shared is not None
        return self.shared.copy

    def precision(self, latents: Tensor) -> AbstractContextManager[Any]:
        """The base's own; what another tuner put among its weights in float32 is cast."""
        low = latents.dtype in (torch.bfloat16, torch.float16)
        return lowered(self.encoder(), latents.dtype) if low else nullcontext()

    def recompute(self) -> None:
        """Gradient checkpointing in the copy."""
        self.encoder().enable_gradient_checkpointing()

    @torch.no_grad()
    def folded(self, denoiser: Any) -> UniControlNet:
        """The same adapter as a Uni-ControlNet whose copy has the updates in its weights: W + dW, made once.

        Raises `SctoolError` for a base of low rank, whose layers have no weight to add to.
        """
        settings = {name: getattr(self.config, name) for name in UniControlNetConfig.model_fields}
        made = UniControlNet.build(UniControlNetConfig(**settings), denoiser, self.conditions, self.vae_scale)
        made.to(next(self.parameters()).dtype)
        for name, update in self.updates.items():
            layer: Any = find_module(made.copy, name.replace("/", "."))
            if "weight" not in layer._parameters:
                raise SctoolError(f"{name.replace('/', '.')} is of low rank and cannot take up an update of full size.")
            layer.weight.add_(update.materialised())  # type: ignore[operator] - a Kronecker
        made.extractor.load_state_dict(self.extractor.state_dict())
        made.zero.load_state_dict(self.zero.state_dict())
        for block, pair in zip(made.copy.down_blocks, self.fdn, strict=True):
            block.resnets[0].norm1.load_state_dict(pair[0].state_dict())  # type: ignore[index] - a ModuleList
            block.resnets[0].norm2.load_state_dict(pair[1].state_dict())  # type: ignore[index]
        return made


class Sharing:
    """A tuner's copy of a denoiser's encoder, until it is removed."""

    def __init__(self, tuner: ELR, denoiser: Any) -> None:
        """Raises `SctoolError` when the tuner has one already, or the denoiser has other layers."""
        if tuner.shared is not None:
            raise SctoolError("this elr tuner is already attached to a denoiser; detach it first.")
        check_encoder(denoiser, tuner.method)
        self.tuner, self.copy = tuner, shared_copy(denoiser)
        layers = copied_layers(self.copy)
        if [key(name) for name in layers] != list(tuner.updates):
            raise SctoolError("the denoiser's encoder is not as the tuner's; the tuner is for another base.")
        for layer, update in zip(layers.values(), tuner.updates.values(), strict=True):
            if not update.fits(layer):  # type: ignore[operator] - a Kronecker
                raise SctoolError(f"the denoiser's {layer} is not as the tuner's; the tuner is for another base.")
            layer.register_forward_hook(_Update(update).add)
        inject(self.copy, tuner.fdn)  # type: ignore[arg-type] - lists of FDNs
        tuner.shared = self

    def remove(self) -> None:
        """Lets the copy go; the denoiser was never touched."""
        self.tuner.shared = None


class _Update:
    """A bound method, so that a deep copy of the model uses the copy's updates."""

    def __init__(self, update: nn.Module) -> None:
        self.update = update

    def add(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """(W + dW) x + b."""
        return output + self.update(args[0]).to(output.dtype)


@contextmanager
def lowered(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it all weights of `network` are of `dtype`; afterwards they are the same parameters as before."""
    replaced: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    try:
        for module in network.modules():
            own: dict[str, Any] = module._parameters
            for name, weight in own.items():
                if weight is not None and weight.dtype != dtype and not isinstance(module, Conv):
                    replaced.append((own, name, weight))
                    own[name] = weight.to(dtype)
        yield
    finally:
        for own, name, weight in replaced:
            own[name] = weight


def copied_layers(denoiser: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear and convolutional layers of what is copied, by name; not the parts of a layer of low rank."""
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, module in denoiser.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.Linear | nn.Conv2d) and not inside and name.split(".")[0] not in DECODER:
            found[name] = module
    return found


def key(name: str) -> str:
    """A layer's name as that of a submodule, which may have no dots."""
    return name.replace(".", "/")
