"""Settings: lists with commas in pairs as in flags, layers of sources, one condition syntax everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from sctool.cli import run
from sctool.core.config import AnnotateConfig, SCEditConfig, TrainConfig, parse_value, resolve_config
from sctool.core.data.conditions import parse_conditions
from sctool.core.errors import UsageError
from sctool.core.tuners import method_config


@pytest.mark.parametrize(
    ("pair", "conditions"),
    [
        ("cond=canny", ("canny",)),
        ("cond=canny,color", ("canny", "color")),
        ("cond=[canny, color]", ("canny", "color")),
        ("cond=canny:low=50,high=150,color", ("canny", "color")),
    ],
)
def test_conditions_are_written_alike_in_pairs_and_flags(pair: str, conditions: tuple[str, ...]) -> None:
    config = resolve_config(TrainConfig, pairs=[pair])
    assert config.conditions == conditions
    if "[" not in pair:
        assert resolve_config(TrainConfig, flags={"cond": pair.removeprefix("cond=")}) == config
    assert resolve_config(AnnotateConfig, flags={"src": "photos", "cond": list(config.cond)}).cond == config.cond


def test_settings_of_a_condition_stay_with_it() -> None:
    assert resolve_config(TrainConfig, pairs=["cond=canny:low=50,high=150,color"]).cond == (
        "canny:low=50,high=150",
        "color",
    )
    specs = parse_conditions(["canny:low=50", "high=150", "color"])
    assert [(spec.name, spec.settings) for spec in specs] == [("canny", "low=50,high=150"), ("color", "")]
    assert [str(spec) for spec in specs] == ["canny:low=50,high=150", "color"]


@pytest.mark.parametrize(
    ("text", "message"), [("low=50,canny", "belongs to no condition"), ("canny,color,canny", "names 'canny' twice")]
)
def test_conditions_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_conditions(text)
    with pytest.raises(UsageError, match=message):
        resolve_config(TrainConfig, pairs=[f"cond={text}"])


@pytest.mark.parametrize(("text", "skips"), [("0,3,6", (0, 3, 6)), ("[0, 3]", (0, 3)), ("5", (5,))])
def test_lists_of_a_methods_settings(text: str, skips: tuple[int, ...]) -> None:
    settings = resolve_config(TrainConfig, pairs=[f"tuner.skips={text}"]).tuner
    assert method_config("scedit", settings) == SCEditConfig(skips=skips)


def test_lists_of_a_fixed_length() -> None:
    assert resolve_config(TrainConfig, pairs=["betas=0.8,0.9"]).betas == (0.8, 0.9)
    with pytest.raises(UsageError, match="betas"):
        resolve_config(TrainConfig, pairs=["betas=0.8,0.9,0.99"])
    with pytest.raises(UsageError, match="betas"):
        resolve_config(TrainConfig, pairs=["betas=0.8"])


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1.0e-3\nsteps: 7\ntuner: {ratio: 0.5, kernel: 3}\n")
    pairs = ["steps=9", "tuner.ratio=0.25"]
    config = resolve_config(TrainConfig, preset_name="demo", file=file, flags={"lr": 2e-3, "size": None}, pairs=pairs)
    assert (config.lr, config.steps, config.batch, config.size) == (2e-3, 9, 16, None)
    assert config.tuner == {"ratio": 0.25, "kernel": 3}
    assert TrainConfig().batch == 8


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("-2E3", -2000.0), ("5", 5), ("true", True), ("canny", "canny"), ("[0, 11]", [0, 11]),
     ("<sce>", "<sce>"), ("one", "one"), ("{", "{")],
)  # fmt: skip
def test_values_are_read_as_yaml_with_floats_as_people_write_them(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_wrong_pairs_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["lr"], "write it as key=value"),
        (["lrr=1"], "Did you mean 'lr'"),
        (["lr=-1"], "lr=-1"),
        (["cond=cany"], "Did you mean 'canny'"),
    ):
        assert run(["train", *words]) == 2
        assert said in capsys.readouterr().err


def test_no_images_are_no_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for count in ("0", "-1"):
        assert run(["sample", "a hat", "--no-tuner", "--count", count, "--out", str(tmp_path / "out")]) == 2
    assert "--count" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
