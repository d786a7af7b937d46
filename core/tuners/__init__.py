"""The methods, by name. Importable without torch: a row loads its code when asked.

A new method is one file here, one row in `TUNERS` and one config class in `core/config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from ..config import Config, FullConfig, SCEditConfig, build
from ..errors import unknown

if TYPE_CHECKING:
    from .base import Tuner


@dataclass(frozen=True)
class Row:
    """A method: its settings, where its class is, what it does and who proposed it. `kind` is where it acts."""

    config: type[Config]
    module: str
    cls: str
    summary: str
    paper: str
    kind: Literal["skips", "weights"]

    def load(self) -> type[Tuner]:
        """The tuner class; imports torch."""
        return getattr(import_module(self.module, __package__), self.cls)


TUNERS: dict[str, Row] = {
    "scedit": Row(
        SCEditConfig,
        ".scedit",
        "SCEdit",
        "edits the skip connections: SC-Tuner without conditions, CSC-Tuner with them",
        "Jiang et al. 2023, arXiv 2312.11392",
        "skips",
    ),
    "full": Row(FullConfig, ".full", "Full", "trains every weight of the denoiser", "baseline", "weights"),
}


def _row(name: str) -> Row:
    if name not in TUNERS:
        raise unknown("method", name, TUNERS)
    return TUNERS[name]


def tuner_class(name: str) -> type[Tuner]:
    """The class of method `name`. Raises `UsageError` naming the nearest method for an unknown one."""
    return _row(name).load()


def method_config(name: str, values: Mapping[str, Any]) -> Config:
    """The settings of method `name`, validated. Raises `UsageError` for an unknown method or key, or a wrong value."""
    return build(_row(name).config, values, f"{name} ")
