"""Exchanging frozen modules for equal ones that share all they have, and putting the originals back.

The new module is of a subclass and has the same dictionaries of parameters, buffers, submodules and hooks: names and
keys stay, hooks fire, and whoever holds a handle of a hook removes it from both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def sharing(kind: type[M], original: nn.Module, **own: Any) -> M:
    """A module of a class derived from the original's that shares its state, with attributes of its own besides."""
    assert issubclass(kind, type(original)), "an exchanged module is of a subclass"
    new = kind.__new__(kind)
    new.__dict__.update({**original.__dict__, **own})
    return new


@dataclass(eq=False)
class Exchange:
    """Modules that stand in for others until it is removed. A plain object, so that a deep copy undoes the copy's."""

    done: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    def put(self, holder: nn.Module, name: str, new: nn.Module) -> None:
        """Puts `new` in the place of the holder's submodule `name`."""
        original = holder._modules[name]
        assert original is not None
        self.done.append((holder, name, original))
        holder._modules[name] = new

    def remove(self) -> None:
        """Puts the very same modules back, last first; what was set on a stand-in meanwhile, as its mode, stays set."""
        while self.done:
            holder, name, original = self.done.pop()
            new = holder._modules[name]
            assert new is not None
            kept = {key for key in original.__dict__.keys() & new.__dict__.keys() if not key.startswith("_")}
            original.__dict__.update({key: new.__dict__[key] for key in kept})
            holder._modules[name] = original


def places(root: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every submodule with its holder and its name there, holders before what they hold."""
    for holder in list(root.modules()):
        yield from ((holder, name, module) for name, module in list(holder.named_children()))


def hooked(*modules: nn.Module) -> bool:
    """Whether anyone looks at what a module is given or returns."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def trained(module: nn.Module) -> bool:
    """Whether any of the module's own weights, not its submodules', is trained."""
    return any(p is not None and p.requires_grad for p in module._parameters.values())
