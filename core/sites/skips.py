"""What a U-Net's decoder receives from its encoder: the skip connections and the middle block's output.

Skips are edited in `res_hidden_states_tuple`, the keyword argument of every up block, just before the decoder
concatenates them: the encoder never sees an edit, so nothing before the first edited skip needs a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import SctoolError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .site import SiteEdit


@dataclass(frozen=True)
class Skip:
    """One skip connection: `index` in encoder order, `position` in the tuple that up block `block` receives.

    `stride2` marks the output of a downsampler, which has half the side of the skip before it.
    """

    index: int
    block: int
    position: int
    channels: int
    stride2: bool

    def __str__(self) -> str:
        return f"skip {self.index} ({self.channels})"

    @property
    def reused(self) -> bool:
        """Whether its edited value is reused with the encoder's features; the first convolution runs at every step."""
        return self.index > 0

    @staticmethod
    def hook(denoiser: nn.Module, edits: Sequence[SiteEdit]) -> list[RemovableHandle]:
        """One pre-hook for each up block that receives any of the skips. Raises `SctoolError` for one not there."""
        known, handles = skips(denoiser), []
        for edit in edits:
            if edit.site not in known:
                raise SctoolError(f"this {type(denoiser).__name__} has no {edit.site}; the tuner is for another one.")
        for index, block in enumerate(denoiser.up_blocks):
            received = [edit for edit in edits if edit.site.block == index]
            if received:
                handles.append(block.register_forward_pre_hook(_SkipHook(received).edit, with_kwargs=True))
        return handles


class _SkipHook:
    """The pre-hook of one up block; a bound method, so that a deep copy of the model uses the copy's tuners."""

    def __init__(self, edits: list[SiteEdit]) -> None:
        self.edits = edits

    def edit(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Replaces the skips (each (B, C, h, w)) in the block's arguments by their edited values."""
        states = list(kwargs["res_hidden_states_tuple"])
        for edit in self.edits:
            states[edit.site.position] = edit.edited(states[edit.site.position])
        return args, {**kwargs, "res_hidden_states_tuple": tuple(states)}


def skips(denoiser: Any) -> list[Skip]:
    """The skip connections of a `UNet2DConditionModel` in encoder order (12 for SD 1.5 and 2.1, 9 for SDXL).

    Read from the modules, so it works on the meta device. Raises `SctoolError` for a model without such skips.
    """
    try:
        outputs = [(denoiser.conv_in.out_channels, False)]
        for down in denoiser.down_blocks:
            outputs += [(resnet.out_channels, False) for resnet in down.resnets]
            outputs += [(sampler.out_channels, True) for sampler in down.downsamplers or ()]
        counts = [len(up.resnets) for up in denoiser.up_blocks]
    except AttributeError as error:
        raise SctoolError(f"{type(denoiser).__name__} has no skip connections that can be edited ({error}).") from error
    if sum(counts) != len(outputs):
        raise SctoolError(f"{type(denoiser).__name__}: {len(outputs)} skips for {sum(counts)} decoder layers.")
    # The first up block takes the last outputs, in encoder order.
    owners = [(block, position) for block, n in reversed(list(enumerate(counts))) for position in range(n)]
    return [Skip(i, *owner, *output) for i, (owner, output) in enumerate(zip(owners, outputs, strict=True))]


@dataclass(frozen=True)
class Middle:
    """The output of the middle block, the decoder's first input; `channels` wide."""

    channels: int

    def __str__(self) -> str:
        return f"middle block ({self.channels})"

    @staticmethod
    def hook(denoiser: nn.Module, edits: Sequence[SiteEdit]) -> list[RemovableHandle]:
        """A forward hook on the middle block."""
        return [denoiser.mid_block.register_forward_hook(_MiddleHook(edit).edit) for edit in edits]


class _MiddleHook:
    def __init__(self, edit: SiteEdit) -> None:
        self.middle = edit

    def edit(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """The edited output (B, C, h, w)."""
        return self.middle.edited(output)


def middle(denoiser: Any) -> Middle:
    """The middle block's output. Raises `SctoolError` for a model without a middle block."""
    block = getattr(denoiser, "mid_block", None)
    if block is None:
        raise SctoolError(f"{type(denoiser).__name__} has no middle block.")
    return Middle(block.resnets[-1].out_channels)
