"""What `evaluate` and `compare` take a name for: a folder here, or a run under --runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sctool.cli import run as command
from sctool.core.errors import UsageError
from sctool.eval.report.compare import find_evaluation
from sctool.eval.targets import find_target, image_names


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with the run runs/edges."""
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/edges"))


def make_run(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("method: scedit\n")


def make_images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / name)


def make_samples(folder: Path) -> None:
    make_images(folder, "0.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png"}) + "\n")


def test_a_run_comes_before_a_folder_that_cannot_be_evaluated() -> None:
    Path("edges").mkdir()
    found = find_target("edges")
    assert found.run is not None
    assert found.path == Path("runs/edges")
    make_images(Path("edges"), "a.png")  # images without metadata.jsonl
    assert find_target("edges").run is not None
    with pytest.raises(UsageError, match="both the folder edges and the run runs/edges"):
        find_target("edges", bare=True)
    with pytest.raises(UsageError, match=r"edges contains images \(1\) but no metadata\.jsonl"):
        find_target("./edges")
    Path("other").mkdir()
    with pytest.raises(UsageError, match="other contains no images"):
        find_target("other")


@pytest.mark.parametrize("kind", ["samples", "pair of samples", "run"])
def test_a_name_of_a_valid_folder_and_of_a_run_is_ambiguous(kind: str) -> None:
    if kind == "run":
        make_run(Path("edges"))
    else:
        make_samples(Path("edges") if kind == "samples" else Path("edges/tuned"))
    message = "'edges' is both the folder edges and the run runs/edges. Write ./edges or runs/edges."
    with pytest.raises(UsageError, match=re.escape(message)):
        find_target("edges")
    here, run = find_target("./edges"), find_target("runs/edges")
    assert (here.path, here.run is not None) == (Path("edges"), kind == "run")
    assert run.run is not None
    assert run.path == Path("runs/edges")
    assert find_target(Path("edges").absolute()).path == Path("edges").absolute()
    assert find_target("edges", Path("runs/none")).path == Path("edges")  # no such run there
    assert find_target("edges", "." if kind == "run" else "none").path == Path("edges")  # the same folder is no clash


def test_commands_say_that_a_name_is_ambiguous(capsys: pytest.CaptureFixture[str]) -> None:
    make_samples(Path("edges"))
    assert command(["evaluate", "edges", "--quiet"]) == 2
    assert "Write ./edges or runs/edges." in capsys.readouterr().err


def test_compare_prefers_what_was_evaluated() -> None:
    Path("edges").mkdir()
    with pytest.raises(UsageError, match=r"runs/edges has no evaluation\.json.*sctool evaluate runs/edges"):
        find_evaluation("edges")
    Path("runs/edges/evaluation.json").touch()
    make_samples(Path("edges"))
    assert find_evaluation("edges") == Path("runs/edges/evaluation.json")
    Path("edges/evaluation.json").touch()
    with pytest.raises(UsageError, match="both the folder edges and the run runs/edges"):
        find_evaluation("edges")
    assert find_evaluation("./edges") == Path("edges/evaluation.json")
    assert find_evaluation("runs/edges") == Path("runs/edges/evaluation.json")
    assert find_evaluation("edges", ".") == Path("edges/evaluation.json")


def test_every_image_format_of_a_set_is_evaluated() -> None:
    names = ["a.gif", "b.tif", "c.TIFF", "d.webp", "e.png"]
    make_images(Path("drawn"), *names)
    (Path("drawn") / "notes.txt").touch()
    assert image_names(Path("drawn")) == names
    (folder,) = find_target("drawn", bare=True).folders
    assert [row["file_name"] for row in folder.rows] == names


def test_a_folder_of_gif_and_tiff_is_measured(mean_features: None) -> None:
    from sctool.eval.evaluate import evaluate
    from sctool.eval.options import Options

    make_images(Path("drawn"), "a.gif", "b.tiff", "c.tif")
    make_images(Path("real"), "a.gif", "b.tiff")
    results = evaluate("drawn", Options(metrics=("fid",), reference="real", quiet=True))
    assert results.folders[0].faults == []
    assert results.folders[0].count == 3
    assert results.folders[0].figures[0].protocol["reference"]["n"] == 2
