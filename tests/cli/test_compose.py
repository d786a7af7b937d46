"""`sctool sample --compose`: how several tuners act together, what is recorded, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sctool.cli import run as sctool
from sctool.core.backbones.loading import load_backbone
from sctool.core.checkpoint import save_tuner
from sctool.core.tuners import method_config, tuner_class


@pytest.fixture
def make(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    base = load_backbone(str(tiny_base))
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        seed = np.random.default_rng(ord(name))
        Image.fromarray(seed.integers(0, 2, (32, 32), np.uint8) * 255).save(tmp_path / f"{name}.png")

    def make(name: str, method: str = "scedit", conditions: tuple = (), **settings: Any) -> str:
        torch.manual_seed(len(name))
        config = method_config(method, settings)
        tuner = tuner_class(method).build(config, base.denoiser, conditions, base.vae_scale)
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        save_tuner(tmp_path / name, tuner, base)
        return name

    return make


def draw(*words: str, out: str) -> tuple[np.ndarray, dict[str, Any]]:
    assert sctool(["sample", "a photo", *words, "--steps", "2", "--out", out, "--quiet"]) == 0
    return np.asarray(Image.open(Path(out) / "000000.png")), json.loads((Path(out) / "sampling.json").read_text())


def test_the_rule_changes_images_and_is_recorded(make: Callable[..., str]) -> None:
    edges, colors = make("edges", conditions=("canny",)), make("colors", conditions=("color",))
    both = ["--tuner", edges, "--tuner", colors, "--hint", "canny=a.png", "--hint", "color=b.png"]
    added, protocol = draw(*both, out="sum")
    assert protocol["compose"] == "sum"
    assert (draw(*both, "--compose", "sum", out="said")[0] == added).all()
    routed, protocol = draw(*both, "--compose", "routed", out="routed")
    assert protocol["compose"] == "routed"
    assert (routed != added).any()
    turned = [both[i] for i in (2, 3, 0, 1)] + both[4:]
    assert np.abs(draw(*turned, "--compose", "routed", out="turned")[0].astype(int) - routed).max() <= 1
    one = ["--tuner", edges, "--hint", "canny=a.png"]
    alone, _ = draw(*one, out="one")
    assert (draw(*one, "--compose", "routed", out="one-routed")[0] == alone).all()
    assert "compose" not in draw("--no-tuner", "--base", protocol["base"]["id"], out="base")[1]


REFUSED = {
    "an unknown rule": (["--tuner", "edges", "--compose", "route"], "Did you mean 'routed'"),
    "a method that adds nothing": (["--tuner", "edges", "--tuner", "biases", "--compose", "routed"], "bitfit changes"),
    "no tuner": (["--no-tuner", "--compose", "routed"], "leave it out with --no-tuner"),
    "a weight that does nothing": (
        ["--tuner", "edges", "--hint", "canny=a.png:0.5", "--compose", "routed"],
        "--tuner FILE:SCALE, or pass --no-normalize",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused(
    case: str, make: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    make("edges", conditions=("canny",))
    make("biases", "bitfit")
    words, message = REFUSED[case]
    assert sctool(["sample", "a photo", *words, "--out", "out", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert len(error.strip().splitlines()) <= 3
    assert not Path("out").exists()


def test_held_out_images_are_drawn_by_one_tuner(make: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sctool(["sample", "--tuner", make("edges"), "--compose", "routed"]) == 2
    assert "--compose is for several tuners" in " ".join(capsys.readouterr().err.split())
