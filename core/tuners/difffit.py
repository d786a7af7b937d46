"""DiffFit: biases, norms and new scale factors are trained (Xie et al. 2023, arXiv 2304.06648).

The factors gamma (C,), 1 at the start, multiply the outputs of each transformer block's attentions and feed-forward
network, as in DiffFit-pytorch (mkshing), which brought the method to Stable Diffusion. The paper also trains the class
embedding; here a tuner adds classes of its own beside a frozen table, whatever the method (see `classes.py`).
"""

from __future__ import annotations

from functools import partial

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from ..errors import DoesNotFit
from ..sites.attaching import Attachment, all_or_none
from ..sites.modules import Output
from ..sites.site import Call, Features, Inputs
from ..sites.wiring import Wiring
from .base import Terms
from .bitfit import biases
from .configs import DiffFitConfig
from .swapping import WeightTuner
from .tree import place

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, RMSNorm)
SCALED = ("attn1", "attn2", "ff")
"""The parts of a transformer block whose outputs are scaled; a block without cross-attention has no attn2."""


def norm_weights(denoiser: nn.Module) -> list[str]:
    """The names of the norms' weights; those of layers that compute a norm's scale and shift are none."""
    return [
        f"{name}.weight"
        for name, module in denoiser.named_modules()
        if isinstance(module, NORMS) and module.weight is not None
    ]


def block_outputs(denoiser: nn.Module) -> list[Output]:
    """What the transformer blocks add to their tokens: the outputs that are scaled, in the denoiser's order."""
    return [
        Output(f"{name}.{part}", block.dim)
        for name, block in denoiser.named_modules()
        if isinstance(block, BasicTransformerBlock)
        for part in SCALED
        if getattr(block, part) is not None
    ]


def gamma_name(site: Output) -> str:
    """The parameter's name: gamma_attn1, gamma_attn2 or gamma_ff in its block."""
    path, _, part = site.name.rpartition(".")
    return f"{path}.gamma_{part}"


class DiffFit(WeightTuner):
    """Biases and norm weights in the place of the denoiser's, and gamma y for the outputs y of its blocks' parts."""

    method = "difffit"
    reads_inputs = False

    def __init__(
        self, config: DiffFitConfig, denoiser: nn.Module, conditions: tuple[str, ...] = (), vae_scale: int = 8
    ) -> None:
        super().__init__(config, denoiser, conditions, vae_scale)
        self.sites = block_outputs(denoiser)
        if not self.sites:
            raise DoesNotFit("difffit scales transformer blocks, and the denoiser has none; use --method bitfit.")
        for site in self.sites:
            place(self, gamma_name(site), nn.Parameter(torch.ones(site.width)))

    def names(self, denoiser: nn.Module) -> list[str]:
        """Biases and norm weights."""
        chosen = {*biases(denoiser), *norm_weights(denoiser)}
        return [name for name, _ in denoiser.named_parameters() if name in chosen]

    def describe_sites(self) -> list[str]:
        """The trained weights, and the scaled outputs."""
        return [*super().describe_sites(), f"{len(self.sites)} outputs of transformer blocks' parts"]

    def act(self, denoiser: nn.Module, terms: Terms) -> Attachment:
        """Swaps the weights in and hooks the outputs. Raises as `WeightTuner.act` and `Wiring.add`."""
        swap = partial(super().act, denoiser, terms)
        return all_or_none([swap, partial(Wiring.add, denoiser, self, terms.scale, {}, True)])

    def encode(self, hints: dict[str, Tensor], inputs: Inputs | None = None) -> Features:
        """Nothing: it takes no hints."""
        return {}

    def edited(self, site: Output, x: Tensor, call: Call) -> None:
        """No form that saves memory."""

    def delta(self, site: Output, x: Tensor, call: Call) -> Tensor:
        """(gamma - 1) y for an output y (B, ..., C)."""
        return (self.get_parameter(gamma_name(site)) - 1).to(x.dtype) * x
