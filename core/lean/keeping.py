"""Level 1: frozen layers that keep less for backward, with nothing of weight computed again.

Only what is frozen is exchanged, and only modules of exactly the known classes. Where no gradient is wanted each
computes as its original does, bit for bit.
"""

from __future__ import annotations

from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..backbones.thin import ThinConv2d
from .exchanging import Exchange, hooked, places, sharing, trained
from .functions import frozen_conv2d, gated_gelu, norm_silu


class KeepingConv2d(nn.Conv2d):
    """A convolution with a frozen weight; it keeps no activation."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, I, h, w) to (B, O, h', w')."""
        return frozen_conv2d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups  # type: ignore[arg-type]
        )  # fmt: skip


class KeepingThinConv2d(ThinConv2d):
    """A low-rank convolution with frozen factors; it keeps no activation."""

    convolve = staticmethod(frozen_conv2d)


class KeepingNorm(nn.GroupNorm):
    """A frozen norm and the SiLU after it, which is `Done`; it keeps its input."""

    def forward(self, input: Tensor) -> Tensor:
        """silu(norm(input)), (B, C, h, w)."""
        return norm_silu(input, self.num_groups, self.weight, self.bias, self.eps)


class Done(nn.SiLU):
    """The SiLU of norms that include it: nothing is left to do with their outputs, (B, C, h, w).

    A residual block passes its timestep embedding (B, C) through the same module.
    """

    def forward(self, input: Tensor) -> Tensor:
        """silu(input) of anything but a norm's output."""
        return input if input.ndim == 4 else super().forward(input)


class KeepingGEGLU(GEGLU):
    """The gate of a feed-forward network; it keeps its projection."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(..., d) to (..., d')."""
        return gated_gelu(self.proj(hidden_states))


def keep_less(denoiser: nn.Module, exchange: Exchange) -> None:
    """Exchanges what can be in `denoiser`."""
    for holder, name, module in places(denoiser):
        if type(module) is nn.Conv2d and plain(module) and not _weight_trained(module):
            exchange.put(holder, name, sharing(KeepingConv2d, module))
        elif type(module) is ThinConv2d and not trained(module):
            exchange.put(holder, name, sharing(KeepingThinConv2d, module))
        elif type(module) is GEGLU:
            exchange.put(holder, name, sharing(KeepingGEGLU, module))
        elif type(module) is ResnetBlock2D and module.time_embedding_norm == "default":
            _join(exchange, module, ("norm1", "norm2"), "nonlinearity")
    if getattr(denoiser, "conv_norm_out", None) is not None:
        _join(exchange, denoiser, ("conv_norm_out",), "conv_act")


def plain(conv: nn.Conv2d) -> bool:
    """Whether a convolution pads with zeros, by numbers: what the functions here know."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _weight_trained(conv: nn.Conv2d) -> bool:
    return conv.weight.requires_grad


def _join(exchange: Exchange, holder: nn.Module, norms: tuple[str, ...], activation: str) -> None:
    """Lets the norms do the activation after them; not where one is trained, hooked, or of another kind."""
    children = holder._modules
    own, act = [children.get(name) for name in norms], children.get(activation)
    if type(act) is not nn.SiLU or any(type(norm) is not nn.GroupNorm or trained(norm) for norm in own):
        return
    if any(norm is None or not norm.affine for norm in own) or hooked(act, *own):  # type: ignore[arg-type]
        return
    for name, norm in zip(norms, own, strict=True):
        exchange.put(holder, name, sharing(KeepingNorm, norm))  # type: ignore[arg-type]
    exchange.put(holder, activation, sharing(Done, act))
