"""BitFit: the biases alone are trained (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

from torch import nn

from ..sites.parts import chosen_layers
from .configs import BitFitConfig
from .swapping import WeightTuner


def biases(denoiser: nn.Module) -> list[str]:
    """The names of all biases, those of norms included."""
    return [name for name, _ in denoiser.named_parameters() if name.rpartition(".")[2] == "bias"]


class BitFit(WeightTuner):
    """Every bias of the denoiser, or those of the linear and convolutional layers that `layers` chooses."""

    method = "bitfit"
    config: BitFitConfig

    def names(self, denoiser: nn.Module) -> list[str]:
        """The biases. Raises `UsageError` for `layers` that choose no layer."""
        if self.config.layers is None:
            return biases(denoiser)
        of_layers = {f"{layer.name}.bias" for layer in chosen_layers(denoiser, self.config.layers)}
        return [name for name in biases(denoiser) if name in of_layers]
