"""Low-rank layers: a `Linear` or `Conv2d` whose weight is a product of two thin factors (ELR-Diffusion, eq. 2).

They are subclasses with the same widths and geometry, whose `weight` is computed: whatever acts on layers of a
denoiser acts on these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Form = Literal["flat", "spatial"]
"""Of a convolution: k x k to r channels and 1x1, or k x 1 to r channels and 1 x k."""


class ThinLinear(nn.Linear):
    """y = up (down x) + bias, with down (r, n) and up (m, r)."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool = True) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        self.down, self.up = nn.Parameter(torch.empty(rank, inputs)), nn.Parameter(torch.empty(outputs, rank))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors, whose product has the variance of a new `Linear`'s weight."""
        nn.init.normal_(self.down, std=(1 / self.in_features) ** 0.5)
        nn.init.normal_(self.up, std=(1 / (3 * self.rank)) ** 0.5)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The product, (m, n)."""
        return self.up @ self.down

    def forward(self, input: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        return F.linear(F.linear(input, self.down), self.up, self.bias)

    def extra_repr(self) -> str:
        """Widths and rank."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class ThinConv2d(nn.Conv2d):
    """Two convolutions in a row; the bias is added at the end, where the original's was.

    flat: down (r, n, k, k) with the layer's stride and padding, up (m, r, 1, 1). spatial: down (r, n, k, 1) with the
    vertical ones, up (m, r, 1, k) with the horizontal ones.
    """

    convolve = staticmethod(F.conv2d)

    def __init__(self, like: nn.Conv2d, rank: int, form: Form = "flat") -> None:
        """A new layer of the shape of `like`, which must be `divisible`."""
        nn.Module.__init__(self)
        self.in_channels, self.out_channels, self.groups, self.transposed = (
            like.in_channels,
            like.out_channels,
            1,
            False,
        )
        self.kernel_size, self.stride, self.padding = like.kernel_size, like.stride, like.padding
        self.dilation, self.output_padding, self.padding_mode = like.dilation, like.output_padding, "zeros"
        self._reversed_padding_repeated_twice = [side for side in reversed(like.padding) for _ in (0, 1)]  # type: ignore[misc]
        self.rank, self.form = rank, form
        high, wide = like.kernel_size
        first, last = ((high, wide), (1, 1)) if form == "flat" else ((high, 1), (1, wide))
        self.down = nn.Parameter(torch.empty(rank, like.in_channels, *first))
        self.up = nn.Parameter(torch.empty(like.out_channels, rank, *last))
        self.bias = nn.Parameter(torch.zeros(like.out_channels)) if like.bias is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors."""
        nn.init.normal_(self.down, std=(1 / self.down[0].numel()) ** 0.5)
        nn.init.normal_(self.up, std=(1 / (3 * self.up[0].numel())) ** 0.5)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The product, (m, n, k, k)."""
        if self.form == "flat":
            return torch.einsum("mr,rnij->mnij", self.up[:, :, 0, 0], self.down)
        return torch.einsum("mrj,rni->mnij", self.up[:, :, 0], self.down[:, :, :, 0])

    def forward(self, input: Tensor) -> Tensor:
        """(B, n, H, W) to (B, m, H', W')."""
        (top, left), (down, right) = self.padding, self.stride  # type: ignore[misc]
        if self.form == "flat":
            hidden = self.convolve(input, self.down, None, self.stride, self.padding)  # type: ignore[arg-type]
            return self.convolve(hidden, self.up, self.bias)
        hidden = self.convolve(input, self.down, None, (down, 1), (top, 0))  # type: ignore[arg-type]
        return self.convolve(hidden, self.up, self.bias, (1, right), (0, left))  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The geometry, rank and form."""
        return f"{super().extra_repr()}, rank={self.rank}, form={self.form}"


THIN = (ThinLinear, ThinConv2d)


def divisible(module: nn.Module) -> bool:
    """Whether a layer can be written as two thin ones: a plain `Linear`, or `Conv2d` without groups or dilation."""
    if isinstance(module, nn.Linear):
        return True
    plain = isinstance(module, nn.Conv2d) and (module.groups, module.dilation) == (1, (1, 1))
    return plain and module.padding_mode == "zeros" and not isinstance(module.padding, str)  # type: ignore[union-attr]


def thin(module: Any, rank: int, form: Form = "flat") -> Any:
    """A new low-rank layer of the shape of `module`, on its device and in its dtype."""
    with torch.device(module.weight.device):
        own = (
            ThinLinear(module.in_features, module.out_features, rank, module.bias is not None)
            if isinstance(module, nn.Linear)
            else ThinConv2d(module, rank, form)
        )
    return own.to(module.weight.dtype).train(module.training)


def dense(module: Any) -> Any:
    """The ordinary layer with the product for its weight."""
    if isinstance(module, nn.Linear):
        own = nn.utils.skip_init(
            nn.Linear, module.in_features, module.out_features, module.bias is not None, device=module.up.device,
            dtype=module.up.dtype,
        )  # fmt: skip
    else:
        own = nn.utils.skip_init(
            nn.Conv2d, module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
            bias=module.bias is not None, device=module.up.device, dtype=module.up.dtype,
        )  # fmt: skip
    with torch.no_grad():
        wide = torch.float64 if module.up.device.type != "mps" else torch.float32
        own.weight.copy_(_product(module, wide))
        if module.bias is not None:
            own.bias.copy_(module.bias)
    return own.train(module.training)


def _product(module: Any, dtype: torch.dtype) -> Tensor:
    """`weight` computed in another precision."""
    if module.up.is_meta:
        return module.weight
    copy = thin(module, module.rank, getattr(module, "form", "flat")).to(dtype)
    copy.load_state_dict(module.state_dict())
    return copy.weight


def replace(denoiser: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Puts other layers in the places of those names."""
    for name, layer in layers.items():
        path, _, leaf = name.rpartition(".")
        holder: Any = denoiser.get_submodule(path)
        if isinstance(holder, nn.ModuleList | nn.Sequential):
            holder[int(leaf)] = layer
        else:
            setattr(holder, leaf, layer)


def make_thin(denoiser: nn.Module, ranks: Mapping[str, int], form: Form = "flat") -> nn.Module:
    """The denoiser with new low-rank layers in the places that `ranks` names, in place."""
    replace(denoiser, {name: thin(denoiser.get_submodule(name), rank, form) for name, rank in ranks.items()})
    return denoiser


def make_dense(denoiser: nn.Module) -> nn.Module:
    """The denoiser with ordinary layers for all low-rank ones, in place: the stock architecture."""
    found = {name: module for name, module in denoiser.named_modules() if isinstance(module, THIN)}
    replace(denoiser, {name: dense(module) for name, module in found.items()})
    return denoiser
