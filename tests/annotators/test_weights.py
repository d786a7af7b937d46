"""Finding, fetching and checking weights, in a Hugging Face cache made by the test. No network."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from sctool.annotators import ANNOTATORS, annotator
from sctool.annotators.networks.weights import WEIGHTS, default, find_cached, find_weights, select, verify
from sctool.cli import run
from sctool.core.data.conditions import condition
from sctool.core.errors import SctoolError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache in the place of the user's."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def put(cache: Path, repo: str, files: dict[str, bytes]) -> Path:
    """Files as the hub's client keeps them: blobs named by their hash, and a snapshot of links. Gives the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT)
    for name, data in files.items():
        large = name.endswith((".safetensors", ".pth", ".bin"))
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob = root / "blobs" / (hashlib.sha256(data).hexdigest() if large else git)
        blob.write_bytes(data)
        os.symlink(os.path.relpath(blob, snapshot), snapshot / name)
    return snapshot


def hed(cache: Path, data: bytes = b"weights") -> Path:
    return put(cache, "lllyasviel/Annotators", {"ControlNetHED.pth": data}) / "ControlNetHED.pth"


def depth(cache: Path, name: str = "model.safetensors") -> Path:
    return put(
        cache, default("depth").repo, {"config.json": b"{}", "preprocessor_config.json": b"{ }", name: b"w" * 99}
    )


# ------------------------------------------------------------------------------------------------------ the table


def test_defaults_may_be_used_commercially_and_judges_are_others():
    for name, cls in ANNOTATORS.items():
        if not condition(cls.name).network:
            continue
        row = default(name)
        assert cls.Settings().model == row.name
        assert row.commercial
    for name in ("depth", "seg", "pose"):
        assert default(name, "evaluator").repo != default(name).repo
    assert ANNOTATORS["pose"].Settings().detector == default("pose", "detector").name
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", row.repo) for row in WEIGHTS.values())


def test_a_condition_stands_for_what_it_needs():
    assert [row.name for row in select(["pose", "hed"])] == ["vitpose", "rtdetr", "hed"]
    with pytest.raises(UsageError, match=r"unknown weights 'dpt-hybird'\. Did you mean 'dpt-hybrid'"):
        select(["dpt-hybird"])


# ------------------------------------------------------------------------------------------------------- locating


def test_missing_weights_are_told_with_the_remedy():
    with pytest.raises(SctoolError) as caught:
        annotator("hed").ready()
    assert str(caught.value) == (
        "hed needs the weights 'hed' (lllyasviel/Annotators, ControlNetHED.pth; apache-2.0) and they are not on this "
        "machine. Get them with: sctool weights fetch hed   - or give a file: --cond hed:model=PATH"
    )
    assert caught.value.exit_code == 1
    with pytest.raises(SctoolError, match="sctool weights fetch dpt-large   - or give a folder: --cond depth:model="):
        annotator("depth:model=dpt-large").ready()
    with pytest.raises(SctoolError, match=r"hf download some/depth-model "):
        annotator("depth:model=some/depth-model").ready()
    annotator("canny").ready()


def test_pose_needs_its_detector_too(cache):
    files = {"config.json": b"{}", "model.safetensors": b"w"}
    put(cache, default("pose").repo, files)
    with pytest.raises(SctoolError, match=r"sctool weights fetch rtdetr .*--cond pose:detector=PATH"):
        annotator("pose").ready()
    put(cache, default("pose", "detector").repo, files)
    annotator("pose").ready()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("dpt-hybird", "unknown depth model 'dpt-hybird'. Did you mean 'dpt-hybrid'"),
        ("hed", "unknown depth model 'hed'"),
        ("/no/such/folder", "no such file or folder, and not a hub id"),
        ("depth.safetensors", "no such file or folder"),
    ],
)
def test_wrong_models_are_named(model, words):
    with pytest.raises(UsageError) as caught:
        annotator(f"depth:model={model}").ready()
    assert words in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"needs config\.json, preprocessor_config\.json and model\.safetensors"):
        find_weights("depth", str(tmp_path))


def test_the_cache_is_read(cache):
    file = hed(cache)
    weights = find_weights("hed", "hed")
    assert (weights.path, weights.revision) == (file, COMMIT)
    assert weights.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert weights.config_sha256 is None
    assert find_weights("sketch", "lllyasviel/Annotators:ControlNetHED.pth").path == file
    instance = annotator("hed")
    instance.ready()
    assert instance.id["weights_sha256"] == weights.sha256
    assert instance.made_by["revision"] == COMMIT
    assert "revision" not in instance.id


def test_a_repository_counts_when_all_its_shards_are_there(cache):
    row = default("seg")
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "model-1.safetensors": b"1"}
    put(cache, row.repo, files)
    assert find_cached(row) is None
    put(cache, row.repo, {"model-2.safetensors": b"2"})
    weights = find_cached(row)
    assert weights is not None
    assert [file.name for file in weights.files] == ["model-1.safetensors", "model-2.safetensors"]
    hashes = [hashlib.sha256(data).hexdigest() for data in (b"1", b"2")]
    assert weights.sha256 == hashlib.sha256("".join(hashes).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------- verifying


def test_whole_weights_pass(cache, capsys):
    hed(cache)
    depth(cache)
    assert {check.intact for check in verify(default("depth"))} == {True}
    assert run(["weights", "verify"]) == 0
    out = capsys.readouterr().out
    assert "hed: 1 of 1 files intact" in out
    assert f"{default('depth').name}: 3 of 3 files intact" in out


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
def test_a_damaged_file_is_named(cache, capsys, name):
    file = depth(cache) / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert [check.file.name for check in verify(default("depth")) if check.intact is False] == [name]
    assert run(["weights", "verify"]) == 1
    err = capsys.readouterr().err
    assert f"damaged: {default('depth').name}: {file}" in err
    assert "fetch the weights again" in err


def test_a_file_without_a_hash_is_not_called_intact(cache, capsys):
    file = hed(cache)
    file.unlink()
    file.write_bytes(b"copied without its blob")
    assert run(["weights", "verify", "hed"]) == 0
    assert "hed: 0 of 1 files intact, 1 without a known hash" in capsys.readouterr().out


def test_what_is_not_here_cannot_be_verified(capsys):
    assert run(["weights", "verify", "seg"]) == 1
    assert "'upernet' is not on this machine. Get it with: sctool weights fetch upernet" in capsys.readouterr().err
    assert run(["weights", "verify"]) == 0
    assert "none of the listed weights are on this machine" in capsys.readouterr().out


def test_verify_as_json(cache, capsys):
    file = depth(cache) / "model.safetensors"
    hed(cache)
    assert run(["weights", "verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hed"] == {"files": 1, "unknown": 0, "damaged": []}
    file.write_bytes(b"damaged")
    assert run(["weights", "verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[default("depth").name]["damaged"] == [str(file)]


# ------------------------------------------------------------------------------------------------ list and fetch


def test_list_says_what_is_here(cache, capsys):
    hed(cache)
    assert run(["weights", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["weights"]}
    assert rows.keys() == WEIGHTS.keys()
    assert rows["hed"]["path"].endswith("ControlNetHED.pth")
    assert rows["hed"]["revision"] == COMMIT
    assert rows["pidinet"]["path"] is None
    assert run(["weights", "list", "--cond", "depth"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:4] == ["dpt-large", "depth", "evaluator", "apache-2.0"] for line in lines)
    assert not any("ControlNetHED" in line for line in lines)
    assert max(map(len, lines)) <= 80
    assert run(["weights", "list", "--cond", "dept"]) == 2
    assert "Did you mean 'depth'" in capsys.readouterr().err


def test_fetch_without_network_says_how_to_go_on(cache, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("hed", "upernet"):
        assert run(["weights", "fetch", name]) == 1
        err = capsys.readouterr().err.strip()
        assert err.startswith(f"error: cannot fetch '{name}' from https://huggingface.co/{WEIGHTS[name].repo} (")
        assert f"copy the folder models--{WEIGHTS[name].repo.replace('/', '--')}" in err
        assert f"to {cache} (HF_HOME" in err
        assert "\n" not in err


def test_fetch_takes_what_is_needed_and_no_more(cache, capsys, monkeypatch):
    names = ["config.json", "preprocessor_config.json", "vocab.txt", "README.md", "model.safetensors",
             "model.fp16.safetensors", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"]  # fmt: skip
    asked = {}

    def snapshot_download(repo, **options):
        asked[repo] = options["allow_patterns"]
        put(cache, repo, {name: name.encode() for name in options["allow_patterns"]})

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repo, revision: names)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert run(["weights", "fetch", "depth"]) == 0
    repo = default("depth").repo
    assert asked == {repo: ["config.json", "model.safetensors", "preprocessor_config.json", "vocab.txt"]}
    assert f"sha256 {hashlib.sha256(b'model.safetensors').hexdigest()}" in capsys.readouterr().out
    names.remove("model.safetensors")
    assert run(["weights", "fetch", "seg"]) == 0
    assert "pytorch_model.bin" in asked[default("seg").repo]


def test_fetch_of_one_file(cache, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file, **options: hed(cache))
    assert run(["weights", "fetch", "hed"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"hed: {cache}")
    assert hashlib.sha256(b"weights").hexdigest() in out


def test_annotating_without_weights_ends_before_any_work(tmp_path, pictures, capsys):
    assert run(["annotate", str(pictures), "--cond", "canny,seg", "--out", str(tmp_path / "out")]) == 1
    assert "sctool weights fetch upernet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
