"""`evaluate` over folders and runs: figures, protocols, faults, messages, costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from sctool.annotators import ANNOTATORS
from sctool.annotators.base import Annotator
from sctool.core.config import TrainConfig
from sctool.core.errors import SctoolError, UsageError
from sctool.core.fast import key_steps
from sctool.core.resolving import Config
from sctool.core.runs import Run, open_run
from sctool.eval import evaluate as module
from sctool.eval.drawing import why_draw
from sctool.eval.evaluate import evaluate
from sctool.eval.options import Options
from sctool.eval.report.tables import markdown, show, write
from sctool.eval.results import Figure, FolderResults, Results, check_comparable
from sctool.eval.targets import find_target


@pytest.fixture(autouse=True)
def _no_models(mean_features: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(kind: str, **_: object) -> object:
        raise SctoolError("no CLIP here.")

    monkeypatch.setattr("sctool.eval.sets.extraction.clip_features", none)
    monkeypatch.setattr(module, "choose_clip", none)


def make_samples(folder: Path, count: int = 6, seed: int = 0, *, hints: bool = True, shift: int = 0) -> Path:
    """A folder as `sctool sample` writes it."""
    import cv2

    rng = np.random.default_rng(seed)
    (folder / "canny").mkdir(parents=True)
    (folder / "reference").mkdir()
    rows = []
    for i in range(count):
        real = np.full((32, 32, 3), rng.integers(0, 120, 3), np.uint8)
        cv2.rectangle(real, (8, 8), (22, 22), (220, 220, 220), -1)
        Image.fromarray(real).save(folder / "reference" / f"{i}.png")
        Image.fromarray(np.roll(real, shift, axis=1)).save(folder / f"{i}.png")
        Image.fromarray(np.repeat(cv2.Canny(real, 100, 200)[..., None], 3, 2)).save(folder / "canny" / f"{i}.png")
        row = {"file_name": f"{i}.png", "prompt": f"picture {i}", "seed": i, "key": str(i)}
        rows.append(row | {"reference": f"reference/{i}.png", "hints": {"canny": f"canny/{i}.png"} if hints else {}})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = {"base": {"id": "tiny", "hash": "ab"}, "tuners": [folder.name], "steps": 2, "guidance": 1.0, "batch": 8}
    (folder / "sampling.json").write_text(json.dumps(sampling))
    return folder


def test_base_and_tuned_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_samples(tmp_path / "base", shift=9)
    make_samples(tmp_path / "tuned")
    results = evaluate(tmp_path, Options(quiet=True))
    assert [folder.label for folder in results.folders] == ["base", "tuned"]
    assert results.value("tuned", "fd_means") == pytest.approx(0, abs=1e-6)
    assert results.value("tuned", "canny.nmse") == 0
    assert results.value("base", "canny.f1@1px") < results.value("tuned", "canny.f1@1px") == 1
    assert all(all(figures) for _, figures in results.rows())  # every row is comparable
    assert not any(figure.interval for folder in results.folders for figure in folder.figures)  # six images are too few
    for flag in ("clip", "is", "cmmd"):
        assert any(f"--{flag} skipped" in note for note in results.notes)
    assert any("biased upwards" in note for note in results.notes)
    protocol = results.folders[0].figures[0].protocol
    assert (protocol["seeds"], protocol["n"], protocol["base_hash"]) == ("0-5", 6, "ab")
    written = json.loads(write(results, tmp_path)[0].read_text())
    name = written["folders"]["tuned"]["figures"]["canny.f1"]["protocol"]
    assert written["protocols"][name]["annotator"]["low"] == 100
    assert "FD (means)" in markdown(results)
    show(results)
    assert "canny F1@1PX" in capsys.readouterr().out.replace("px", "PX")


def test_every_figure_has_its_interval_and_every_picture_its_values(tmp_path: Path) -> None:
    make_samples(tmp_path / "base", count=24, shift=3)
    make_samples(tmp_path / "tuned", count=24)
    results = evaluate(tmp_path, Options(quiet=True))
    for folder in results.folders:
        keys = {"fd_means", "kid_means", "precision_means", "recall_means", "canny.nmse", "canny.f1", "canny.f1@1px"}
        assert keys <= {figure.key for figure in folder.figures}
        for figure in folder.figures:
            assert figure.interval is not None
            assert figure.interval[0] <= figure.value <= figure.interval[1]
            assert "interval" in figure.protocol
        assert [image.file for image in folder.images] == [f"{i}.png" for i in range(24)]
        first = folder.images[5]
        assert (first.prompt, first.key, first.hints) == ("picture 5", "5", {"canny": "canny/5.png"})
        assert first.values.keys() == {"canny.nmse", "canny.f1", "canny.f1@1px"}
    tuned = results.folders[1]
    real = np.array(Image.open(tmp_path / "tuned" / "reference" / "5.png"))
    hint = np.array(Image.open(tmp_path / "tuned" / "canny" / "5.png"))
    np.testing.assert_array_equal(tuned.extract["canny"](real, "5"), hint)
    assert "[" in markdown(results)
    assert json.loads(json.dumps(results.to_json()))["folders"]["tuned"]["figures"]["canny.f1"]["interval"] == [1, 1]


class Ids(Annotator):
    """A stand-in for a segmentation network: the class is the red channel's quarter."""

    name, version, summary = "seg", "ids-1", ""

    class Settings(Config):
        model: str = "annotator"
        batch: int = 0

    batches: ClassVar[list[int]] = []

    def __call__(self, images: list[np.ndarray], keys: list[str]) -> list[tuple[np.ndarray, dict[str, Any]]]:
        self.batches.append(len(images))
        return super().__call__(images, keys)

    def annotate(self, image: np.ndarray, key: str) -> tuple[np.ndarray, dict[str, Any]]:
        return image[..., 0] // 64, {}

    def ready(self) -> None:
        if self.settings.model == "absent":  # pyright: ignore[reportAttributeAccessIssue]
            raise SctoolError("seg needs weights: --cond seg:model=PATH")


def test_class_maps_are_kept_beside_hints_and_judged_by_the_evaluator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sctool.core.data.conditions import condition
    from sctool.core.sampling import Request, write_samples

    monkeypatch.setitem(ANNOTATORS, "seg", Ids)
    monkeypatch.setattr(Ids, "batches", [])
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(4)]
    drawn = []
    for index, picture in enumerate(pictures):
        ids = picture[..., 0] // 64
        drawn.append((Request("p", index, {"seg": condition("seg").render(ids, picture)}, maps={"seg": ids}), picture))
    write_samples(tmp_path / "samples", iter(drawn), {})
    results = evaluate(tmp_path / "samples", Options(metrics=("iou",), quiet=True))
    assert results.value("samples", "seg.miou") == 1
    assert results.value("samples", "seg.classes") == 4
    figure = results.folders[0].get("seg.miou")
    assert figure is not None
    assert figure.protocol["annotator"]["model"] == "mask2former"  # not what made the hints
    assert Ids.batches == [4]  # one call a batch
    with pytest.raises(SctoolError, match="--evaluator seg:model=PATH"):
        evaluate(tmp_path / "samples", Options(metrics=("iou",), evaluators=("seg:model=absent",), quiet=True))
    with pytest.raises(SctoolError, match="no canny or sketch hints: its hints are seg"):
        evaluate(tmp_path / "samples", Options(metrics=("nmse",), quiet=True))
    file = tmp_path / "samples" / "metadata.jsonl"
    file.write_text(
        "".join(json.dumps({**json.loads(row), "maps": {}}) + "\n" for row in file.read_text().splitlines())
    )
    with pytest.raises(SctoolError, match="has no class maps"):
        evaluate(tmp_path / "samples", Options(metrics=("control",), quiet=True))
    with pytest.raises(UsageError, match="Did you mean 'seg'"):
        evaluate(tmp_path / "samples", Options(metrics=("control",), evaluators=("segg",), quiet=True))


def test_a_bad_picture_is_listed_and_left_out_of_both(tmp_path: Path) -> None:
    make_samples(tmp_path / "base")
    make_samples(tmp_path / "tuned")
    (tmp_path / "tuned" / "3.png").write_bytes((tmp_path / "tuned" / "3.png").read_bytes()[:60])
    (tmp_path / "tuned" / "canny" / "1.png").unlink()
    results = evaluate(tmp_path, Options(quiet=True))
    assert [folder.count for folder in results.folders] == [5, 5]
    assert [fault["file"] for fault in results.folders[1].faults] == ["3.png", "canny/1.png"]
    rows = {first.key: figures for first, figures in results.rows() if first.key == "fd_means"}
    assert all(rows["fd_means"])
    # one hint less on one side: another protocol, so a row of its own
    assert sum(first.key == "canny.nmse" for first, _ in results.rows()) == 2
    assert "canny/1.png" in markdown(results)


def test_too_few_pictures_for_one_metric_leave_the_others(tmp_path: Path) -> None:
    samples = make_samples(tmp_path / "samples", count=2)
    results = evaluate(samples, Options(quiet=True))
    keys = {figure.key for figure in results.folders[0].figures}
    assert {"fd_means", "kid_means", "canny.f1"} < keys
    assert "precision_means" not in keys
    assert any("--pr skipped: precision and recall need more than 3" in note for note in results.notes)
    with pytest.raises(SctoolError, match="more than 3 images"):
        evaluate(samples, Options(metrics=("pr",), quiet=True))


def test_figures_of_different_protocols_do_not_meet() -> None:
    a, b = (Figure("fid", "FID", 1.0, "lower", {"n": n, "resize": "x"}) for n in (10, 20))
    check_comparable(a, a)
    with pytest.raises(SctoolError, match="differ in n"):
        check_comparable(a, b)
    results = Results("x", [FolderResults("base", Path(), 1, [a]), FolderResults("tuned", Path(), 1, [b])])
    assert [[f is not None for f in row] for _, row in results.rows()] == [[True, False], [False, True]]


def test_reference_folders_and_statistics(tmp_path: Path) -> None:
    samples = make_samples(tmp_path / "samples")
    real = make_samples(tmp_path / "real", count=8, seed=1) / "reference"
    stats = tmp_path / "real.npz"
    options = {"metrics": ("fid",), "quiet": True}
    folder = evaluate(samples, Options(reference=str(real), save_stats=stats, **options))
    again = evaluate(samples, Options(reference=str(stats), **options))
    assert folder.value("samples", "fd_means") == pytest.approx(again.value("samples", "fd_means"), rel=1e-6)
    bare = tmp_path / "bare"
    bare.mkdir()
    for i in range(6):
        (bare / f"{i}.png").write_bytes((samples / f"{i}.png").read_bytes())
    alone = evaluate(bare, Options(reference=str(real), **options))
    assert alone.value("bare", "fd_means") == pytest.approx(folder.value("samples", "fd_means"))
    for metric in ("kid", "pr", "cmmd"):
        with pytest.raises(SctoolError, match="only a mean and a covariance"):
            evaluate(samples, Options(reference=str(stats), metrics=(metric,), quiet=True))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(5), sigma=np.eye(5))
    for reference, word in ((tmp_path / "wide.npz", "5 dimensions"), (tmp_path / "gone", "no such folder")):
        with pytest.raises(UsageError, match=word):
            evaluate(samples, Options(reference=str(reference), **options))


def test_samples_as_references_are_their_images_alone(tmp_path: Path) -> None:
    samples = make_samples(tmp_path / "samples", count=6)
    (tmp_path / "copy").mkdir()
    for file in samples.glob("*.png"):
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (64, 64)).save(samples / "sheet.png")  # nor their references and hints
    folder = evaluate(tmp_path / "copy", Options(reference=str(samples), metrics=("fid",), quiet=True))
    figure = folder.folders[0].figures[0]
    assert figure.value == pytest.approx(0, abs=1e-9)
    assert [protocol["reference"]["n"] for protocol in folder.to_json()["protocols"].values()] == [6]


def test_messages(tmp_path: Path) -> None:
    quiet = Options(quiet=True)
    (tmp_path / "empty").mkdir()
    samples = make_samples(tmp_path / "samples", hints=False)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "a.png").write_bytes((samples / "0.png").read_bytes())
    cases = [
        (None, quiet, "sctool train"),
        ("missing", quiet, "run folder"),
        (tmp_path / "empty", quiet, "contains no images"),
        (bare, quiet, "no metadata.jsonl"),
        (samples, Options(metrics=("nmse",), quiet=True), "no hints"),
        (samples, Options(metrics=("clip",), quiet=True), "no CLIP here"),
        (samples, Options(metrics=("profile",), quiet=True), "is not a run folder"),
        (samples, Options(count=5, quiet=True), "is not a run"),
        (samples, Options(metrics=("is",), quiet=True), "no Inception here"),
        (samples, Options(metrics=("cmmd",), quiet=True), "no CLIP here"),
        (samples, Options(metrics=("iou",), quiet=True), "no hints"),
        (samples, Options(metrics=("fid",), weights=("a.pth", "inception=b.pth"), quiet=True), "twice"),
        (samples, Options(metrics=("fid",), features="dino", quiet=True), "Did you mean 'dinov2'"),
    ]
    for target, options, message in cases:
        with pytest.raises(SctoolError, match=message):
            evaluate(target, options, runs=tmp_path / "runs")
    rows = [json.loads(line) for line in (samples / "metadata.jsonl").read_text().splitlines()]
    for change, message in (({"reference": None}, "--reference"), ({"file_name": "../../etc/x.png"}, "can be read")):
        lines = "".join(json.dumps(row | change) + "\n" for row in rows)
        (samples / "metadata.jsonl").write_text(lines)
        with pytest.raises(SctoolError, match=message):
            evaluate(samples, Options(metrics=("fid",), quiet=True))
    (samples / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="line 1"):
        evaluate(samples, quiet)


@pytest.fixture(scope="module")
def run(tiny_base: Path, edges: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose tuner was never trained: what evaluation needs of one."""
    from sctool.core.backbones.loading import load_backbone
    from sctool.core.checkpoint import save_tuner
    from sctool.core.training.setup import build_tuner

    config = TrainConfig(base=str(tiny_base), data=str(edges), cond=("canny",), guidance=1.5, size=32)
    made = open_run(tmp_path_factory.mktemp("out") / "runs", "edges", config)
    made.become_latest()
    backbone = load_backbone(str(tiny_base))
    save_tuner(made.tuner, build_tuner(config, backbone), backbone, maps={"canny": {"low": 50, "high": 150}})
    return made


def test_a_run_is_sampled_first_and_only_once(run: Run) -> None:
    options = Options(metrics=("fid", "nmse"), count=2, steps=1, guidance=1.5, quiet=True)
    first = evaluate(None, options, runs=run.path.parent)
    assert [(folder.label, folder.count) for folder in first.folders] == [("base", 2), ("tuned", 2)]
    assert first.folders[0].get("canny.nmse").protocol["annotator"]["low"] == 50  # type: ignore[union-attr]
    assert first.value("base", "canny.nmse") == pytest.approx(first.value("tuned", "canny.nmse"))  # untrained
    drawn = (run.samples / "tuned" / "metadata.jsonl").stat().st_mtime_ns
    again = evaluate(run.path, options)
    assert again.value("tuned", "fd_means") == first.value("tuned", "fd_means")
    assert (run.samples / "tuned" / "metadata.jsonl").stat().st_mtime_ns == drawn
    target = find_target("edges", run.path.parent)
    assert why_draw(target, options) is None
    assert why_draw(target, Options(steps=1)) is None  # guidance is the run's
    assert why_draw(target, Options(guidance=1.5)) == "the samples were not drawn with steps 50"  # the default
    for other, reason in (
        (Options(seed=7), "seeds that do not start at 7"),
        (Options(count=3), "fewer than 3"),
        (Options(steps=2), "not drawn with steps 2"),
        (Options(steps=1, guidance=3), "not drawn with guidance 3"),
    ):
        assert reason in (why_draw(target, other) or "")


def test_fast_samples_have_a_protocol_of_their_own(run: Run) -> None:
    """Drawn again where they were drawn otherwise, and not comparable with those."""
    plain = evaluate(run.path, Options(metrics=("nmse",), count=2, steps=4, guidance=1.5, quiet=True))
    options = Options(metrics=("nmse",), count=2, steps=4, guidance=1.5, fast=True, quiet=True)
    assert "not drawn with key_steps [0" in (why_draw(find_target(run.path), options) or "")
    drawn = evaluate(run.path, options)
    [first, again] = [results.folders[0].get("canny.nmse") for results in (plain, drawn)]
    assert first
    assert again
    assert again.protocol["sampling"]["key_steps"] == list(key_steps(4))
    assert "key_steps" not in first.protocol["sampling"]
    assert first.protocol_id != again.protocol_id
    target = find_target(run.path)
    assert why_draw(target, options) is None
    assert "not drawn with key_steps []" in (why_draw(target, Options(steps=4, guidance=1.5)) or "")
    assert "not drawn with steps 20" in (why_draw(target, Options(fast=True, guidance=1.5)) or "")
    with pytest.raises(UsageError, match="--fast"):
        evaluate(run.samples / "base", options)


def test_profile_counts_and_takes_turns(run: Run, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sctool.core.backbones.loading import load_backbone
    from sctool.core.checkpoint import load_tuner
    from sctool.core.measure import in_turns
    from sctool.eval.profile import profile

    found = profile(run, batch=2, patience=0)
    tuner = load_tuner(run.tuner, load_backbone(str(tiny_base)))
    counts = found["parameters"]
    assert counts["trainable"] == counts["stored"] == sum(p.numel() for p in tuner.parameters())
    assert counts["total"] == counts["base"] + counts["trainable"]
    for key in ("train_step_s", "sample_step_s"):
        assert found["ratio"][key] == pytest.approx(found["tuned"][key] / found["base"][key])
        assert found["base"][key] > 0
    assert found["protocol"]["batch"] == 2
    monkeypatch.setattr("sctool.eval.profile.profile", lambda *a, **k: found)
    results = evaluate(run.path, Options(metrics=("profile",), quiet=True))
    assert results.folders == []
    assert "sampling step (s)" in markdown(results)
    turns: list[str] = []
    works = {name: (lambda name=name: turns.append(name) or 1.0) for name in "ab"}
    assert in_turns(works, repeats=4) == {"a": 1.0, "b": 1.0}
    assert "".join(turns) == "ab" + "abba" * 2


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sctool.cli import run as command

    samples = make_samples(tmp_path / "samples")
    assert command(["evaluate", str(samples), "--fid", "--nmse", "--json", "--quiet"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["folders"]["samples"]["figures"]["canny.nmse"]["value"] == 0
    assert (samples / "evaluation.md").is_file()
    flags = [
        "--kid",
        "--pr",
        "--control",
        "--weights",
        str(samples / "0.png"),
        "--evaluator",
        "canny:low=50",
        "--quiet",
        "--json",
    ]
    assert command(["evaluate", str(samples), *flags]) == 0
    out = json.loads(capsys.readouterr().out)
    keys = {
        "kid_means",
        "precision_means",
        "recall_means",
        "canny.nmse",
        "canny.nmse_median",
        "canny.f1",
        "canny.f1@1px",
    }
    assert out["folders"]["samples"]["figures"].keys() == keys
    assert any(protocol.get("annotator", {}).get("low") == 50 for protocol in out["protocols"].values())
    assert command(["evaluate", str(samples), "--nmse", "--out", str(tmp_path / "out")]) == 0
    assert "evaluation.json" in capsys.readouterr().out
    assert (tmp_path / "out" / "evaluation.json").is_file()
    assert command(["evaluate", str(tmp_path / "none"), "--runs", str(tmp_path)]) == 2
    assert "run folder" in capsys.readouterr().err
