"""Tables of a few steps on a tiny base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sctool.eval.bench.collecting import make_table
from sctool.eval.bench.form import Form
from sctool.eval.bench.settings import Measuring, Settings, make_settings
from sctool.eval.bench.table import Table
from sctool.eval.bench.transfer import Transfer
from sctool.eval.bench.workshop import Workshop, open_workshop

MakeSettings = Callable[..., Settings]


@pytest.fixture(scope="session")
def make(tiny_base: Path, pictures: Path) -> MakeSettings:
    """Settings of a table of two methods, three seeds and three steps; keywords change them."""

    def settings(form: Form | None = None, **more: Any) -> Settings:
        flags = {"data": str(pictures), "steps": 3, "batch": 2, **more.pop("flags", {})}
        usual = {"names": ("full", "scedit"), "bases": [str(tiny_base)], "seeds": 3, "count": 4, "sample_steps": 2}
        usual["measuring"] = Measuring("mini")
        return make_settings(form or Transfer(), **{**usual, **more}, flags=flags)

    return settings


@pytest.fixture(scope="session")
def finished(make: MakeSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, Table]:
    """A finished table. Tests leave its folder as it is."""
    shop = open_workshop(make(), tmp_path_factory.mktemp("bench") / "transfer", quiet=True)
    return shop, make_table(shop)


@pytest.fixture
def no_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed."""
    monkeypatch.setattr(
        "sctool.eval.bench.cost.measure_costs",
        lambda shop, configs: {
            "rows": {name: {"step_s": 1.0, "sample_step_s": 1.0, "peak_bytes": None} for name in configs},
            "protocol": {},
        },
    )
