"""Atomic writing, and safetensors files whose bytes depend on their content only."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sctool.core.errors import SctoolError
from sctool.core.files import replacing, replacing_folder, save_tensors, sha256, write_json

TENSORS = {"é": torch.arange(6.0).reshape(2, 3), "a": torch.arange(3, dtype=torch.int32), "half": torch.ones(1).half()}
METADATA = {f"key {i}": f'"quoted" \\ \n\t\x01 ü 漢 🙂 {i}' for i in range(12)} | {"format": "pt"}


def test_equal_content_gives_equal_bytes(tmp_path):
    for i in range(4):
        save_tensors(TENSORS, tmp_path / f"{i}.safetensors", METADATA)
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(4)}) == 1
    save_file(TENSORS, tmp_path / "theirs.safetensors", METADATA)
    data = (tmp_path / "0.safetensors").read_bytes()
    theirs = (tmp_path / "theirs.safetensors").read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    assert (data[:8], data[length:]) == (theirs[:8], theirs[length:])
    assert length % 8 == 0
    header = json.loads(data[8:length])
    assert list(header["__metadata__"].items()) == sorted(METADATA.items())
    assert header == json.loads(theirs[8:length])
    with safe_open(tmp_path / "0.safetensors", "pt") as opened:
        assert opened.metadata() == METADATA
    loaded = load_file(tmp_path / "0.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in TENSORS.items())


def test_processes_with_other_hash_seeds_write_equal_bytes(tmp_path):
    script = (
        "import sys, torch; from pathlib import Path; from sctool.core.files import save_tensors\n"
        "save_tensors({'a': torch.ones(3), 'b': torch.zeros(2)}, Path(sys.argv[1]), {k: k for k in 'formatsc'})"
    )
    files = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, file in enumerate(files, start=1):
        subprocess.run(
            [sys.executable, "-c", script, str(file)], env={**os.environ, "PYTHONHASHSEED": str(seed)}, check=True
        )
    assert sha256(files[0]) == sha256(files[1])


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"ü": 1})
    assert file.read_text() == '{\n  "ü": 1\n}\n'

    def fail(manager, write):
        with manager as temporary:
            write(temporary)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(replacing(file), lambda path: path.write_text("half"))
    with pytest.raises(RuntimeError):
        fail(replacing_folder(tmp_path / "folder"), lambda folder: (folder / "half").write_text("half"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads(file.read_text()) == {"ü": 1}
    with pytest.raises(SctoolError, match=r"cannot write .*a\.json/b.*choose another folder"), replacing(file / "b"):
        pass


def test_a_folder_replaces_the_one_before(tmp_path):
    for name in ("one", "two"):
        with replacing_folder(tmp_path / "folder") as folder:
            (folder / name).write_text(name)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["folder", "folder/two"]
