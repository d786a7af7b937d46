"""Tuner files: exact, explained, refused where they do not belong, never half-written."""

import json
import types
from importlib.metadata import version

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel

from sctool.core.backbones.families import FAMILIES
from sctool.core.checkpoint import load_tuner, read_meta, save_tuner, tuner_file
from sctool.core.errors import SctoolError, UsageError
from sctool.core.tuners.configs import SCEditConfig
from sctool.core.tuners.scedit import SCEdit


def backbone(hash="a" * 64, id="base-a", channels=(8, 16)):
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        block_out_channels=channels, layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D",) * len(channels), up_block_types=("UpBlock2D",) * len(channels),
        attention_head_dim=4,
    ).requires_grad_(False)  # fmt: skip
    return types.SimpleNamespace(id=id, hash=hash, family=FAMILIES[0], licence="openrail", denoiser=net)


@pytest.fixture
def base():
    return backbone()


@pytest.fixture
def tuner(base):
    return SCEdit.build(SCEditConfig(ratio=0.5, skips=(0, 3)), base.denoiser, ("canny",), 4)


def test_the_file_says_what_it_is(base, tuner, tmp_path):
    file = save_tuner(tmp_path / "tuner", tuner, base, maps={"canny": {"low": 100, "high": 200}}, run="r")
    meta = read_meta(file)
    assert json.loads(file.with_suffix(".json").read_text()) == {"run": "r", **meta}
    assert (meta["method"], meta["conditions"], meta["licence"]) == ("scedit", ["canny"], "openrail")
    assert meta["base"] == {"id": "base-a", "hash": "a" * 64, "family": "sd"}
    assert meta["maps"] == {"canny": {"low": 100, "high": 200}}
    assert meta["skips"] == {"0": 8, "3": 16}
    assert meta["config"]["ratio"] == 0.5
    with safetensors.safe_open(str(file), "pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_equal_tuners_give_equal_files(base, tuner, tmp_path):
    first = save_tuner(tmp_path / "a", tuner, base, run="one").read_bytes()
    assert all(save_tuner(tmp_path / "b", tuner, base, run=f"run {i}").read_bytes() == first for i in range(8))


def test_the_order_in_which_maps_are_described_does_not_change_the_file(base, tuner, tmp_path):
    maps = {"canny": {"low": 100, "high": 200}, "color": {"cells": 8}}
    turned = {name: dict(reversed(rule.items())) for name, rule in reversed(maps.items())}
    files = [save_tuner(tmp_path / name, tuner, base, maps=m).read_bytes() for name, m in (("a", maps), ("b", turned))]
    assert files[0] == files[1]


def test_a_tuner_is_counted_and_comes_back_with_its_weights(base, tuner, tmp_path):
    with torch.no_grad():
        for number, parameter in enumerate(tuner.parameters()):
            parameter.fill_(number)
    file = save_tuner(tmp_path, tuner, base)
    meta = read_meta(tmp_path)
    assert meta["parameters"] == sum(p.numel() for p in tuner.parameters())
    assert (meta["format"], meta["vae_scale"], meta["maps"]) == (1, 4, {})
    assert meta["sctool"] == version("sctool")
    loaded = load_tuner(file, base)
    assert loaded.vae_scale == 4
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tuner.parameters(), strict=True))
    stored = safetensors.torch.load_file(file)
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert load_tuner(file, base.denoiser).method == "scedit", "a bare denoiser has no identity to check"


def test_a_file_a_tuner_folder_and_a_run_folder_are_one(base, tuner, tmp_path):
    file = save_tuner(tmp_path / "run" / "tuner" / "tuner.safetensors", tuner, base)
    assert {tuner_file(path) for path in (file, file.parent, tmp_path / "run")} == {file}
    with pytest.raises(UsageError, match="does not exist"):
        tuner_file(tmp_path / "rum")
    with pytest.raises(UsageError, match="contains no tuner"):
        tuner_file(tmp_path)


def test_another_base_is_refused_unless_forced(base, tuner, tmp_path):
    save_tuner(tmp_path, tuner, base)
    other = backbone("b" * 64, "base-b")
    with pytest.raises(SctoolError, match=r"'base-a' \(aaaaaaaaaaaa\), not on base 'base-b' \(bbbbbbbbbbbb\).*--force"):
        load_tuner(tmp_path, other)
    forced = load_tuner(tmp_path, other, force=True)
    assert all(torch.equal(a, b) for a, b in zip(forced.parameters(), tuner.parameters(), strict=True))
    assert load_tuner(tmp_path, other.denoiser).config == tuner.config  # a bare denoiser has no identity to compare


def test_shapes_that_do_not_fit_are_refused_even_with_force(base, tuner, tmp_path):
    save_tuner(tmp_path, tuner, base)
    with pytest.raises(SctoolError, match=r"does not fit base 'base-b'.*--force does not help"):
        load_tuner(tmp_path, backbone("b" * 64, "base-b", (8, 32)), force=True)
    shallow = backbone(channels=(8,))  # two skips, and the tuner edits the fourth
    with pytest.raises(SctoolError, match=r"does not fit.*out of 0\.\.1"):
        load_tuner(tmp_path, shallow, force=True)


@pytest.mark.parametrize("content", [b"", b"\x80\x05pickle", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{]"])
def test_a_damaged_file_is_named(base, tmp_path, content):
    (tmp_path / "tuner.safetensors").write_bytes(content)
    with pytest.raises(SctoolError, match="not a safetensors file, or is damaged"):
        load_tuner(tmp_path, base)


def test_a_truncated_file_is_named(base, tuner, tmp_path):
    file = save_tuner(tmp_path, tuner, base)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(SctoolError, match="damaged"):
        load_tuner(tmp_path, base)


def test_somebody_elses_safetensors_are_named(base, tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "tuner.safetensors")
    with pytest.raises(SctoolError, match="was not written by sctool"):
        read_meta(tmp_path)


@pytest.mark.parametrize("kind", [OSError, safetensors.SafetensorError])
def test_a_full_disk_leaves_the_old_file(base, tuner, tmp_path, monkeypatch, kind):
    file = save_tuner(tmp_path, tuner, base)
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise kind("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SctoolError, match="No space left on device"):
        save_tuner(tmp_path, tuner, base)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuner.json", "tuner.safetensors"]
