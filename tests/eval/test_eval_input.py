"""What users and other programs hand to `evaluate`: every fault is one message that says what, where and the remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sctool.core.config import TrainConfig
from sctool.core.errors import SctoolError, UsageError
from sctool.core.runs import Run, open_run
from sctool.eval.drawing import why_draw
from sctool.eval.evaluate import evaluate
from sctool.eval.features.inception import offline_reason
from sctool.eval.features.names import named_weights
from sctool.eval.options import Options
from sctool.eval.results import Figure, FolderResults, Results
from sctool.eval.sets.frechet import Moments
from sctool.eval.targets import read_folder, run_target


@pytest.fixture(autouse=True)
def _no_models(mean_features: None) -> None: ...


def make(folder: Path, rows: list[dict[str, Any]] | bytes, sampling: str | None = None) -> Path:
    """A samples folder with a picture and an empty hint a row."""
    folder.mkdir(exist_ok=True)
    if isinstance(rows, list):
        random = np.random.default_rng(0)
        for row in rows:
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / row["file_name"])
    text = rows if isinstance(rows, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    (folder / "metadata.jsonl").write_bytes(text)
    if sampling is not None:
        (folder / "sampling.json").write_text(sampling)
    return folder


GOOD = b'{"file_name": "0.png"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"file_name": "\xff"}', r"metadata\.jsonl line 2 is not UTF-8"),
        (b'{"file_name": 5}', "line 2: file_name is 5; it should be a valid string"),
        (b'{"prompt": "x"}', "line 2 has no file_name"),
        (b'["0.png"]', "line 2 is not a JSON object"),
        (b"{", "line 2 is not valid JSON"),
        (b"[" * 200_000, "line 2 is not valid JSON"),
        (b'{"file_name": "a", "hints": "canny"}', "line 2: hints is 'canny'"),
        (b'{"file_name": "a", "hints": {"canny": 5}}', "line 2: hints.canny is 5"),
        (b'{"file_name": "a", "maps": {"seg": null}}', "line 2: maps.seg is None"),
        (b'{"file_name": "a", "reference": 1}', "line 2: reference is 1"),
        (b'{"file_name": "a", "prompt": 7}', "line 2: prompt is 7"),
        (b'{"file_name": "a", "key": []}', r"line 2: key is \[\]"),
        (b'{"file_name": "a", "prompt": "\\ud83d"}', "line 2 contains half a character"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_folder(make(tmp_path / "samples", GOOD + line))


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "is not a JSON object"), ('{"base": "mini"}', "base is 'mini'"), ('{"base": {"id": 5}}', r"base\.id is 5")],
)
def test_a_malformed_protocol_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"sampling\.json.*{message}"):
        read_folder(make(tmp_path / "samples", GOOD, text))


def test_only_a_newline_ends_a_row(tmp_path: Path) -> None:
    prompts = ["a\u2028b", "c\u0085d", "e"]
    lines = [json.dumps({"file_name": f"{i}.png", "prompt": p}, ensure_ascii=False) for i, p in enumerate(prompts)]
    folder = make(tmp_path / "samples", ("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    assert [row["prompt"] for row in read_folder(folder).rows] == prompts


def test_statistics_must_be_a_mean_and_a_covariance(tmp_path: Path) -> None:
    file = tmp_path / "real.npz"
    good = np.cov(np.random.default_rng(0).normal(size=(9, 3)).T)
    np.savez(file, mu=np.zeros(3), sigma=good.astype(np.float16))
    assert Moments.load(file).sigma == pytest.approx(good, rel=1e-2)
    for mu, sigma, message in (
        (np.full(3, np.nan), good, "NaN or infinity"),
        (np.zeros(3), np.full((3, 3), np.inf), "NaN or infinity"),
        (np.zeros(3), np.triu(np.ones((3, 3))), "not symmetric"),
        (np.zeros(3), np.diag([1.0, 1.0, -0.1]), "negative eigenvalues"),
        (np.zeros(0), np.zeros((0, 0)), "do not fit together"),
        (np.zeros(3), np.array([["a"] * 3] * 3), "not a statistics file"),
        (np.zeros(3), np.array([[None] * 3] * 3, dtype=object), "not a statistics file"),
    ):
        np.savez(file, mu=mu, sigma=sigma)
        with pytest.raises(UsageError, match=message) as error:
            Moments.load(file)
        assert "pickle" not in str(error.value)
    np.save(tmp_path / "one.npy", good)
    (tmp_path / "one.npy").rename(file)
    with pytest.raises(UsageError, match="not a statistics file"):
        Moments.load(file)
    file.write_bytes(b"no zip")
    with pytest.raises(UsageError, match="not a statistics file") as error:
        Moments.load(file)
    assert "unsafe" not in str(error.value)


def test_numbers_that_json_does_not_know_become_null() -> None:
    figure = Figure("fid", "FID", float("nan"), "lower", {"scale": float("inf")}, (0.0, float("inf")))
    found = Results("x", [FolderResults("base", Path(), 1, [figure])]).to_json()
    text = json.dumps(found, allow_nan=False)
    written = json.loads(text)["folders"]["base"]["figures"]["fid"]
    assert (written["value"], written["interval"]) == (None, None)


def test_the_protocol_counts_the_references_that_were_measured(tmp_path: Path) -> None:
    real = make(tmp_path / "real", [{"file_name": f"{i}.png"} for i in range(5)])
    (real / "2.png").write_bytes(b"")
    samples = make(tmp_path / "samples", [{"file_name": f"{i}.png"} for i in range(4)])
    results = evaluate(samples, Options(metrics=("fid",), reference=str(real), quiet=True))
    assert results.folders[0].figures[0].protocol["reference"]["n"] == 4


def test_flags_that_do_nothing_are_refused(tmp_path: Path) -> None:
    samples = make(tmp_path / "samples", [{"file_name": "0.png"}])
    stats = tmp_path / "real.npz"
    np.savez(stats, mu=np.zeros(3), sigma=np.eye(3))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"save_stats": tmp_path / "out.npz", "reference": str(stats)}, "--save-stats has nothing to save"),
        ({"save_stats": tmp_path / "out.npz", "metrics": ("kid",)}, "add --fid"),
        ({"clip_model": "ViT-B-32", "metrics": ("fid",)}, "--clip-model does nothing here"),
        ({"clip_weights": "openai", "metrics": ("fid",)}, "--clip-weights does nothing here"),
        ({"evaluators": ("canny",), "metrics": ("fid",)}, "--evaluator does nothing here"),
        ({"evaluators": ("low=5",)}, "--evaluator 'low=5' belongs to no condition"),
        ({"weights": ("clip=nope",), "metrics": ("control",)}, "--weights clip=nope: no such file"),
        ({"weights": ("foo=bar",)}, r"unknown --weights network 'foo'.*clip, dinov2, inception"),
    ]
    for options, message in cases:
        with pytest.raises(UsageError, match=message):
            evaluate(samples, Options(**options, quiet=True))


def test_an_equals_sign_may_stand_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("step=5.pth").touch()
    assert named_weights(("step=5.pth",), "auto") == {"inception": "step=5.pth"}
    with pytest.raises(UsageError, match=r"--weights sub/step=5\.pth: no such file"):
        named_weights(("sub/step=5.pth",), "auto")


def with_hints(folder: Path, cond: str) -> Path:
    rows = [{"file_name": f"{i}.png", "hints": {cond: f"hint/{i}.png"}, "maps": {cond: "m.png"}} for i in range(3)]
    return make(folder, rows)


def test_an_evaluator_that_was_given_must_work(tmp_path: Path) -> None:
    samples = with_hints(tmp_path / "samples", "seg")
    path = tmp_path / "gone" / "net"
    for metrics in ((), ("control",)):
        with pytest.raises(UsageError, match=re.escape(f"--evaluator seg:model={path}: no such file")):
            evaluate(samples, Options(metrics=metrics, evaluators=(f"seg:model={path}",), quiet=True))
        with pytest.raises(
            UsageError, match=r"--evaluator canny does nothing here: the conditions measured on .* are seg"
        ):
            evaluate(samples, Options(metrics=metrics, evaluators=("canny",), quiet=True))


def test_an_evaluator_of_the_wrong_kind_is_named_by_its_flag(tmp_path: Path) -> None:
    samples = with_hints(tmp_path / "samples", "seg")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(samples / "m.png")
    net = tmp_path / "net"
    net.mkdir()
    (net / "config.json").write_text('{"model_type": "dpt", "architectures": ["DPTForDepthEstimation"]}')
    (net / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"--evaluator seg:model=.*net contains a DPTForDepthEstimation"):
        evaluate(samples, Options(metrics=("iou",), evaluators=(f"seg:model={net}",), quiet=True))


def test_messages_say_what_is_missing(tmp_path: Path) -> None:
    samples = with_hints(tmp_path / "hints", "canny")
    with pytest.raises(SctoolError, match=r"hint/0\.png cannot be read: No such file"):
        evaluate(samples, Options(metrics=("nmse",), quiet=True))
    rows = [{"file_name": f"{i}.png", "prompt": "p", "reference": f"{i}.png"} for i in range(7)]
    del rows[3]["reference"], rows[5]["prompt"]
    samples = make(tmp_path / "gaps", rows)
    for metric, word in (("fid", "reference"), ("kid", "reference"), ("clip", "prompt")):
        with pytest.raises(SctoolError, match=f"1 of 7 rows has no {word}"):
            evaluate(samples, Options(metrics=(metric,), quiet=True))
    (samples / "metadata.jsonl").unlink()
    with pytest.raises(UsageError, match="--fid, --kid, --pr and --cmmd"):
        evaluate(samples, Options(quiet=True))
    assert "(--offline)" in offline_reason(True)
    assert "(HF_HUB_OFFLINE is set)" in offline_reason(False)


@pytest.fixture
def run(tiny_base: Path, edges: Path, tmp_path: Path) -> Run:
    """A run with a tuner that was never trained and a data set of its own."""
    from shutil import copytree

    from sctool.core.backbones.loading import load_backbone
    from sctool.core.checkpoint import save_tuner
    from sctool.core.training.setup import build_tuner

    data = copytree(edges, tmp_path / "data")
    config = TrainConfig(base=str(tiny_base), data=str(data), cond=("canny",), size=32)
    made = open_run(tmp_path / "runs", "edges", config)
    backbone = load_backbone(str(tiny_base))
    save_tuner(made.tuner, build_tuner(config, backbone), backbone)
    return made


def test_all_that_is_held_out_is_drawn_once(run: Run, tmp_path: Path) -> None:
    options = Options(metrics=("nmse",), count=5000, steps=1, guidance=1.0, quiet=True)
    first = evaluate(run.path, options)
    listed = run.samples / "tuned" / "metadata.jsonl"
    drawn, held_out = listed.stat().st_mtime_ns, first.folders[0].count
    assert held_out < 5000
    again = evaluate(run.path, options)
    assert listed.stat().st_mtime_ns == drawn
    for results in (first, again):
        assert results.notes.count(f"--count 5000: the run's data has only {held_out} held-out images.") == 1
    assert "held-out" not in json.dumps(again.to_json()["protocols"])
    (run.samples / "heldout.json").unlink()
    assert "fewer than 5000" in (why_draw(run_target(run), options) or "")
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"its data=.*data, which does not exist.*--data"):
        evaluate(run.path, options)
