"""DiffScaler's table 1 (Nair et al. 2024): methods adapt one base to one data set with one budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ...core.config import TrainConfig
from ...core.errors import UsageError
from ...core.tuners import TUNERS
from .form import Form
from .papers import DIFFSCALER_TRANSFER


class Transfer(Form):
    """Methods without condition maps."""

    name = "transfer"
    title = "Transfer of {bases} to {data}"
    papers = (DIFFSCALER_TRANSFER,)
    refused: ClassVar[Mapping[str, str]] = {
        **Form.refused,
        "cond": "this table adapts without condition maps; sctool bench control compares methods that take them",
    }

    def check_config(self, config: TrainConfig) -> None:
        """Refuses methods that need condition maps."""
        super().check_config(config)
        if TUNERS[config.method].control == "required":
            raise UsageError(f"--methods {config.method} needs condition maps: use sctool bench control --cond canny.")
