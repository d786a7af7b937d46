"""Token masking: a transformer computes with some of its tokens only, to train faster (MaskDiT, arXiv 2306.09305)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class TokenMask:
    """Hooks on the first and last module of a transformer. `kept` is set before a call and None for all tokens.

    After the position embedding the tokens `kept` (B, K) are gathered; at the end they go back to their places among
    zeros. Attention then sees the kept tokens alone, which equals masking the others as keys.
    """

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        self.kept: Tensor | None = None
        self.count = 0
        self._handles: list[RemovableHandle] = [
            first.register_forward_hook(self._gather),
            last.register_forward_hook(self._scatter),
        ]

    def _gather(self, module: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
        """Tokens (B, L, D) to (B, K, D)."""
        self.count = tokens.shape[1]
        if self.kept is None:
            return tokens
        return tokens.gather(1, self.kept[..., None].expand(-1, -1, tokens.shape[2]))

    def _scatter(self, module: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
        """Tokens (B, K, D) to (B, L, D)."""
        if self.kept is None:
            return tokens
        places = self.kept[..., None].expand(-1, -1, tokens.shape[2])
        return tokens.new_zeros(len(tokens), self.count, tokens.shape[2]).scatter(1, places, tokens)

    def remove(self) -> None:
        """Takes the hooks off."""
        while self._handles:
            self._handles.pop().remove()


def kept_places(kept: Tensor, shape: tuple[int, int], patch: int) -> Tensor:
    """The latent's places that the kept tokens (B, K) cover: bool (B, 1, h, w) for latents of `shape` (h, w)."""
    height, width = (side // patch for side in shape)
    tokens = torch.zeros(len(kept), height * width, dtype=torch.bool, device=kept.device).scatter(1, kept, True)
    return tokens.view(-1, 1, height, width).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
