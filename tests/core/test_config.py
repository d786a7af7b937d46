"""Settings: defaults, presets, YAML, flags and pairs in this order; values as they are written on a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sctool.cli import run
from sctool.core.backbones.families import FAMILIES
from sctool.core.config import AnnotateConfig, SampleConfig, TrainConfig
from sctool.core.data.conditions import ConditionSpec, condition_names, parse_conditions
from sctool.core.errors import UsageError
from sctool.core.resolving import PRESETS, build, parse_value, preset, read_yaml, resolve_config, to_yaml
from sctool.core.tuners import method_config, with_learning_rate
from sctool.core.tuners.configs import SCEditConfig


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E-4", 1e-4), ("-2.5e+3", -2500.0), ("3", 3), ("0.5", 0.5), ("true", True), ("null", None),
        ("", ""), ("[0, 11]", [0, 11]), ("canny", "canny"), ("e", "e"), ("1e", "1e"), ("a: b: c", "a: b: c"),
        ("edge", "edge"),
    ],
)  # fmt: skip
def test_values_are_read_as_they_are_written(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_what_is_said_later_wins(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lr: 3.0e-4\nsteps: 7\nbatch: 5\ntuner: {ratio: 0.5, kernel: 3}\n")
    values = {**preset("scedit-control"), **read_yaml(file)}
    assert {"lr", "batch"} <= preset("scedit-control").keys(), "the preset must say something that the file changes"
    config = resolve_config(
        TrainConfig, preset_name="scedit-control", file=file, flags={"steps": 8, "seed": None, "batch": 6},
        pairs=["batch=9", "tuner.ratio=0.25", "tuner.weights.canny=2", "trigger=a=b"],
    )  # fmt: skip
    assert (config.lr, config.steps, config.batch, config.seed) == (3e-4, 8, 9, 0)
    assert config.tuner == {"ratio": 0.25, "kernel": 3, "weights": {"canny": 2}}
    assert config.trigger == "a=b"
    for key in values.keys() - {"lr", "steps", "batch", "tuner"}:
        assert getattr(config, key) == getattr(build(TrainConfig, values), key)


def test_pairs_without_an_equals_sign_and_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="write it as key=value"):
        resolve_config(TrainConfig, pairs=["lr"])
    with pytest.raises(UsageError, match="Did you mean 'steps'"):
        resolve_config(TrainConfig, pairs=["stepps=3"])
    with pytest.raises(UsageError, match="Did you mean 'scedit-control'"):
        preset("scedit-controll")
    with pytest.raises(UsageError, match="cannot read config"):
        read_yaml(tmp_path / "none.yaml")
    for text, reason in (("a: [", "not valid YAML"), ("- 1\n", "mapping")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UsageError, match=reason):
            read_yaml(tmp_path / "bad.yaml")


@pytest.mark.parametrize("name", [path.stem for path in PRESETS.glob("*.yaml")])
def test_a_preset_resolves_to_its_own_values_and_is_saved_whole(name: str) -> None:
    config = resolve_config(TrainConfig, preset_name=name)
    for key, value in preset(name).items():
        resolved = getattr(config, key)
        assert (list(resolved) if isinstance(resolved, tuple) else resolved) == value
    saved = yaml.safe_load(to_yaml(config))
    assert saved.keys() == TrainConfig.model_fields.keys()
    assert build(TrainConfig, saved) == config


def test_lists_may_be_written_with_commas() -> None:
    assert build(SCEditConfig, {"skips": "0,3, 11"}).skips == (0, 3, 11)
    assert build(SCEditConfig, {"skips": 4}).skips == (4,)
    assert build(SCEditConfig, {"skips": [1, 2]}).skips == (1, 2)
    assert build(SCEditConfig, {}).skips is None
    assert build(TrainConfig, {"betas": "0.8,0.9"}).betas == (0.8, 0.9)
    assert build(TrainConfig, {"cond": "canny:low=50,high=150,color"}).conditions == ("canny", "color")
    assert build(AnnotateConfig, {"src": "a", "cond": "canny"}).cond == ("canny",)
    assert build(TrainConfig, {"trigger": "red, blue"}).trigger == "red, blue", "a text is not a list"


def test_the_documented_defaults() -> None:
    """What a run does that names nothing: a change here changes the numbers of everybody who relied on it."""
    train, sample, scedit = TrainConfig(), SampleConfig(), SCEditConfig()
    assert (train.method, train.base, train.data, train.cond) == ("scedit", "mini", "photos", ())
    assert (train.lr, train.betas, train.weight_decay, train.max_grad_norm) == (None, (0.9, 0.999), 0.01, 1.0)
    assert [with_learning_rate(TrainConfig(method=name)).lr for name in ("full", "scedit")] == [1e-4, 1e-4]
    assert with_learning_rate(TrainConfig(lr=3e-4)).lr == 3e-4
    assert (train.mask, train.mask_anneal) == (0.0, 0.2)
    assert (train.steps, train.batch, train.accumulate, train.warmup) == (1000, 8, 1, 0)
    assert (train.schedule, train.snr_gamma, train.ema, train.seed) == ("constant", None, 0.0, 0)
    assert (train.caption_dropout, train.hint_dropout, train.flip, train.val_count) == (0.1, 0.0, False, 64)
    assert (train.hint_keep_all, train.hint_drop_all) == (0.0, 0.0)
    assert (train.guidance, train.preview_steps, train.precision) == (None, 20, "auto")
    assert (sample.scheduler, sample.steps, sample.guidance, sample.rescale) == ("ddim", 50, None, 0.0)
    assert [family.guidance for family in FAMILIES] == [7.5, 7.5, 4.0]
    assert (sample.negative, sample.batch) == ("", 8)
    assert (scedit.operator, scedit.ratio, scedit.kernel, scedit.dual) == ("linear", 1.0, 1, False)
    assert (scedit.cascade, scedit.normalize, scedit.hint_channels) == ("zero-chain", True, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0}, {"steps": 0}, {"batch": 0}, {"accumulate": 0}, {"ema": 1.0}, {"caption_dropout": 1.1},
        {"hint_dropout": -0.1}, {"snr_gamma": 0}, {"keep": 0}, {"save_every": 0}, {"size": 7}, {"guidance": -1},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_their_key(wrong: dict[str, Any]) -> None:
    (key,) = wrong
    with pytest.raises(UsageError, match=f"^{key}="):
        build(TrainConfig, wrong)


# ---------------------------------------------------------------------------------------------------- conditions


def test_settings_belong_to_the_condition_before_them() -> None:
    assert parse_conditions("canny:low=50,high=150, color ,mask:preset=thin") == (
        ConditionSpec("canny", "low=50,high=150"), ConditionSpec("color"), ConditionSpec("mask", "preset=thin"),
    )  # fmt: skip
    assert parse_conditions(["canny", "color"]) == (ConditionSpec("canny"), ConditionSpec("color"))
    assert str(ConditionSpec("canny", "low=50")) == "canny:low=50"
    assert parse_conditions("") == ()


def test_a_condition_is_named_once_and_settings_need_one() -> None:
    for text in ("canny,canny", "canny:low=1,color,canny:low=2"):
        with pytest.raises(UsageError, match="names 'canny' twice"):
            parse_conditions(text)
    with pytest.raises(UsageError, match="--hint 'low=1' belongs to no condition"):
        parse_conditions("low=1,canny", "--hint")


def test_conditions_by_whether_they_need_weights() -> None:
    assert condition_names(network=False) == "canny, color, mask, outpaint"
    assert condition_names(network=True) == "hed, sketch, depth, seg, pose"


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


@pytest.mark.parametrize("text", ["{label}", "a photo: {label}", "no", "", "1e-4", "[x]"])
def test_text_is_taken_as_written_and_not_as_yaml(text: str) -> None:
    assert resolve_config(TrainConfig, pairs=[f"caption={text}"]).caption == text
    assert resolve_config(TrainConfig, pairs=[f"trigger={text}", f"maps={text}"]).maps == text
    assert resolve_config(SampleConfig, pairs=[f"negative={text}"]).negative == text


def test_an_empty_condition_is_not_no_condition(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", ","):
        assert run(["train", "--cond", text, "--dry-run"]) == 2
        assert "names no condition" in capsys.readouterr().err


def test_a_local_path_is_never_asked_of_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    for base in ("./nowhere", "../nowhere", "~/nowhere-at-all"):
        assert run(["methods", "--base", base]) == 2
        assert "there is no such folder" in capsys.readouterr().err


def test_conditions_of_a_method_without_them_are_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "--method", "full", "--cond", "canny", "--base", str(tmp_path / "nowhere")]) == 2
    assert (
        "--method full takes no condition maps. Drop --cond, or use one of scedit, diffscaler, controlnet"
        in capsys.readouterr().err
    )
