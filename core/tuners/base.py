"""What a method must be: a module that owns only its own float32 parameters and attaches to a frozen denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import UsageError, unknown
from ..sites.wiring import Seat, Skip, SkipEditor, skips

Features = dict[str, dict[int, Tensor]]  # condition -> skip index -> c (B, C, h, w)
T = TypeVar("T", bound="Tuner")


class Removable(Protocol):
    """What `Tuner.attach` gives back: undoes it exactly. A plain object, so that a deep copy undoes the copy's."""

    def remove(self) -> None:
        """Takes the tuner off."""


class Tuner(nn.Module):
    """The contract of a method.

    `kind` says where it acts: "skips" leaves the denoiser's weights frozen, "weights" puts its own in their place.
    Parameters stay float32 whatever the denoiser's dtype; computation follows the denoiser's activations.
    """

    method: ClassVar[str]
    kind: ClassVar[Literal["skips", "weights"]]

    def __init__(self, config: Config, conditions: tuple[str, ...] = (), vae_scale: int = 8) -> None:
        super().__init__()
        self.config, self.conditions, self.vae_scale = config, tuple(conditions), vae_scale

    @classmethod
    def build(
        cls: type[T], config: Config, denoiser: nn.Module, conditions: tuple[str, ...] = (), vae_scale: int = 8
    ) -> T:
        """A new tuner for `denoiser`, on its device; on the meta device it has shapes and no storage.

        `conditions` are names of maps to control by; `vae_scale` is the pixels to one latent pixel along a side.
        New weights come from torch's CPU generator whatever the device, so a seed gives the same tuner everywhere.
        """
        device = next(denoiser.parameters()).device
        with torch.device("meta" if device.type == "meta" else "cpu"):
            return cls(config, denoiser, conditions, vae_scale).to(device)

    def attach(
        self,
        denoiser: nn.Module,
        *,
        scale: float = 1.0,
        weights: Mapping[str, float] | None = None,
        normalize: bool | None = None,
    ) -> Removable:
        """Makes `denoiser` use this tuner until the value given back is removed. See `sites.attach`."""
        raise NotImplementedError


class SkipTuner(Tuner):
    """A tuner of skip connections: `sites` are those it edits, in encoder order."""

    kind = "skips"

    def __init__(self, config: Any, denoiser: nn.Module, conditions: tuple[str, ...] = (), vae_scale: int = 8) -> None:
        super().__init__(config, conditions, vae_scale)
        self.sites = select(skips(denoiser), config.skips)

    def encode(self, hints: dict[str, Tensor]) -> Features:
        """c of every edited skip for each hint (B, 3, H, W) in 0..1. Runs once a picture when sampling."""
        raise NotImplementedError

    def delta(self, site: Skip, x: Tensor, features: Features, alphas: Mapping[str, float]) -> Tensor | None:
        """What to add to skip x (B, C, h, w), or None. `features` is empty when no hint was given."""
        raise NotImplementedError

    def attach(
        self,
        denoiser: nn.Module,
        *,
        scale: float = 1.0,
        weights: Mapping[str, float] | None = None,
        normalize: bool | None = None,
    ) -> Seat:
        """Takes a seat at the denoiser's editor. Raises `SctoolError` when the skips differ or it is attached."""
        return SkipEditor.add(
            denoiser,
            self,
            scale,
            {**self.config.weights, **(weights or {})},
            self.config.normalize if normalize is None else normalize,
        )


def select(sites: list[Skip], chosen: tuple[int, ...] | None) -> list[Skip]:
    """The chosen skips in encoder order; all for None. Raises `UsageError` for an index that is not there."""
    if chosen is None:
        return sites
    wrong = [index for index in chosen if not 0 <= index < len(sites)]
    if wrong or not chosen or len(set(chosen)) != len(chosen):
        raise UsageError(f"skips={list(chosen)}: choose distinct skips out of 0..{len(sites) - 1}, in encoder order.")
    return [sites[index] for index in sorted(chosen)]


def known_conditions(names: Mapping[str, Any], conditions: tuple[str, ...]) -> None:
    """Raises `UsageError` when a setting names a condition that the tuner does not have."""
    for name in names:
        if name not in conditions:
            raise unknown("condition", name, conditions or ("none: add --cond",))
