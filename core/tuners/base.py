"""What a method must be: a module that owns only its own float32 parameters and attaches to a frozen denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UsageError, unknown
from ..resolving import Config
from ..sites.attaching import Removable, all_or_none
from ..sites.site import Call, Features, Inputs
from ..sites.wiring import Attached, Wiring
from .classes import NewClasses

if TYPE_CHECKING:
    from ..backbones.loading import Backbone

T = TypeVar("T", bound="Tuner")


@dataclass(frozen=True)
class Terms:
    """How a tuner acts once attached: its scale, condition weights that override its own, and its task."""

    scale: float = 1.0
    weights: Mapping[str, float] | None = None
    normalize: bool | None = None
    task: str | None = None


class Tuner(nn.Module):
    """The contract of a method. Its traits say what it needs of those who train and count it.

    Parameters stay float32 whatever the denoiser's dtype; computation follows the denoiser's activations.
    """

    method: ClassVar[str]
    """Its name in `TUNERS`."""
    needs_autocast: ClassVar[bool] = False
    """The denoiser's own layers compute with the float32 weights, so reduced precision needs autocast."""
    routes: ClassVar[bool] = False
    """It can act on some samples of a batch and leave the others alone."""

    def __init__(self, config: Config, conditions: tuple[str, ...] = (), vae_scale: int = 8) -> None:
        """A method's own class takes (config, denoiser, conditions, vae_scale); see `build`."""
        super().__init__()
        self.config, self.conditions, self.vae_scale = config, tuple(conditions), vae_scale
        self.classes: tuple[str, ...] = ()
        self.new_classes: NewClasses | None = None

    @classmethod
    def build(
        cls: type[T],
        config: Config,
        denoiser: nn.Module,
        conditions: tuple[str, ...] = (),
        vae_scale: int = 8,
        classes: tuple[str, ...] = (),
    ) -> T:
        """A new tuner for `denoiser`, on its device; on the meta device it has shapes and no storage.

        `conditions` are names of maps to control by; `vae_scale` is the autoencoder's downsampling factor; `classes`
        are labels added to those of a class-conditional base. New weights come from torch's CPU generator whatever the
        device, so a seed gives the same tuner everywhere.
        Raises `UsageError` for settings that do not fit the denoiser.
        """
        device = next(denoiser.parameters()).device
        with torch.device("meta" if device.type == "meta" else "cpu"):
            tuner = cls(config, denoiser, conditions, vae_scale)
            tuner.classes = tuple(classes)
            if classes:
                tuner.new_classes = NewClasses(denoiser, len(classes), vae_scale)
            return tuner.to(device)

    def use(self, backbone: Backbone) -> None:
        """Told which base it acts on, by all who have more than its denoiser; for a tuner that needs more of it."""

    def replaced(self) -> int:
        """The number of the denoiser's parameters that its own stand in for; the others are added."""
        return 0

    def keep_less(self) -> None:
        """For a tuner that can do with less for backward: keeps what backward reads (memory=normal and less)."""

    def recompute(self) -> None:
        """Gradient checkpointing, once it is attached, for a tuner with a network of its own (memory=minimum)."""

    def in_diffusers(self) -> dict[str, Any]:
        """The tuner as diffusers' own models by condition, for methods that are such: {} for all others."""
        return {}

    def describe_sites(self) -> list[str]:
        """Where it acts, in words, for `--dry-run`."""
        raise NotImplementedError

    def site_metadata(self) -> dict[str, Any]:
        """Where it acts, for the tuner file: what must fit when it is loaded again."""
        return {}

    def attach(
        self,
        denoiser: nn.Module,
        *,
        scale: float = 1.0,
        weights: Mapping[str, float] | None = None,
        normalize: bool | None = None,
        task: str | None = None,
    ) -> Removable:
        """Makes `denoiser` use this tuner until the value returned is removed. See `sites.attaching.attach`.

        Raises `UsageError` for a `task` where the method cannot tell the samples of a batch apart.
        """
        if task is not None and not self.routes:
            raise UsageError(f"method {self.method} changes the denoiser for a whole batch and cannot have a task.")
        steps: list[Callable[[], Removable]] = [partial(self.act, denoiser, Terms(scale, weights, normalize, task))]
        if self.new_classes is not None:
            steps.append(partial(Wiring.add, denoiser, self.new_classes, scale, {}, True, task))
        return all_or_none(steps)

    def act(self, denoiser: nn.Module, terms: Terms) -> Removable:
        """`attach` without new classes: what a method has of its own."""
        raise NotImplementedError


class SiteTuner(Tuner):
    """A tuner that adds to the values of `sites` and leaves the denoiser's weights alone.

    `weights` are the weights of its conditions (alpha) and `normalize` whether they are scaled to a sum of 1.
    """

    routes = True
    reads_inputs: ClassVar[bool] = False
    """`encode` reads latents, timestep and text; then nothing is cached over sampling steps."""
    sites: Sequence[Any]
    weights: Mapping[str, float]
    normalize: bool

    def __init__(self, config: Any, sites: Sequence[Any], conditions: tuple[str, ...] = (), vae_scale: int = 8) -> None:
        super().__init__(config, conditions, vae_scale)
        self.sites, self.weights, self.normalize = sites, {}, True

    def describe_sites(self) -> list[str]:
        """Every site by its kind and width."""
        return [str(site) for site in self.sites]

    def encode(self, hints: dict[str, Tensor], inputs: Inputs | None = None) -> Features:
        """Features of hints (B, 3, H, W) in 0..1, by condition. Runs once per hint when sampling.

        With `reads_inputs` it runs at every step, also without hints, and `inputs` is given.
        """
        return {}

    def delta(self, site: Any, x: Tensor, call: Call) -> Tensor | None:
        """What to add to the unedited value x of a site, or None. `call.features` is {} when no hint was given."""
        raise NotImplementedError

    def edited(self, site: Any, x: Tensor, call: Call) -> Tensor | None:
        """x + delta itself, where the tuner can make it with less memory than by adding; None where it cannot.

        Asked only while training, of the only tuner at a site, at scale 1. Values and gradients are those of x + delta.
        """
        return None

    def act(self, denoiser: nn.Module, terms: Terms) -> Attached:
        """Joins the denoiser's wiring. Raises `SctoolError` when a site is not there or the tuner is attached."""
        weights = {**self.weights, **(terms.weights or {})}
        normalize = self.normalize if terms.normalize is None else terms.normalize
        return Wiring.add(denoiser, self, terms.scale, weights, normalize, terms.task)


def check_maps(method: str, conditions: tuple[str, ...]) -> None:
    """Raises `UsageError` for a method that needs condition maps and is given none."""
    if not conditions:
        raise UsageError(f"{method} needs condition maps; add --cond, e.g. --cond canny.")


def over_conditions(call: Call, part: Callable[[str], Tensor]) -> Tensor | None:
    """sum_m alpha_m part(m) over the conditions m that have a hint (eq. 7 of SCEdit); None without any."""
    total = None
    for name in call.features:
        if call.alphas[name] != 0:
            weighted = call.alphas[name] * part(name)
            total = weighted if total is None else total + weighted
    return total


def in_precision_of(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, a tuner's float32 networks compute in the precision of x where that is a half one, else as they are."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(x.device.type, x.dtype) if half else nullcontext()


def known_conditions(names: Mapping[str, Any], conditions: tuple[str, ...]) -> None:
    """Raises `UsageError` when a setting names a condition that the tuner does not have."""
    for name in names:
        if name not in conditions:
            raise unknown("condition", name, conditions or ("none: add --cond",))
