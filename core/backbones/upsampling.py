"""The frozen decoder's upsampling at 4/9 of its multiplications, for training: the same function up to rounding.

Diffusers' `Upsample2D` doubles both sides by repeating every pixel and convolves with 3x3 weights. Repeated pixels meet
several of these weights, so every output pixel depends on 2x2 input pixels alone: by the parities (a, b) of its row and
column it is one of four convolutions with 2x2 weights, sums of the 3x3 ones (sub-pixel convolution, Shi et al. 2016,
arXiv:1609.05158, read backwards). The sums are made once, so this is for weights that are not trained.
"""

from __future__ import annotations

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from ..lean.exchanging import Exchange, hooked, places
from ..lean.functions import frozen_conv2d


def folded(weight: Tensor) -> Tensor:
    """3x3 weights (O, I, 3, 3) as those of the four phases, (4 O, I, 2, 2) in the order (0,0) (0,1) (1,0) (1,1).

    Along each axis (w0, w1, w2) becomes (w0, w1 + w2) for even and (w0 + w1, w2) for odd pixels. Summed in float64.
    """
    wide = weight.double()
    rows = [torch.stack(pair, 2) for pair in _pairs(wide, 2)]
    return torch.cat([torch.stack(pair, 3) for row in rows for pair in _pairs(row, 3)]).to(weight.dtype)


def _pairs(weight: Tensor, axis: int) -> list[tuple[Tensor, Tensor]]:
    first, middle, last = weight.unbind(axis)
    return [(first, middle + last), (first + middle, last)]


class PhaseUpsample2D(Upsample2D):
    """An `Upsample2D` in four phases. It shares the original's convolution, so that no key of the state changes."""

    def __init__(self, original: Upsample2D) -> None:
        nn.Module.__init__(self)
        self.original = (original,)  # in a tuple, so that it is not registered as a submodule
        self.conv = original.conv
        self.register_buffer("phases", folded(original.conv.weight.detach()), persistent=False)
        self.train(original.training)

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """(B, I, h, w) to (B, O, 2 h, 2 w); for any other `output_size` by way of the original."""
        height, width = hidden_states.shape[-2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            return self.original[0](hidden_states, output_size)
        padded = F.pad(hidden_states, (1, 1, 1, 1))
        phases = [
            frozen_conv2d(padded[:, :, a : a + height + 1, b : b + width + 1], weight, self.conv.bias)
            for (a, b), weight in zip(((0, 0), (0, 1), (1, 0), (1, 1)), self.phases.chunk(4), strict=True)
        ]
        return F.pixel_shuffle(torch.stack(phases, 2).flatten(1, 2), 2)


def fold_upsampling(denoiser: nn.Module) -> Exchange:
    """Replaces every frozen upsampler of `denoiser` by its folded form, in place, until what is returned is removed.

    Upsamplers that are trained, hooked or of another kind (a norm, a transposed convolution, a wrapped layer) stay.
    """
    exchange = Exchange()
    for holder, name, module in places(denoiser):
        if _foldable(module):
            exchange.put(holder, name, PhaseUpsample2D(module))  # type: ignore[arg-type]
    return exchange


def _foldable(module: nn.Module) -> bool:
    if type(module) is not Upsample2D or module.norm is not None or not (module.use_conv and module.interpolate):
        return False
    conv = getattr(module, "conv", None)
    if type(conv) is not nn.Conv2d or any(p.requires_grad for p in conv.parameters()):
        return False
    plain = (conv.kernel_size, conv.padding, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    return plain and conv.groups == 1 and conv.padding_mode == "zeros" and not hooked(module, conv)
