"""Inputs of a denoiser as sites: condition columns of its first layer, and further rows of its class tables.

Condition columns: W [z; c] = W_z z + W_c c. The frozen layer gives W_z z; a tuner adds W_c c, its own columns, so the
denoiser itself is not widened. Class rows: ids beyond the table read its last row, the null class, to which a tuner
adds what makes it a class of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import SctoolError
from .layers import Layer, find_module, layer_site

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .site import SiteEdit

FIRST_LAYERS = ("conv_in", "pos_embed.proj")
"""Names of the layer that reads the latents: U-Nets, transformers."""


def input_layer(denoiser: nn.Module) -> Layer:
    """The layer that reads the noisy latents, as a site: what a tuner adds there are condition columns.

    Raises `SctoolError` for a denoiser whose first layer is not known.
    """
    modules = dict(denoiser.named_modules())
    for name in FIRST_LAYERS:
        layer = modules.get(name)
        if isinstance(layer, nn.Conv2d):
            return layer_site(name, layer)
    raise SctoolError(f"{type(denoiser).__name__} has none of the input layers {', '.join(FIRST_LAYERS)}.")


@dataclass(frozen=True)
class ClassRows:
    """A class table (an `Embedding`) by its name, with its number of rows and width."""

    name: str
    rows: int
    width: int

    def __str__(self) -> str:
        return f"{self.name} ({self.rows} rows)"

    @staticmethod
    def hook(denoiser: nn.Module, edits: Sequence[SiteEdit]) -> list[RemovableHandle]:
        """Two hooks per table: ids beyond it read the last row, and what they read is then edited, given the ids."""
        handles = []
        tables = [find_module(denoiser, edit.site.name) for edit in edits]
        for edit, table in zip(edits, tables, strict=True):
            hook = _RowsHook(edit)
            handles += [table.register_forward_pre_hook(hook.clamp), table.register_forward_hook(hook.edit)]
        return handles


class _RowsHook:
    def __init__(self, edit: SiteEdit) -> None:
        self.rows, self.ids = edit, None

    ids: Tensor | None
    """The ids of the call under way."""

    def clamp(self, table: nn.Module, args: tuple) -> tuple[Any, ...]:
        """Ids (B,) within the table. A sample's ids beyond it are one tuner's."""
        self.rows.refuse_overlap()
        self.ids = args[0]
        return (args[0].clamp(max=self.rows.site.rows - 1), *args[1:])

    def edit(self, table: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """The edited rows (B, D), given the ids as they came."""
        ids, self.ids = self.ids, None
        return self.rows.edited(output, ids)


def class_tables(denoiser: nn.Module) -> list[ClassRows]:
    """The class tables of a class-conditional transformer, one per block where they are not tied.

    Raises `SctoolError` for a denoiser without one.
    """
    tables = [
        ClassRows(name, module.num_embeddings, module.embedding_dim)
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Embedding) and "class_embed" in name
    ]
    if not tables:
        raise SctoolError(f"{type(denoiser).__name__} has no class table.")
    return tables
