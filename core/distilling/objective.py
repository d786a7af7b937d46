"""What a student learns (ELR-Diffusion eq. 3, BK-SDM eqs. 2, 3): its teacher's outputs, its blocks' outputs, the data.

Losses of different targets are one another's multiples: with signal a, noise s and SNR = a^2 / s^2,
|d_epsilon|^2 = a^2 |d_v|^2 = SNR |d_x0|^2 for the same difference of two predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.noising import Noising
from ..config import DistillConfig
from ..training.batches import Draw
from ..training.objective import DiffusionObjective, Objective, Sample, split
from .teacher import TeacherCache

Stages = Sequence[tuple[str, str]]
"""Names of the student's and the teacher's modules whose outputs correspond."""


def weight(noising: Noising, t: Tensor, weighting: str, gamma: float = 5.0) -> Tensor:
    """What the squared difference of two native predictions at timesteps (B,) is multiplied by, (B,).

    native: 1. The others are weights of the squared difference of noises: 1 (epsilon), max(1, 1/SNR) (truncated_snr),
    1 + 1/SNR (snr_plus_one), min(SNR, gamma)/SNR (min_snr). Finite where the schedule ends without signal, but for
    noise predictions, which say nothing there.
    """
    if weighting == "native":
        return torch.ones(t.shape, device=t.device)
    signal = noising.scheduler.alphas_cumprod.to(t.device)[t].double()
    noise = 1 - signal
    numerators = {  # each weight times a^2
        "epsilon": signal,
        "truncated_snr": torch.maximum(signal, noise),
        "snr_plus_one": torch.ones_like(signal),
        "min_snr": torch.minimum(signal, gamma * noise),
    }
    of_velocity = numerators[weighting]
    if noising.prediction_type == "v_prediction":
        return of_velocity.float()
    if noising.prediction_type == "epsilon":
        return (of_velocity / signal.clamp(min=torch.finfo(torch.float32).tiny)).float()
    return (of_velocity / noise.clamp(min=torch.finfo(torch.float32).tiny)).float()


@contextmanager
def outputs_of(denoiser: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, the outputs (B, ...) of modules by name, as they are called."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple) else output

    handles = [denoiser.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def feature_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], stages: Stages) -> Tensor:
    """The mean over stages of |f - f_T|^2 / |f_T|^2, (B,): without the norm a few stages would be all of the loss."""
    errors = []
    for own, other in stages:
        target = theirs[other].float().flatten(1)
        difference = (ours[own].float().flatten(1) - target).square().sum(1)
        errors.append(difference / target.square().sum(1).clamp(min=torch.finfo(torch.float32).eps))
    return torch.stack(errors).mean(0)


@dataclass(frozen=True)
class DistillObjective:
    """The sum of the three losses with their weights. `student` is the denoiser inside the network that is trained.

    `cache` holds the teacher's outputs for fixed draws, where they are wanted.
    """

    ordinary: DiffusionObjective
    teacher: nn.Module
    student: nn.Module
    config: DistillConfig
    stages: Stages
    cache: TeacherCache | None = None

    def unweighted(self) -> Objective:
        """The ordinary loss: held-out losses of students and of other trainings can be compared."""
        return self.ordinary.unweighted()

    def __call__(self, net: nn.Module, batch: Mapping[str, Any], draw: Draw) -> Tensor:
        """The loss of each sample, (B,) float32."""
        own, config = self.ordinary, self.config
        keys = None
        if self.cache is not None:
            draw, keys = self.cache.fixed(batch, draw)
        sample = own.sample(batch, draw)
        stages = self.stages if config.feature else ()
        with outputs_of(self.student, [name for name, _ in stages]) as ours:
            output = own.output(net, sample)
        loss = torch.zeros(len(sample.t), device=output.device)
        if config.task:
            loss = loss + config.task * own.error(sample, output)
        if config.output or config.feature:
            theirs, features = self._teacher(sample, keys, [name for _, name in stages])
            loss = loss + config.output * self._output_error(sample, output, theirs)
            if config.feature:
                loss = loss + config.feature * feature_error(ours, features, stages)
        return loss

    @torch.no_grad()
    def _teacher(
        self, sample: Sample, keys: list[str] | None, names: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's output, and those of its stages."""
        if self.cache is not None and keys is not None:
            return self.cache.outputs(keys, sample, self._run), {}
        with outputs_of(self.teacher, names) as features:
            output = self._run(sample)
        return output, features

    def _run(self, sample: Sample) -> Tensor:
        """The teacher's output for a sample."""
        return self.ordinary.output(self._as_net, sample)

    def _as_net(self, noisy: Tensor, t: Tensor, rows: Any, *rest: Any) -> Tensor:
        """The teacher, called as the network is."""
        return self.ordinary.family.output(self.teacher, noisy, t, rows)

    def _output_error(self, sample: Sample, output: Tensor, theirs: Tensor) -> Tensor:
        """The weighted mean squared difference of the predictions, and of what both say of the variance."""
        channels = sample.latents.shape[1]
        (ours, values), (target, known) = split(output.float(), channels), split(theirs.float(), channels)
        error = (ours - target).square().flatten(1).mean(1)
        factor = weight(self.ordinary.noising, sample.t, self.config.weighting, self.config.gamma)
        error = factor * error
        return error if values is None or known is None else error + (values - known).square().flatten(1).mean(1)
