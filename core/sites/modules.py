"""Whole modules as sites: what they are given and what they return, by public hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .layers import find_module

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .site import SiteEdit


def hooked(
    denoiser: nn.Module, edits: Sequence[SiteEdit], register: Callable[[nn.Module, SiteEdit], RemovableHandle]
) -> list[RemovableHandle]:
    """Registers a hook on the module of each site. Raises `SctoolError`, before any is, for one that is not there."""
    modules = [find_module(denoiser, edit.site.name) for edit in edits]
    return [register(module, edit) for module, edit in zip(modules, edits, strict=True)]


@dataclass(frozen=True)
class Output:
    """The output (B, ..., width) of the module of that name; of one that returns several values, the first."""

    name: str
    width: int

    def __str__(self) -> str:
        return f"output of {self.name} ({self.width} wide)"

    @staticmethod
    def hook(denoiser: nn.Module, edits: Sequence[SiteEdit]) -> list[RemovableHandle]:
        """A forward hook on each module."""
        return hooked(denoiser, edits, lambda module, edit: module.register_forward_hook(_Hook(edit).output))


@dataclass(frozen=True)
class Entry:
    """The first argument (B, ...) of the module of that name. Tuners are given its second too, where it is a tensor."""

    name: str

    def __str__(self) -> str:
        return f"input of {self.name}"

    @staticmethod
    def hook(denoiser: nn.Module, edits: Sequence[SiteEdit]) -> list[RemovableHandle]:
        """A forward pre-hook on each module."""
        return hooked(denoiser, edits, lambda module, edit: module.register_forward_pre_hook(_Hook(edit).entry))


class _Hook:
    """Its methods are the hooks: bound ones, so that a deep copy of the model uses the copy's tuners."""

    def __init__(self, edit: SiteEdit) -> None:
        self.edit = edit

    def output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """The edited output."""
        if isinstance(output, tuple):
            return (self.edit.edited(output[0]), *output[1:])
        return self.edit.edited(output)

    def entry(self, module: nn.Module, args: tuple) -> tuple:
        """The arguments with the edited first one."""
        second = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else None
        return (self.edit.edited(args[0], second, module), *args[1:])
