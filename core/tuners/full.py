"""Full fine-tuning, the baseline: every weight of the denoiser is trained."""

from __future__ import annotations

from torch import nn

from .swapping import WeightTuner


class Full(WeightTuner):
    """All parameters of the denoiser."""

    method = "full"
    needs_autocast = True

    def names(self, denoiser: nn.Module) -> list[str]:
        """All."""
        return [name for name, _ in denoiser.named_parameters()]

    def describe_sites(self) -> list[str]:
        """All weights."""
        return [f"all {self.replaced():,} weights"]
