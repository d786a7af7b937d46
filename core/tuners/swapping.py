"""Training some of the denoiser's own weights: float32 copies that stand in their place while they are attached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import SctoolError, UsageError
from ..resolving import Config
from ..sites.attaching import Removable
from .base import Terms, Tuner
from .tree import place

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class WeightTuner(Tuner):
    """Trainable float32 copies of the parameters that `names` chooses; attaching puts them in the denoiser.

    Where the denoiser has another precision, a module whose weights are replaced in part computes with copies in that
    precision, and gradients reach the float32 weights through the cast. A method that replaces all asks for autocast.
    """

    def __init__(
        self, config: Config, denoiser: nn.Module, conditions: tuple[str, ...] = (), vae_scale: int = 8
    ) -> None:
        if conditions:
            raise UsageError(f"{self.method} takes no condition maps; drop --cond, or use --method scedit.")
        super().__init__(config, (), vae_scale)
        theirs = dict(denoiser.named_parameters())
        self.swapped = self.names(denoiser)
        for name in self.swapped:
            place(self, name, nn.Parameter(theirs[name].detach().float().clone()))

    def names(self, denoiser: nn.Module) -> list[str]:
        """The names of the parameters that are trained, in the denoiser's order."""
        raise NotImplementedError

    def standins(self) -> dict[str, nn.Parameter]:
        """The trained copies, by the denoiser's names."""
        own = dict(self.named_parameters())
        return {name: own[name] for name in self.swapped}

    def replaced(self) -> int:
        """The number of the denoiser's parameters that the copies stand in for."""
        return sum(parameter.numel() for parameter in self.standins().values())

    def describe_sites(self) -> list[str]:
        """How much of the denoiser is trained."""
        return [f"{len(self.swapped)} of the base's parameters, {self.replaced():,} weights"]

    def act(self, denoiser: nn.Module, terms: Terms) -> Removable:
        """Swaps the copies in. Raises `SctoolError` when they do not fit or are in already, or for a scale."""
        if terms.scale != 1:
            raise UsageError(f"weights tuned by {self.method} have no scale, but {terms.scale} was given; use 1.")
        own, theirs = self.standins(), dict(denoiser.named_parameters())
        if self.names(denoiser) != list(own) or any(own[name].shape != theirs[name].shape for name in own):
            raise SctoolError(f"this {self.method} tuner has other weights than the denoiser; it is for another base.")
        if any(own[name] is theirs[name] for name in own):
            raise SctoolError(f"this {self.method} tuner is already attached to the denoiser.")
        swap = _Swap()
        for name, parameter in own.items():
            path, _, leaf = name.rpartition(".")
            swap.put(denoiser.get_submodule(path), leaf, parameter, cast=not self.needs_autocast)
        return swap


@dataclass(eq=False)
class _Swap:
    """The denoiser's own parameters, by the module that holds them, while the tuner's are in their place."""

    originals: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)

    def put(self, module: nn.Module, name: str, own: nn.Parameter, cast: bool) -> None:
        """Puts `own` in the place of the module's parameter `name`; `cast`: in that parameter's precision."""
        original = module._parameters[name]
        assert original is not None
        self.originals.append((module, name, original))
        module._parameters[name] = own
        if cast and own.dtype != original.dtype:
            hook = _Cast(name, own, original.dtype)
            self.handles += [
                module.register_forward_pre_hook(hook.lower),
                module.register_forward_hook(hook.restore, always_call=True),
            ]

    def remove(self) -> None:
        """Puts the very same parameters back."""
        while self.handles:
            self.handles.pop().remove()
        while self.originals:
            module, name, original = self.originals.pop()
            own = module._parameters[name]
            assert own is not None
            if original.device != own.device:  # the denoiser was moved while tuned
                original.data = original.data.to(own.device)
            module._parameters[name] = original


class _Cast:
    """A parameter in the denoiser's precision during each call of its module."""

    def __init__(self, name: str, own: nn.Parameter, dtype: torch.dtype) -> None:
        self.name, self.own, self.dtype = name, own, dtype

    def lower(self, module: nn.Module, args: tuple) -> None:
        """Before the call."""
        module._parameters[self.name] = self.own.to(self.dtype)  # type: ignore[assignment] - a tensor with a gradient

    def restore(self, module: nn.Module, args: tuple, output: object) -> None:
        """After it."""
        module._parameters[self.name] = self.own
