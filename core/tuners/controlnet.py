"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): a trained copy of the encoder, with diffusers' own model.

One `ControlNetModel` per condition reads latents, timestep, text and the map; what its zero convolutions give is added
to the skips and the middle block's output, weighted as the project weighs conditions. diffusers adds the same values
there, so a trained one runs in any of its pipelines.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from ..backbones.thin import THIN, make_dense
from ..errors import DoesNotFit, SctoolError, UsageError
from ..sites.site import Call, Features, Inputs
from ..sites.skips import Middle, Skip, middle, skips
from .base import SiteTuner, check_maps, in_precision_of, over_conditions
from .configs import ControlNetConfig

diffusers_logging.set_verbosity_error()  # it warns of modules to be kept in float32, where all are
WIDTHS = (16, 32, 96, 256)
"""Of the map's encoder, which halves the sides between them: a factor of 8."""


def encoder_widths(vae_scale: int) -> tuple[int, ...]:
    """Widths of a map's encoder that ends on the latents' grid; the published ones for an autoencoder of factor 8."""
    halvings = round(math.log2(vae_scale))
    if 2**halvings != vae_scale:
        raise UsageError(f"the autoencoder's factor is {vae_scale}; a hint can be reduced by 1, 2, 4, 8 ...")
    return (*WIDTHS, *[WIDTHS[-1]] * halvings)[: halvings + 1]


def stock(denoiser: nn.Module) -> nn.Module:
    """What weights are copied from: the denoiser, or of one with low-rank layers a copy with ordinary ones."""
    if not any(isinstance(module, THIN) for module in denoiser.modules()):
        return denoiser
    return make_dense(copy.deepcopy(denoiser))


def check_u_net(denoiser: nn.Module, method: str, whole: bool = False) -> None:
    """Raises `DoesNotFit` for a denoiser without skip connections or, if `whole`, without a middle block."""
    name = type(denoiser).__name__
    try:
        skips(denoiser)
    except SctoolError as error:
        raise DoesNotFit(
            f"{method} is for U-Nets with skip connections, and a {name} has none that can be edited. "
            "A method with maps for every denoiser is diffscaler."
        ) from error
    if whole and getattr(denoiser, "mid_block", None) is None:
        raise DoesNotFit(f"{method} needs a middle block; this {name} has none. Use --method t2i-adapter or scedit.")


class ControlNet(SiteTuner):
    """x + sum_m alpha_m Z_m(encoder copy of m), at every skip and at the middle block's output (eq. 4 of the paper)."""

    method = "controlnet"
    needs_autocast = True
    reads_inputs = True
    config: ControlNetConfig

    def __init__(
        self, config: ControlNetConfig, denoiser: nn.Module, conditions: tuple[str, ...] = (), vae_scale: int = 8
    ) -> None:
        check_u_net(denoiser, self.method, whole=True)
        check_maps(self.method, conditions)
        self.every: list[Skip] = skips(denoiser)
        super().__init__(config, [*self.every, middle(denoiser)], conditions, vae_scale)
        widths, source = encoder_widths(vae_scale), stock(denoiser)
        self.nets = nn.ModuleDict({name: new_net(source, widths) for name in conditions})

    def describe_sites(self) -> list[str]:
        """All skips and the middle block."""
        return [f"{len(self.every)} skips and the middle block, an encoder copy per condition"]

    def in_diffusers(self) -> dict[str, Any]:
        """The models by condition."""
        return dict(self.nets.items())

    def recompute(self) -> None:
        """Gradient checkpointing in the copies."""
        for net in self.in_diffusers().values():
            net.enable_gradient_checkpointing()

    def encode(self, hints: dict[str, Tensor], inputs: Inputs | None = None) -> Features:
        """What each condition's net adds: its skips, in encoder order, and last the middle block."""
        assert inputs is not None
        with in_precision_of(inputs.latents):
            return {name: self._states(self.nets[name], hint, inputs) for name, hint in hints.items()}

    @staticmethod
    def _states(net: Any, hint: Tensor, inputs: Inputs) -> list[Tensor]:
        def cast(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: cast(one) for key, one in value.items()}
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(net.dtype) if floating else value

        rest = {key: cast(value) for key, value in inputs.conditioning.items() if key in TAKEN}
        text = rest.pop("encoder_hidden_states", None)
        down, mid = net(cast(inputs.latents), inputs.timestep, text, cast(hint), return_dict=False, **rest)
        return [*down, mid]

    def delta(self, site: Skip | Middle, x: Tensor, call: Call) -> Tensor | None:
        """The weighted sum over the conditions that have a hint; None without any."""
        place = site.index if isinstance(site, Skip) else -1
        return over_conditions(call, lambda name: call.features[name][place])


TAKEN = ("encoder_hidden_states", "added_cond_kwargs", "class_labels", "timestep_cond", "attention_mask")
"""The denoiser's arguments that a ControlNet takes too."""


def new_net(denoiser: nn.Module, widths: tuple[int, ...]) -> Any:
    """A `ControlNetModel` with the denoiser's encoder in float32, and zero convolutions."""
    net = ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=widths)  # type: ignore[arg-type]
    return nn.Module.to(net, torch.float32)  # diffusers' own `to` warns of nothing
