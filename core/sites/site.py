"""What a site is, and what a tuner is to the wiring: the two contracts that the other files here share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

Features = Mapping[str, Any]
"""What a tuner made of its hints: condition -> tensors, in any nesting of dicts and lists."""


class SiteEdit(Protocol):
    """The edit of one site, as the wiring hands it to the site's hooks."""

    site: Any

    def edited(self, x: Tensor, given: Tensor | None = None, module: nn.Module | None = None) -> Tensor:
        """The edited value of the site; `given` is what the site's `module` was called with."""
        ...

    def refuse_overlap(self) -> None:
        """Raises `UsageError` where several tuners act on one sample, for sites that allow only one."""
        ...


class Site(Protocol):
    """A place in a denoiser whose value can be edited. Frozen dataclasses: equal sites are one place."""

    @staticmethod
    def hook(denoiser: nn.Module, edits: Sequence[SiteEdit]) -> list[RemovableHandle]:
        """Registers public hooks that pass the values of the sites, all of this class, through their edits."""
        ...


@dataclass(frozen=True)
class Call:
    """What a tuner knows of one call of the denoiser.

    `features` is what its `encode` returned, {} without hints; `alphas` is the weight of every condition in it.
    `given` is the input of the module at layer sites and the ids at class rows; `module` is the layer at layer sites.
    `scratch` is for the tuner's own use, one for all sites of the call: what they share is computed once.
    """

    features: Features = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    given: Tensor | None = None
    module: nn.Module | None = None
    scratch: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """The denoiser's own inputs, for tuners that read them: latents (B, C, h, w), timesteps, further conditioning."""

    latents: Tensor
    timestep: Any
    conditioning: Mapping[str, Any]
    """By the name of the denoiser's argument: `encoder_hidden_states`, `added_cond_kwargs`, `class_labels`."""


class Acting(Protocol):
    """A tuner as the wiring sees it."""

    method: str
    conditions: tuple[str, ...]
    vae_scale: int
    sites: Sequence[Site]
    reads_inputs: bool
    """It reads latents, timestep or text, so its features change from step to step and are never cached."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights."""
        ...

    def encode(self, hints: dict[str, Tensor], inputs: Inputs | None = None) -> Features:
        """Features of hints (B, 3, H, W) in 0..1; `inputs` only for a tuner that reads them."""
        ...

    def delta(self, site: Any, x: Tensor, call: Call) -> Tensor | None:
        """What to add to the unedited value x of a site; None for nothing."""
        ...

    def edited(self, site: Any, x: Tensor, call: Call) -> Tensor | None:
        """x + delta itself, for a tuner that makes it with less memory than by adding; None for one that does not."""
        ...
