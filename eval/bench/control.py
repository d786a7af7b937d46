"""SCEdit's table 2 (Jiang et al. 2023) and ELR-Diffusion's: methods learn to follow the same condition maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from ...core.config import TrainConfig
from ...core.errors import UsageError
from ...core.tuners import TUNERS
from .form import Form
from .papers import DIFFSCALER_CONTROL, ELR_CONTROL, SCEDIT_CONTROL


class Control(Form):
    """Methods with condition maps."""

    name = "control"
    title = "Control of {bases} by {cond} on {data}"
    papers = (SCEDIT_CONTROL, DIFFSCALER_CONTROL, ELR_CONTROL)
    example = "scedit,diffscaler"
    clip = True
    refused: ClassVar[Mapping[str, str]] = {**Form.refused, "cond": "conditions are given with --cond"}

    def check_names(self, names: Sequence[str], own: Mapping[str, tuple[str, ...]]) -> None:
        """Refuses methods that take no condition maps."""
        super().check_names(names, own)
        able = [name for name, method in TUNERS.items() if method.control != "none"]
        if unable := [name for name in names if name not in able]:
            raise UsageError(
                f"--methods {unable[0]} takes no condition maps, so it controls nothing. Those that do: "
                f"{', '.join(able)}. sctool bench transfer compares the others."
            )

    def check_config(self, config: TrainConfig) -> None:
        """Refuses a table without conditions."""
        super().check_config(config)
        if not config.cond:
            raise UsageError("bench control needs condition maps: add --cond, e.g. --cond canny.")
