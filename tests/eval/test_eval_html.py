"""The HTML report: complete, self-contained, the same every time, and safe from what prompts and files hold."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sctool.eval.report import html as module
from sctool.eval.report.histogram import histogram, ticks
from sctool.eval.report.html import THUMB, extremes, grid, thumbnail, write_html
from sctool.eval.results import Figure, FolderResults, ImageResult, Results

VOID = {"meta", "img", "br", "path", "link", "input"}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)> \ud800'


class Page(HTMLParser):
    """Tags, attributes and texts; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make_results(folder: Path, count: int = 20) -> Results:
    """Base and tuned of `count` pictures of 32 px with hints and references, and three figures, two with values."""
    rng = np.random.default_rng(0)
    protocol = {"metric": "canny adherence", "n": count, "sampling": {"steps": 2, "negative": ""}}
    folders = []
    for index, label in enumerate(("base", "tuned")):
        path = folder / label
        (path / "canny").mkdir(parents=True)
        images = []
        for i in range(count):
            name = f"{i}.png"
            for file in (name, f"canny/{name}", f"reference-{name}"):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(path / file)
            values = {"canny.f1": i / count, "canny.nmse": 2 - i / count + 0.25 * index}
            hints = {"canny": f"canny/{name}"}
            images.append(ImageResult(name, f"picture {i}", str(i), hints, f"reference-{name}", values))
        rows = "".join(json.dumps({"file_name": p.file}) + "\n" for p in images)
        (path / "metadata.jsonl").write_text(rows)
        tuners = [{"method": "scedit", "scale": 1.5}] * index
        sampling = {"base": {"id": "tiny", "hash": "abcdef"}, "tuners": tuners, "steps": 2}
        (path / "sampling.json").write_text(json.dumps(sampling))
        os.utime(path / "metadata.jsonl", (1e9, 1e9))
        figures = [
            Figure("fid", "FID", 20.5 - index, "lower", {"metric": "FID"}),
            Figure("canny.f1", "canny F1", 0.25 + index / 2, "higher", protocol, (0.2 + index / 2, 0.3 + index / 2)),
            Figure("canny.nmse", "canny NMSE", 1.5, "lower", protocol, (1.4, 1.6)),
        ]
        folder_results = FolderResults(label, path, count, figures, [], images)
        folder_results.extract["canny"] = lambda image, key: 255 - image
        folders.append(folder_results)
    return Results("runs/edges", folders, notes=["few images"])


def test_everything_in_its_order_and_nothing_from_outside(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    results.folders[1].faults.append({"file": "7.png", "reason": "is cut off"})
    page = Page(write_html(results, tmp_path / "out").read_text())
    parts = ["Evaluation of runs/edges", "tiny (abcdef)", "method scedit, scale 1.5", "2001-09-09", "base (N=20)",
             "canny F1 ↑", "0.25", "[0.2, 0.3]", "0.75", "[0.7, 0.8]", "few images", "12 of 20", "hint: canny",
             "canny of tuned", "reference", "Best and worst of tuned", "Distributions", "canny adherence",
             "steps 2, negative none", "tuned/7.png"]  # fmt: skip
    body = page.text[page.text.rindex("}") :]  # after the style sheet
    places = [body.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)
    assert {image["src"][:11] for image in page.all("img") if image["src"]} == {"data:image/"}
    assert all(image["alt"] and image["width"] == "32" for image in page.all("img"))
    assert len(page.all("img")) == 12 * 5 + 2 * 2 * 6 * 2  # the grid; hint and picture at both ends of two figures
    links = [link["href"] or "" for link in page.all("a")]
    identities = {attributes.get("id") for _, attributes in page.tags}
    assert links
    assert all(link[0] == "#" and link[1:] in identities for link in links)
    assert not page.all("script") + page.all("link") + page.all("iframe")
    assert "default-src 'none'" in str(page.all("meta"))
    assert {cell.get("scope") for cell in page.all("th")} == {"col", "row"}
    assert [cell["class"] for cell in page.all("td") if "best" in (cell.get("class") or "")] == ["number best"]
    assert len(page.all("svg")) == 2
    assert all("base: mean" in (svg["aria-label"] or "") for svg in page.all("svg"))


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    first = write_html(results, tmp_path / "a").read_bytes()
    assert write_html(results, tmp_path / "b").read_bytes() == first
    results.folders[1].images[0].prompt = "another"
    assert write_html(results, tmp_path / "b").read_bytes() != first


def test_nothing_that_a_file_says_becomes_markup(tmp_path: Path) -> None:
    results = make_results(tmp_path, 4)
    results.target = HOSTILE
    results.notes = [HOSTILE]
    folder = results.folders[1]
    folder.label = HOSTILE
    folder.faults = [{"file": HOSTILE, "reason": HOSTILE}]
    for image in folder.images:
        image.prompt = HOSTILE
    folder.images[0].file = HOSTILE[:-1]
    folder.images[1].hints = {HOSTILE: HOSTILE[:-1]}
    folder.figures[1] = Figure("canny.f1", HOSTILE, 0.5, "higher", {HOSTILE: {HOSTILE: [HOSTILE]}})
    (folder.path / "sampling.json").write_text(json.dumps({"base": {"id": HOSTILE[:-1]}, "tuners": [HOSTILE[:-1]]}))
    text = write_html(results, tmp_path / "out").read_bytes().decode()  # valid UTF-8, surrogate or not
    page = Page(text)
    assert page.text.count("<script>alert(1)</script>") > 20
    assert not page.all("script")
    assert not [tag for tag, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert {image["src"][:5] for image in page.all("img") if image["src"]} == {"data:"}


def test_pictures_that_cannot_be_read_are_shown_as_missing(tmp_path: Path) -> None:
    results = make_results(tmp_path, 4)
    main = results.folders[1]
    (main.path / "0.png").unlink()
    (main.path / "canny" / "1.png").write_bytes(b"no picture")
    main.images[2].reference = "../base/2.png"
    results.folders[0].images = results.folders[0].images[:3]
    cells = [{cell.label: cell.missing for cell in sample.cells} for sample in grid(results.folders)]
    assert "No such file" in cells[0]["tuned"]
    assert "No such file" in cells[0]["canny of tuned"]
    assert cells[0]["base"] == cells[1]["tuned"] == ""
    assert cells[1]["hint: canny"]
    assert "leads out of the folder" in cells[2]["reference"]
    assert "base" not in cells[3]
    assert "No such file" in Page(write_html(results, tmp_path / "out").read_text()).text


def test_best_and_worst_follow_the_figures_direction(tmp_path: Path) -> None:
    main = make_results(tmp_path).folders[1]
    main.images[19].values["canny.f1"] = float("nan")
    f1, nmse = extremes(main).values()
    assert [s.file for s in f1["best"]] == [f"{i}.png" for i in range(18, 12, -1)]
    assert [s.file for s in f1["worst"]] == [f"{i}.png" for i in range(6)]
    assert [s.file for s in nmse["best"]] == [f"{i}.png" for i in range(19, 13, -1)]
    assert (f1["best"][0].value, f1["best"][0].prompt) == ("0.9", "picture 18")
    main.figures = [Figure("canny.f1", "share", 0.5, "", {})]
    main.images = main.images[:3]
    (share,) = extremes(main).values()
    assert {name: [s.file for s in group] for name, group in share.items()} == {
        "lowest": ["0.png"],
        "highest": ["2.png"],
    }


def test_only_the_pictures_that_are_shown_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = make_results(tmp_path, 100)
    read = []
    original = module.read_image
    monkeypatch.setattr(module, "read_image", lambda folder, name: read.append(name) or original(folder, name))
    write_html(results, tmp_path / "out")
    assert len({re.sub(r"\D", "", name) for name in read}) <= 12 + 2 * 12


def test_two_hundred_large_pictures_stay_below_five_megabytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = np.clip(rng.normal(128, 60, (512, 512, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png", compress_level=1)
    keys = [f"canny.{i}" for i in range(6)]
    figures = [Figure(key, key, 0.5, "higher", {}) for key in keys]
    pictures = [
        ImageResult("x.png", "p", "", {"canny": "x.png"}, "x.png", dict.fromkeys(keys, i / 200)) for i in range(200)
    ]
    folders = [FolderResults(label, tmp_path, 200, figures, [], pictures) for label in ("base", "tuned")]
    assert write_html(Results("x", folders), tmp_path).stat().st_size < 5e6


def test_costs_alone(tmp_path: Path) -> None:
    profile = {
        "method": "scedit",
        "parameters": {"trainable": 5, "stored": 5, "total": 105, "base": 100},
        "base": {"train_step_s": 0.5},
        "tuned": {"train_step_s": 0.25},
        "ratio": {"train_step_s": 0.5},
        "protocol": {"device": "cpu", "batch": 2},
    }
    page = Page(write_html(Results("runs/x", [], profile), tmp_path).read_text())
    assert "training step (s)" in page.text
    assert "Figures" not in page.text
    assert not page.all("img")


def decoded(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_thumbnails() -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (40, 56, 3), np.uint8)
    source, width, height = thumbnail(small)
    assert (width, height) == (56, 40)
    np.testing.assert_array_equal(np.asarray(decoded(source)), small)
    wide = rng.integers(0, 255, (300, 600, 3), np.uint8)
    source, width, height = thumbnail(wide)
    assert (width, height) == decoded(source).size == (THUMB, THUMB // 2)
    assert source.startswith("data:image/jpeg")


def heights(svg: str, series: int) -> np.ndarray:
    """The bars' heights in pixels, from the outline of a series."""
    outline = re.search(rf'class="series-{series}" d="M\S+ (\S+?)V(.*?)Z"', svg)
    assert outline
    return float(outline[1]) - np.array([float(y) for y in re.findall(r"([\d.]+)H", outline[2])])


def test_bars_are_the_counts() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 1, 100), rng.uniform(0.5, 1, 100)
    svg, beyond = histogram({"a": a.tolist(), "b": b.tolist()}, "F1 <x>")
    bars = [heights(svg, 0), heights(svg, 1)]
    pooled = np.concatenate([a, b])
    edges = np.linspace(pooled.min(), pooled.max(), len(bars[0]) + 1)
    counts = [np.histogram(values, edges)[0] for values in (a, b)]
    most = max(c.max() for c in counts)
    for bar, count in zip(bars, counts, strict=True):
        np.testing.assert_allclose(bar / max(map(max, bars)), count / most, atol=2e-3)
    assert beyond == 0
    assert "F1 &lt;x&gt;" in svg
    assert f"a: mean {a.mean():.4g}" in svg


def test_far_values_do_not_press_the_others_together() -> None:
    values = [*np.linspace(0, 1, 99).tolist(), 1000.0]
    svg, beyond = histogram({"a": values}, "NMSE")
    assert beyond == 1
    bars = heights(svg, 0)
    assert (bars > 0).sum() >= 5
    assert bars[-1] == pytest.approx(min(bars[bars > 0]))  # the far one, in the last bar
    for same in ([0.0] * 5, [3.0]):
        svg, beyond = histogram({"a": same}, "F1")
        assert beyond == 0
        assert (heights(svg, 0) > 0).sum() == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.3, 0.25, [-0.2, 0, 0.2]), (12, 987, [200, 400, 600, 800])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)
