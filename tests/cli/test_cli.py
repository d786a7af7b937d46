"""The command line as a user types it: help without torch, wrong words, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sctool.cli import run


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from sctool.cli import run; run(['--help']); run(['train', '--help']); "
        "bad = {'torch', 'diffusers', 'cv2', 'numpy'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("annotate", "train", "sample", "evaluate", "compare", "methods", "bench", "weights"):
        assert verb in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train", "--method", "scedti"], 2, "Did you mean 'scedit'?"),
        (["train", "learning_rat=1"], 2, "unknown key"),
        (["train", "step=1"], 2, "Did you mean 'steps'?"),
        (["train", "tuner.ratoi=1"], 2, "Did you mean 'ratio'?"),
        (["train", "lr=fast"], 2, "lr='fast'"),
        (["train", "lr"], 2, "key=value"),
        (["train", "--cond", "cany"], 2, "Did you mean 'canny'?"),
        (["train", "--base", "miny"], 2, "Did you mean 'mini'?"),
        (["train", "--preset", "scedit-fewshots"], 2, "Did you mean 'scedit-fewshot'?"),
        (["train", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["train", "--data", "nowhere/at/all"], 2, "nowhere/at/all"),
        (["annotate", "nowhere", "--cond", "canny"], 2, "nowhere"),
        (["annotate", "photos", "--cond", "cany"], 2, "Did you mean 'canny'?"),
        (["sample", "a cat", "--tuner", "nowhere"], 2, "nowhere"),
        (["sample", "--hint", "canny=x.png"], 2, "prompt"),
        (["evaluate", "nowhere"], 2, "nowhere"),
        (["compare", "nowhere", "nowhere"], 2, "nowhere"),
        (["weights", "fetch", "hedd"], 2, "Did you mean 'hed'?"),
        (["annotate", "photos", "--cond", "depth:modl=x"], 2, "Did you mean 'model'?"),
        (["annotate", "photos", "--cond", "hed"], 1, "sctool weights fetch hed"),
        (["annotate", "photos", "--shards", "5/3"], 2, "K/N"),
        (["methods", "--base", "sd16"], 2, "Did you mean 'sd15'?"),
        (["trian"], 2, "trian"),
    ],
)  # fmt: skip
def test_wrong_words(
    words: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(words) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert not [p for p in tmp_path.iterdir() if p.name != "runs"], "a refused command left something behind"


def test_base_that_is_no_diffusers_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert run(["train", "--base", str(tmp_path)]) == 2
    assert "model_index.json" in capsys.readouterr().err
