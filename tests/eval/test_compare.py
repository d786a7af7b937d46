"""`sctool compare`: one protocol a row, winners beyond the intervals only, and messages that help."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sctool.cli import run as command
from sctool.core.errors import SctoolError, UsageError
from sctool.eval.report.compare import compare_runs, differing, markdown, read_evaluation, winner
from sctool.eval.report.tables import write
from sctool.eval.results import Figure, FolderResults, Results

PROTOCOL = {"metric": "canny adherence", "n": 4, "prompts_sha256": "aa", "sampling": {"steps": 20}}


def f1(value: float, spread: float | None = 0.01, protocol: Mapping[str, Any] = PROTOCOL, key: str = "f1") -> Figure:
    interval = None if spread is None else (value - spread, value + spread)
    return Figure(f"canny.{key}", f"canny {key.upper()}", value, "higher", dict(protocol), interval)


def make_run(runs: Path, name: str, *tuned: Figure, base: tuple[Figure, ...] = ()) -> Path:
    """A run folder with an evaluation, as `sctool evaluate` leaves it."""
    (runs / name).mkdir(parents=True)
    (runs / name / "config.yaml").write_text("method: scedit\n")
    folders = [FolderResults("base", Path("b"), 4, list(base))] if base else []
    return write(Results(name, [*folders, FolderResults("tuned", Path("t"), 4, list(tuned))]), runs / name)[0]


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    file = make_run(tmp_path, "a", f1(0.4), f1(0.5, None, key="f2"), base=(f1(0.1),))
    read = read_evaluation(file)
    assert (read.label, read.count) == ("a", 4)
    assert read.figures == {"canny.f1": f1(0.4), "canny.f2": f1(0.5, None, key="f2")}
    assert read.base == {"canny.f1": f1(0.1)}
    assert read.figures["canny.f1"].protocol_id == f1(0).protocol_id
    samples = Results("s", [FolderResults("samples", Path("s"), 4, [f1(0.3)])])
    assert read_evaluation(write(samples, tmp_path / "s")[0]).figures["canny.f1"].value == 0.3
    old = json.loads(file.read_text())
    del old["folders"]["tuned"]["figures"]["canny.f1"]["interval"]
    file.write_text(json.dumps(old))
    assert read_evaluation(file).figures["canny.f1"].interval is None


def test_rows_winner_and_the_base_once(tmp_path: Path) -> None:
    make_run(tmp_path, "a", f1(0.40), f1(0.40, key="f2"), base=(f1(0.1),))
    make_run(tmp_path, "b", f1(0.50), f1(0.41, key="f2"), base=(f1(0.1),))
    found = compare_runs(["a", "b"], tmp_path)
    first, second = found.rows
    assert (first.best, first.verdict) == (1, "best")
    assert (second.best, second.verdict) == (None, "within intervals")
    assert first.base == f1(0.1)
    assert second.base is None
    assert found.differences == []
    lines = markdown(found).splitlines()
    assert lines[2] == "|  | base | a (N=4) | b (N=4) | verdict |"
    assert lines[4] == "| canny F1 ↑ | 0.1 [0.09, 0.11] | 0.4 [0.39, 0.41] | **0.5 [0.49, 0.51]** | b best |"
    assert lines[5] == "| canny F2 ↑ | – | 0.4 [0.39, 0.41] | 0.41 [0.4, 0.42] | within intervals |"


def test_bases_that_disagree_are_not_shown(tmp_path: Path) -> None:
    make_run(tmp_path, "a", f1(0.4), base=(f1(0.1),))
    make_run(tmp_path, "b", f1(0.5), base=(f1(0.2),))
    found = compare_runs(["a", "b"], tmp_path)
    assert found.rows[0].base is None
    assert "0.1 (a), 0.2 (b)" in found.notes[0]
    assert "| base |" not in markdown(found)


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ([f1(0.4), f1(0.5), f1(0.3, 0.3)], (None, "within intervals")),  # the third one's interval reaches the first's
        ([f1(0.4), None, f1(0.5)], (2, "best")),
        ([f1(0.4), f1(0.5, None)], (None, "no intervals")),
        ([f1(0.4), f1(float("nan"))], (None, "no intervals")),
        ([f1(0.4), None], (None, "")),
        ([f1(0.4), f1(0.4)], (None, "within intervals")),
        ([Figure("n", "NMSE", v, "lower", {}, (v - 0.1, v + 0.1)) for v in (1.5, 1.0, 2.0)], (1, "best")),
        ([Figure("h", "hole", v, "", {}, (v, v)) for v in (1.0, 2.0)], (None, "")),
    ],
)
def test_a_winner_is_beyond_every_interval(figures: list[Figure | None], expected: tuple[int | None, str]) -> None:
    assert winner(figures) == expected


def test_other_protocols_never_share_a_row(tmp_path: Path) -> None:
    other = {**PROTOCOL, "n": 8, "prompts_sha256": "bb", "sampling": {"steps": 50}}
    make_run(tmp_path, "a", f1(0.1), f1(0.1, key="f2"), f1(0.1, key="f3"))
    make_run(tmp_path, "b", f1(0.2), f1(0.2, key="f2"))
    make_run(tmp_path, "c", f1(0.3, protocol=other), f1(0.3, key="f2", protocol=other))
    make_run(tmp_path, "d", f1(0.4, protocol=other))
    found = compare_runs(["a", "b", "c", "d"], tmp_path)
    values = [[figure and figure.value for figure in row.figures] for row in found.rows]
    assert values == [[0.1, 0.2, None, None], [None, None, 0.3, 0.4], [0.1, 0.2, None, None]]
    assert [row.first.protocol["n"] for row in found.rows] == [4, 8, 4]
    assert [difference.groups for difference in found.differences] == [[["a", "b"], ["c", "d"]], [["a", "b"], ["c"]]]
    said = str(found.differences[0])
    assert said == "canny F1: n (4 / 8), prompts_sha256, sampling.steps (20 / 50) differ between a, b / c, d"
    assert found.notes == ["canny F3: only in a"]
    assert found.to_json()["differences"][0]["keys"]["sampling.steps"] == [20, 50]


def test_differing_keys() -> None:
    assert differing([{"a": 1, "s": {"x": 1, "y": 2}}, {"a": 1, "s": {"x": 3, "y": 2}}]) == {"s.x": [1, 3]}
    assert differing([{"reference": {"n": 5}}, {"reference": "folder"}]) == {
        "reference": [None, "folder"],
        "reference.n": [5, None],
    }


def test_figures_alike_in_what_differs_share_a_line(tmp_path: Path) -> None:
    other = {**PROTOCOL, "n": 8}
    make_run(tmp_path, "a", f1(0.1), f1(0.1, key="f2"))
    make_run(tmp_path, "b", f1(0.2, protocol=other), f1(0.2, key="f2", protocol=other))
    with pytest.raises(SctoolError, match=r"canny F1; canny F2: n \(4 / 8\) differ between a / b") as caught:
        compare_runs(["a", "b"], tmp_path)
    assert caught.value.exit_code == 1


def test_messages(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    make_run(runs, "edges", f1(0.4))
    make_run(runs, "lora", Figure("fid", "FID", 1.0, "lower", {}))
    (runs / "bare").mkdir()
    (runs / "bare" / "config.yaml").write_text("")
    profile = write(Results("p", [], {"parameters": {"base": 1, "total": 1, "trainable": 1, "stored": 1}, "base": {},
                                      "tuned": {}, "ratio": {}, "protocol": {}}), tmp_path / "p")[0]  # fmt: skip
    broken = {"text": "{", "list": "[]", "shape": '{"folders": {"tuned": {"count": 1}}, "protocols": {}}'}
    for name, text in broken.items():
        (tmp_path / name).write_text(text)
    figure = {"name": "F1", "value": 1, "better": "higher", "protocol": "gone"}
    lost = {"folders": {"tuned": {"count": 1, "figures": {"f1": figure}}}, "protocols": {}}
    (tmp_path / "lost").write_text(json.dumps(lost))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    cases = [
        ([], runs, "at least two"),
        (["edges"], runs, "at least two"),
        (["edges", runs / "edges"], runs, "given twice"),
        (["edges", "edgse"], runs, "Did you mean 'edges'"),
        (["edges", "gone"], tmp_path, "contains no runs"),
        (["edges", "bare"], runs, "sctool evaluate .*bare"),
        (["edges", profile], runs, "no figures of images"),
        (["edges", tmp_path / "text"], runs, "text is not an evaluation.json"),
        (["edges", tmp_path / "list"], runs, "list is not an evaluation.json"),
        (["edges", tmp_path / "shape"], runs, "folders.tuned.figures"),
        (["edges", tmp_path / "lost"], runs, "'gone'"),
        (["edges", tmp_path / "binary"], runs, "binary is not an evaluation.json"),
    ]
    for targets, folder, message in cases:
        with pytest.raises(UsageError, match=message):
            compare_runs(targets, folder)
    with pytest.raises(SctoolError, match="no comparable figure"):
        compare_runs(["edges", "lora"], runs)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    make_run(tmp_path / "x", "a", f1(0.4))
    file = make_run(tmp_path / "y", "[red]|a", f1(0.5))
    again = make_run(tmp_path / "z", "a", f1(0.6))
    options = ["--runs", str(tmp_path / "x")]
    assert command(["compare", "a", str(file), *options, "--out", str(tmp_path / "table.md")]) == 0
    printed = capsys.readouterr().out
    assert "[red]|a best" in printed
    assert "[0.49, 0.51]" in printed
    assert printed.strip().endswith("table.md")
    assert "| [red]\\|a (N=4) |" in (tmp_path / "table.md").read_text()
    assert command(["compare", "a", str(file), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (figure,) = found["figures"]
    assert figure["values"]["a"] == {"value": 0.4, "interval": [0.39, 0.41000000000000003]}
    assert figure["best"] == "[red]|a"
    assert found["protocols"][figure["protocol"]] == PROTOCOL
    assert command(["compare", "a", str(again), *options, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["runs"]) == ["a", str(again)]  # two of one name
    assert command(["compare", "a", str(file), *options, "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert command(["compare", *options]) == 2
    assert "at least two" in capsys.readouterr().err
