"""A tuner's parameters under the denoiser's own names, so that its state dict has the same keys."""

from __future__ import annotations

from torch import nn


class _Node(nn.Module):
    """A place in the tree of names."""


def place(root: nn.Module, name: str, value: nn.Parameter | nn.Module) -> None:
    """Registers a parameter or module below `root` under the dotted `name`."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, _Node())
        child = root._modules[part]
        assert child is not None
        root = child
    if isinstance(value, nn.Module):
        root.add_module(leaf, value)
    else:
        root.register_parameter(leaf, value)
