"""The table of metrics is the only place that knows them: flags, checks and figures follow it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import typer
from PIL import Image

from sctool.cli import app
from sctool.core.errors import UsageError
from sctool.eval import metrics as module
from sctool.eval.control.table import conditions_of, scores
from sctool.eval.evaluate import evaluate
from sctool.eval.intervals import Estimate
from sctool.eval.metrics import CONTROL, METRICS, SET_METRICS, FigureInfo, Metric, flag_list
from sctool.eval.options import Options
from sctool.eval.sets.extraction import meter_class
from sctool.eval.sets.feature_store import FeatureStore
from sctool.eval.sets.meter import SetMeter


@pytest.fixture(autouse=True)
def _no_models(mean_features: None) -> None: ...


def test_every_metric_has_its_flag_with_its_help() -> None:
    command = typer.main.get_command(app).commands["evaluate"]  # type: ignore[attr-defined]
    options = {
        flag: option.help for option in command.params if option.param_type_name == "option" for flag in option.opts
    }
    for row in METRICS.values():
        assert options[row.flag] == row.help


def test_the_flags_select_the_metrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sctool.cli import run
    from sctool.eval.results import Results

    requested: list[tuple[str, ...]] = []

    def measure(target: str | None, options: Options, runs: Path) -> Results:
        requested.append(options.metrics)
        return Results(str(tmp_path), [])

    monkeypatch.setattr("sctool.eval.evaluate.evaluate", measure)
    for words in ([], ["--is"], [row.flag for row in METRICS.values()]):
        assert run(["evaluate", *words, "--json"]) == 0
    assert requested == [(), ("is",), tuple(METRICS)]


def test_every_set_metric_has_its_meter() -> None:
    assert set(SET_METRICS) == {"fid", "kid", "is", "pr", "cmmd"}
    for row in SET_METRICS.values():
        assert issubclass(meter_class(row), SetMeter)
        assert row.figures


def test_control_metrics_select_conditions_by_their_scores() -> None:
    assert conditions_of(METRICS["control"]) == scores().keys()
    assert conditions_of(METRICS["nmse"]) == {"canny", "sketch"}
    assert conditions_of(METRICS["iou"]) == {"seg"}
    for cls in scores().values():
        assert not cls.metric or CONTROL[cls.metric].hints == "selected"
        assert {info.better for info in cls().figure_info.values()} <= {"lower", "higher", ""}


def test_unknown_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown metric 'nmes'\. Did you mean 'nmse'"):
        evaluate(tmp_path, Options(metrics=("nmes",), quiet=True))
    assert flag_list({name: METRICS[name] for name in ("fid", "kid", "pr")}, "or") == "--fid, --kid or --pr"


class MeanShift(FeatureStore, SetMeter):
    """Distance between the means of drawn and reference features."""

    protocol: ClassVar[dict[str, Any]] = {"norm": "L2"}

    def compute(self, real: np.ndarray) -> dict[str, Estimate]:
        return {"shift": Estimate(float(np.linalg.norm(self.rows().mean(0) - real.mean(0))), None)}


def test_a_new_set_metric_is_a_file_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ModuleType("sctool.eval.sets.mean_shift")
    vars(file)["MeanShift"] = MeanShift
    monkeypatch.setitem(sys.modules, file.__name__, file)
    figures = {"shift": FigureInfo("mean shift", "lower")}
    row = Metric("shift", "Mean shift.", references="images", meter="mean_shift.MeanShift", figures=figures)
    for table in (module.METRICS, module.SET_METRICS):
        monkeypatch.setitem(table, "shift", row)
    for name, grey in (("drawn", 10), ("real", 40)):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(tmp_path / name / f"{index}.png")
    options = Options(metrics=("shift",), reference=str(tmp_path / "real"), quiet=True)
    (figure,) = evaluate(tmp_path / "drawn", options).folders[0].figures
    assert (figure.key, figure.name, figure.better) == ("shift_means", "mean shift (means)", "lower")
    assert figure.value == pytest.approx(30 * np.sqrt(3))
    assert figure.protocol["norm"] == "L2"
    assert json.dumps(figure.protocol["reference"]).startswith('{"n": 3')
    with pytest.raises(UsageError, match="--shift"):
        evaluate(tmp_path / "drawn", Options(metrics=("shift",), quiet=True))
