"""Outputs of whole modules as sites: what an attention or a feed-forward network returns, by public forward hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .layers import find_module

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .site import SiteEdit


@dataclass(frozen=True)
class Output:
    """The output (B, ..., width) of the module of that name."""

    name: str
    width: int

    def __str__(self) -> str:
        return f"output of {self.name} ({self.width} wide)"

    @staticmethod
    def hook(denoiser: nn.Module, edits: Sequence[SiteEdit]) -> list[RemovableHandle]:
        """A forward hook on each module. Raises `SctoolError` for a module that is not there."""
        modules = [find_module(denoiser, edit.site.name) for edit in edits]
        pairs = zip(modules, edits, strict=True)
        return [module.register_forward_hook(_OutputHook(edit).edit) for module, edit in pairs]


class _OutputHook:
    """A bound method, so that a deep copy of the model uses the copy's tuners."""

    def __init__(self, edit: SiteEdit) -> None:
        self.output = edit

    def edit(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """The edited output; of a module that returns several values, the first."""
        if isinstance(output, tuple):
            return (self.output.edited(output[0]), *output[1:])
        return self.output.edited(output)
