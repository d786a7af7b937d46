"""The forward process of a base and what its denoiser is trained to predict.

q(x_t | x_0) is diffusers' `DDPMScheduler` over the base's own noise schedule; here stands what a trainer adds. A
flow-matching family brings a class of its own with `timesteps`, `add_noise`, `target` and `snr_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor


class Noising:
    """A noise schedule with `levels` discrete timesteps and a prediction type (epsilon, v_prediction or sample)."""

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        self.scheduler = DDPMScheduler.from_config(scheduler_config)
        self.levels: int = self.scheduler.config.num_train_timesteps
        self.prediction_type: str = self.scheduler.config.prediction_type

    def timesteps(self, count: int, generator: torch.Generator, part: int = 0, of: int = 1) -> Tensor:
        """`count` timesteps (B,), uniform over part number `part` of the schedule cut into `of` equal parts."""
        low, high = part * self.levels // of, (part + 1) * self.levels // of
        return torch.randint(low, high, (count,), generator=generator)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A draw of q(x_t | x_0): latents (B, C, h, w) noised to timesteps (B,)."""
        return self.scheduler.add_noise(latents, noise, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should predict: noise, velocity (Salimans & Ho 2022, app. D) or x_0; (B, C, h, w)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, t)
        return latents

    def snr_weights(self, t: Tensor, gamma: float) -> Tensor:
        """Min-SNR-gamma loss weights (Hang et al. 2023, arXiv 2303.09556, eqs. 5 and 6), (B,).

        min(SNR, gamma) is the weight in terms of x_0; it is divided by SNR for noise and by SNR + 1 for velocity.
        """
        snr = compute_snr(self.scheduler, t)
        divisor = {"epsilon": snr, "v_prediction": snr + 1}.get(self.prediction_type, torch.ones_like(snr))
        return snr.clamp(max=gamma) / divisor
