"""`sctool import` and `sctool export`: what they print, write and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from sctool.cli import run as sctool
from sctool.core.backbones.loading import load_backbone
from sctool.core.checkpoint import load_tuner, save_tuner
from sctool.core.sites.attaching import tuned
from sctool.core.tuners import method_config, tuner_class


@pytest.fixture
def work(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, entered, with a LoRA and a ControlNet of two conditions of the tiny base."""
    monkeypatch.chdir(tmp_path)
    base = load_backbone(str(tiny_base))
    for name, method, conditions in (("style", "lora", ()), ("edges", "controlnet", ("canny", "depth"))):
        tuner = tuner_class(method).build(method_config(method, {}), base.denoiser, conditions, base.vae_scale)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        save_tuner(tmp_path / name, tuner, base)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    capsys.readouterr()
    assert sctool([str(word) for word in words]) == code
    out, error = capsys.readouterr()
    assert "Traceback" not in error
    return out if code == 0 else " ".join(error.split())


def test_out_and_in_again(work: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "export", "style", "--to", "kohya").split() == ["style-kohya/style-kohya.safetensors"]
    file = work / "style-kohya" / "style-kohya.safetensors"
    listed = said(capsys, "import", file, "--base", tiny_base, "--dry-run", "--out", "back")
    assert not (work / "back").exists()
    for key in load_file(file):
        assert f"  {key} -> " in listed
    report = json.loads(said(capsys, "import", file, "--base", tiny_base, "--out", "back", "--json"))
    assert (report["method"], report["unused"]) == ("lora", [])
    assert report["used"].keys() == load_file(file).keys()
    ours, theirs = load_file(work / "style" / "tuner.safetensors"), load_file(report["tuner"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_controlnet_of_each_condition(work: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = json.loads(said(capsys, "export", "edges", "--to", "diffusers", "--json"))["files"]
    assert {Path(file).parent.name for file in files} == {"canny", "depth"}
    report = json.loads(said(capsys, "import", "edges-diffusers/depth", "--base", tiny_base, "--out", "d", "--json"))
    assert (report["method"], report["conditions"]) == ("controlnet", ["depth"])
    ours, theirs = load_file(work / "edges" / "tuner.safetensors"), load_file(report["tuner"])
    assert theirs.keys() == {name for name in ours if ".depth." in name}
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert (
        report["used"].keys() == load_file(next(f for f in files if "depth" in f and f.endswith("safetensors"))).keys()
    )


def test_what_is_refused(work: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'kohya'" in said(capsys, "export", "style", "--to", "kohja", code=2)
    assert "--to diffusers can." in said(capsys, "export", "edges", "--to", "peft", code=2)
    (work / "taken").mkdir()
    (work / "taken" / "file").touch()
    assert "exists already" in said(capsys, "export", "style", "--to", "peft", "--out", "taken", code=2)
    said(capsys, "export", "style", "--to", "kohya", "--out", "k")
    file = work / "k" / "k.safetensors"
    assert "exists already" in said(capsys, "import", file, "--base", tiny_base, "--out", "taken", code=2)
    words = ("import", file, "--base", tiny_base, "--out", "x")
    assert "name one condition" in said(capsys, *words, "--cond", "canny,color", code=2)
    assert "has no condition maps; leave --cond out" in said(capsys, *words, "--cond", "canny", code=2)
    save_file({**load_file(file), "lora_te_a.alpha": torch.ones(1)}, file)
    assert "keys that would be dropped: lora_te_a.alpha" in said(capsys, *words, code=2)
    assert not (work / "x").exists()
    said(capsys, *words, "--ignore", "^lora_te")
    assert json.loads((work / "x" / "tuner.json").read_text())["imported"]["left_out"] == ["lora_te_a.alpha"]


def test_a_full_disk_leaves_nothing(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sctool.core.exchange.kohya.save_tensors", full)
    assert "No space left" in said(capsys, "export", "style", "--to", "kohya", code=1)
    assert not (work / "style-kohya").exists()


def test_what_the_guide_uploads_is_a_tuner(
    tiny_base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The patterns of docs/exchange.md leave a folder that loads, with a card that names the base's licence."""
    quick = ["steps=1", "batch=2", "validate_every=0", "sample_every=0"]
    said(capsys, "train", "--base", tiny_base, "--data", pictures, "--out", tmp_path, "--name", "r", "--quiet", *quick)
    run, hub = tmp_path / "r", tmp_path / "hub"
    files = [str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()]
    for name in filter_repo_objects(files, allow_patterns=["README.md", "tuner/*"]):
        (hub / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / name, hub / name)
    base = load_backbone(str(tiny_base))
    with tuned(base.pipe.unet, load_tuner(hub, base.pipe.unet)):
        assert base.pipe("a photo", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)
    assert "license:" in (hub / "README.md").read_text()
