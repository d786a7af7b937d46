"""Tables of a few steps on a tiny base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sctool.eval.bench.collecting import make_table
from sctool.eval.bench.control import Control
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


@pytest.fixture(scope="session")
def controlled(
    make: MakeSettings, tiny_base: Path, edges: Path, base_maker: Callable[..., Path], tmp_path_factory: Any
) -> tuple[Workshop, Table]:
    """A finished control table of two methods on two bases, by edges of lower thresholds than the annotator's own."""
    other = base_maker(tmp_path_factory.mktemp("base") / "other", seed=1)
    flags = {"data": str(edges.parent / "pictures-canny"), "cond": "canny:low=50"}
    shutil.copytree(edges, flags["data"], ignore=shutil.ignore_patterns("*.canny.png", "*.jsonl"))
    rows = [json.loads(line) for line in (edges / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps({key: row[key] for key in ("file_name", "text", "split")}) + "\n" for row in rows]
    (Path(flags["data"]) / "metadata.jsonl").write_text("".join(lines))
    names, bases = ("scedit", "diffscaler"), [str(tiny_base), str(other)]
    settings = make(Control(), names=names, bases=bases, flags=flags, count=10)
    shop = open_workshop(settings, tmp_path_factory.mktemp("bench") / "control", quiet=True)
    return shop, make_table(shop)


@pytest.fixture
def no_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed."""
    monkeypatch.setattr(
        "sctool.eval.bench.tuner_work.measure_costs",
        lambda shop, configs: {
            "rows": {name: {"step_s": 1.0, "sample_step_s": 1.0, "peak_bytes": None} for name in configs},
            "protocol": {},
        },
    )
