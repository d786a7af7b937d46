"""Tables of a few steps on a tiny base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sctool.eval.bench.settings import Settings, make_settings
from sctool.eval.bench.transfer import TransferTable, transfer
from sctool.eval.bench.workshop import Workshop, open_workshop

MakeSettings = Callable[..., Settings]


@pytest.fixture(scope="session")
def make(tiny_base: Path, pictures: Path) -> MakeSettings:
    """Settings of a table of two methods, three seeds and three steps; keywords change them."""

    def settings(**more: Any) -> Settings:
        flags = {"base": str(tiny_base), "data": str(pictures), "steps": 3, "batch": 2, **more.pop("flags", {})}
        usual = {"methods": ("full", "scedit"), "seeds": 3, "count": 4, "sample_steps": 2, "features": "mini"}
        return make_settings(**{**usual, **more}, flags=flags)

    return settings


@pytest.fixture(scope="session")
def finished(make: MakeSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, TransferTable]:
    """A finished table. Tests leave its folder as it is."""
    shop = open_workshop(make(), tmp_path_factory.mktemp("bench") / "transfer", quiet=True)
    return shop, transfer(shop)


@pytest.fixture
def no_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed."""
    monkeypatch.setattr(
        "sctool.eval.bench.transfer.measure_costs",
        lambda shop, configs: {
            "methods": {name: {"step_s": 1.0, "peak_bytes": None} for name in configs},
            "protocol": {},
        },
    )
