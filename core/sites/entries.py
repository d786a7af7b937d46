"""What modules are given as sites: the input of a residual block or a sampler, by public forward pre-hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .layers import find_module

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .site import SiteEdit


@dataclass(frozen=True)
class Entry:
    """The first argument (B, ...) of the module of that name. Tuners are given its second too, where it is a tensor."""

    name: str

    def __str__(self) -> str:
        return f"input of {self.name}"

    @staticmethod
    def hook(denoiser: nn.Module, edits: Sequence[SiteEdit]) -> list[RemovableHandle]:
        """A forward pre-hook on each module. Raises `SctoolError` for a module that is not there."""
        modules = [find_module(denoiser, edit.site.name) for edit in edits]
        pairs = zip(modules, edits, strict=True)
        return [module.register_forward_pre_hook(_EntryHook(edit).edit) for module, edit in pairs]


class _EntryHook:
    """A bound method, so that a deep copy of the model uses the copy's tuners."""

    def __init__(self, edit: SiteEdit) -> None:
        self.entry = edit

    def edit(self, module: nn.Module, args: tuple) -> tuple:
        """The arguments with the edited first one."""
        second = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else None
        return (self.entry.edited(args[0], second, module), *args[1:])
