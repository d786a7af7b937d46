"""What is minimised: an objective returns the loss of every sample of a batch. This file has diffusion's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..sites.tokens import kept_places
from .batches import Draw

if TYPE_CHECKING:
    from ..backbones.families.base import Family, Rows
    from ..backbones.noising import Noising


class Objective(Protocol):
    """A loss that depends on its arguments alone: all randomness is in `draw`."""

    def __call__(self, net: nn.Module, batch: Mapping[str, Any], draw: Draw) -> Tensor:
        """The loss of each sample, (B,) float32. `net` is a `TunedBackbone`, or one wrapped for several processes.

        `batch` is what `collate` makes, with `task` where it is of several tasks.
        """
        ...

    def unweighted(self) -> Objective:
        """The objective as held-out losses are reported, without weights of single samples."""
        ...


@dataclass(frozen=True)
class Sample:
    """One batch as the network is given it; `hints` in 0..1 by condition, `kept` tokens and `tasks` as in `Draw`."""

    latents: Tensor
    noise: Tensor
    noisy: Tensor
    t: Tensor
    rows: Rows
    hints: dict[str, Tensor] | None
    kept: Tensor | None
    tasks: Any


@dataclass(frozen=True)
class DiffusionObjective:
    """Mean squared error of the prediction against the base's own training target.

    `null_rows` replace the conditioning of dropped captions; `size` is the training size in pixels; `dtype` is that of
    the network's inputs, and `autocast` that of autocast where a method needs it.
    """

    family: Family
    noising: Noising
    null_rows: Rows
    size: int
    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    snr_gamma: float | None = None
    variance: bool = True
    """Train a learned variance too, where the base has one."""
    patch: int = 1
    """The side of a token in the latent, for token masking."""

    def unweighted(self) -> DiffusionObjective:
        """The error of the prediction alone and without min-SNR weights, as held-out losses are reported."""
        return replace(self, snr_gamma=None, variance=False)

    def __call__(self, net: nn.Module, batch: Mapping[str, Any], draw: Draw) -> Tensor:
        """The loss of each sample, (B,) float32, weighted by min-SNR where `snr_gamma` is given."""
        sample = self.sample(batch, draw)
        return self.error(sample, self.output(net, sample))

    def sample(self, batch: Mapping[str, Any], draw: Draw) -> Sample:
        """What a batch and a draw make: noisy latents and all that the network is given with them."""
        t, noise = draw.t.to(self.device), draw.noise.to(self.device)
        mean, std = (batch[name].to(self.device).float() for name in ("mean", "std"))
        latents = mean + std * draw.posterior.to(self.device)
        noisy = self.noising.add_noise(latents, noise, t)
        rows = {**self._rows(batch["text"], draw), **self.family.size_rows(len(t), self.size, self.device)}
        kept = None if draw.kept is None else draw.kept.to(self.device)
        hints = self._hints(batch["hints"], draw) or None
        return Sample(latents, noise, noisy, t, rows, hints, kept, batch.get("task"))

    def output(self, net: Callable[..., Tensor], sample: Sample) -> Tensor:
        """What the network makes of it, (B, C or 2C, h, w)."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return net(sample.noisy.to(self.dtype), sample.t, sample.rows, sample.hints, sample.kept, sample.tasks)

    def error(self, sample: Sample, output: Tensor) -> Tensor:
        """The loss of each sample, (B,), of a network's output."""
        latents, noise, noisy, t, kept = sample.latents, sample.noise, sample.noisy, sample.t, sample.kept
        prediction, values = split(output.float(), latents.shape[1])
        target = self.noising.target(latents, noise, t)
        errors = (prediction - target.float()).square()
        if self.snr_gamma is not None:
            errors = errors * self.noising.snr_weights(t, self.snr_gamma).view(-1, 1, 1, 1)
        if values is not None and self.variance:
            errors = errors + self.noising.variance_bound(latents, noisy, t, prediction, values)
        if kept is None:
            return errors.flatten(1).mean(1)
        places = kept_places(kept, (latents.shape[2], latents.shape[3]), self.patch).expand_as(errors)
        return (errors * places).flatten(1).sum(1) / places.flatten(1).sum(1)

    def _rows(self, batch: Mapping[str, Tensor], draw: Draw) -> Rows:
        """Conditioning rows, those of dropped captions replaced by the null row."""
        rows, dropped = {}, draw.drop_caption.to(self.device)
        for key, values in batch.items():
            mask = dropped.view(-1, *[1] * (values.dim() - 1))
            rows[key] = torch.where(mask, self._input(self.null_rows[key]), self._input(values))
        return rows

    def _hints(self, batch: Mapping[str, Tensor], draw: Draw) -> dict[str, Tensor]:
        """Hints in 0..1, dropped ones black."""
        hints = {}
        for name, maps in batch.items():
            shown = (~draw.drop_hint[name]).to(self.device).view(-1, 1, 1, 1)
            hints[name] = maps.to(self.device).to(self.dtype) / 255 * shown
        return hints

    def _input(self, values: Tensor) -> Tensor:
        """On the device; numbers in the network's dtype, ids as they are."""
        return values.to(self.device, self.dtype if values.is_floating_point() else values.dtype)


def split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """The prediction and, where the base has one, its learned variance."""
    return output[:, :channels], output[:, channels:] if output.shape[1] > channels else None
