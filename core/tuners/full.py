"""Full fine-tuning, the baseline: every weight of the denoiser is trained, on float32 copies that the tuner owns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..config import FullConfig
from ..errors import SctoolError, UsageError
from .base import Tuner


class _Node(nn.Module):
    """A place in the tree of names, so that the state dict has the denoiser's own keys."""


@dataclass(eq=False)
class _Swap:
    """The denoiser's own parameters, by the module that holds them, while the tuner's are in their place."""

    originals: list[tuple[nn.Module, str, nn.Parameter]]

    def remove(self) -> None:
        """Puts the very same parameters back."""
        for module, name, original in self.originals:
            device = module._parameters[name].device
            if original.device != device:  # the denoiser was moved while tuned
                original.data = original.data.to(device)
            module._parameters[name] = original
        self.originals.clear()


class Full(Tuner):
    """Trainable float32 copies of all parameters; attaching puts them in the denoiser, detaching restores its own."""

    method = "full"
    needs_autocast = True
    replaces_weights = True

    def __init__(
        self, config: FullConfig, denoiser: nn.Module, conditions: tuple[str, ...] = (), vae_scale: int = 8
    ) -> None:
        if conditions:
            raise UsageError("full fine-tuning takes no condition maps; drop --cond, or use --method scedit.")
        super().__init__(config, (), vae_scale)
        for name, parameter in denoiser.named_parameters():
            *path, leaf = name.split(".")
            node = self
            for part in path:
                if part not in node._modules:
                    node.add_module(part, _Node())
                node = node._modules[part]
            node.register_parameter(leaf, nn.Parameter(parameter.detach().float().clone()))

    def describe_sites(self) -> list[str]:
        """All weights."""
        return [f"all {sum(p.numel() for p in self.parameters()):,} weights"]

    def act(
        self,
        denoiser: nn.Module,
        *,
        scale: float = 1.0,
        weights: Mapping[str, float] | None = None,
        normalize: bool | None = None,
    ) -> _Swap:
        """Swaps the parameters in. Raises `SctoolError` when they do not fit or are in already."""
        if scale != 1:
            raise UsageError(f"a fully tuned model has no scale, but {scale} was given; use 1.")
        own = {name: p for name, p in self.named_parameters() if not name.startswith("new_classes.")}
        theirs = dict(denoiser.named_parameters())
        if own.keys() != theirs.keys() or any(own[name].shape != theirs[name].shape for name in own):
            raise SctoolError("this fully tuned model has other weights than the denoiser; it belongs to another base.")
        if any(own[name] is theirs[name] for name in own):
            raise SctoolError("this full tuner is already attached to the denoiser.")
        originals = []
        for name, original in theirs.items():
            path, _, leaf = name.rpartition(".")
            module = denoiser.get_submodule(path)
            originals.append((module, leaf, original))
            module._parameters[leaf] = own[name]
        return _Swap(originals)
