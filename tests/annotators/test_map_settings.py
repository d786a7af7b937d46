"""Settings in `train --cond canny:low=50`: they reach maps made on demand, and existing maps must agree with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sctool.annotators import ANNOTATORS, annotator
from sctool.annotators.engine.ondemand import ensure_maps
from sctool.annotators.engine.run import annotate
from sctool.cli import run as cli
from sctool.core.config import AnnotateConfig
from sctool.core.data.conditions import CONDITIONS, condition_names
from sctool.core.data.images import decode_map
from sctool.core.data.sources import open_source
from sctool.core.errors import UsageError

from .test_annotate import folder_of, shards_of


def annotated(src: Path, out: Path, cond: str, layout: str = "merged") -> Path:
    annotate(AnnotateConfig(src=str(src), cond=(cond,), out=str(out), layout=layout))  # pyright: ignore[reportArgumentType]
    return out


def test_settings_reach_the_maps_and_are_cached_apart(tmp_path: Path) -> None:
    source, cache = open_source(folder_of(tmp_path / "src", 3)), tmp_path / "cache"
    maps = {}
    for cond in ("canny", "canny:low=20,high=60", "canny:low=20"):
        ready, settings = ensure_maps(source, (cond,), 48, cache)
        maps[cond] = [decode_map(record.maps["canny"]) for record in ready.records]
        assert settings["canny"] == {**annotator(cond).id, "opencv": cv2.__version__}
    assert all((few <= many).all() for few, many in zip(maps["canny"], maps["canny:low=20,high=60"], strict=True))
    assert not np.array_equal(maps["canny"], maps["canny:low=20,high=60"])
    assert len(list((cache / "maps/canny").rglob("*.png"))) == 9


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_existing_maps_are_used_if_they_were_made_with_these_settings(tmp_path: Path, kind: str) -> None:
    src = folder_of(tmp_path / "src", 2) if kind == "folder" else shards_of(tmp_path / "src", 1, 2)
    source = open_source(annotated(src, tmp_path / "out", "canny:low=50"))
    for cond in ("canny:low=50", "canny:high=200,low=50", "canny"):
        ready, settings = ensure_maps(source, (cond,), 48, tmp_path / "cache")
        assert [record.maps["canny"] for record in ready.records] == [r.maps["canny"] for r in source.records]
        assert settings["canny"]["low"] == 50
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UsageError) as caught:
        ensure_maps(source, ("canny:low=60",), 48, tmp_path / "cache")
    assert "canny maps were made with low=50, high=200, random=none" in str(caught.value)
    assert "Leave the settings out (--cond canny)" in str(caught.value)
    assert f"sctool annotate {tmp_path / 'out'} --cond canny:low=60" in str(caught.value)


def test_notes_alone_suffice_for_fixed_thresholds(tmp_path: Path) -> None:
    out = annotated(folder_of(tmp_path / "src", 2), tmp_path / "out", "canny:low=50")
    shutil.rmtree(out / ".sctool")
    ensure_maps(open_source(out), ("canny:low=50",), 48, tmp_path / "cache")
    with pytest.raises(UsageError, match="made with low=50, high=200"):
        ensure_maps(open_source(out), ("canny:random=t2i",), 48, tmp_path / "cache")


def test_maps_without_a_record_are_refused(tmp_path: Path, edges: Path) -> None:
    with pytest.raises(UsageError, match=r"canny maps have no record of how they were made\. Leave the settings out"):
        ensure_maps(open_source(edges), ("canny:low=50",), 32, tmp_path / "cache")
    ensure_maps(open_source(edges), ("canny",), 32, tmp_path / "cache")


def test_a_note_with_one_image_says_nothing_of_the_others(tmp_path: Path) -> None:
    out = annotated(folder_of(tmp_path / "src", 2), tmp_path / "out", "canny:low=50")
    shutil.rmtree(out / ".sctool")
    source = open_source(out)
    source.records[1].meta.pop("conditions")
    with pytest.raises(UsageError, match="no record of how they were made"):
        ensure_maps(source, ("canny:low=50",), 48, tmp_path / "cache")


@pytest.mark.parametrize(
    ("made_with", "others"),
    [
        ("canny:random=scepter", ["canny:low=50", "canny:random=t2i", "canny:low=100,high=200"]),
        ("mask:preset=thin,area=0.3", ["mask:preset=thin", "mask:area=0.3", "mask:preset=thick"]),
        ("outpaint:keep=0.3,centre=true", ["outpaint:keep=0.3", "outpaint:centre=true"]),
        ("color:ratio=16", ["color:ratio=32", "color:filter=area"]),
    ],
)
def test_settings_that_images_do_not_note_come_from_the_settings_of_the_set(
    tmp_path: Path, made_with: str, others: list[str]
) -> None:
    source = open_source(annotated(folder_of(tmp_path / "src", 4), tmp_path / "out", made_with))
    ensure_maps(source, (made_with,), 48, tmp_path / "cache")
    for other in others:
        with pytest.raises(UsageError, match="maps were made with") as caught:
            ensure_maps(source, (other,), 48, tmp_path / "cache")
        if "scepter" in made_with:
            assert "made with random=scepter, varying low, varying high. " in str(caught.value)


def test_maps_in_a_folder_of_their_own(tmp_path: Path) -> None:
    src = annotated(folder_of(tmp_path / "src", 2), tmp_path / "set", "canny")
    out = annotated(tmp_path / "src", tmp_path / "maps", "canny:low=50", layout="maps")
    source = open_source(src, str(out))
    ensure_maps(source, ("canny:low=50",), 48, tmp_path / "cache", maps=str(out))
    with pytest.raises(UsageError, match="made with low=50"):  # not what the set notes of its own maps
        ensure_maps(source, ("canny:low=100",), 48, tmp_path / "cache", maps=str(out))


@pytest.mark.parametrize(
    ("spec", "params", "same"),
    [
        ("depth:model=dpt-hybrid", {"model": "dpt-hybrid", "dtype": "fp32"}, True),
        ("depth:model=dpt-hybrid,batch=2", {"model": "dpt-hybrid", "dtype": "bf16"}, True),
        ("depth:model=dpt-hybrid,dtype=fp32", {"model": "dpt-hybrid", "dtype": "bf16"}, False),
        ("depth:model=dpt-large", {"model": "dpt-hybrid", "dtype": "fp32"}, False),
        ("hed:model=nets/hed.pth,safe=1", {"model": "hed.pth", "safe": True, "invert": False}, True),
        ("hed:model=nets/hed.pth,safe=1", {"model": "hed.pth", "safe": False, "invert": False}, False),
        ("hed:model=nets/hed.pth", {"model": str(Path("nets/hed.pth").absolute())}, False),
        ("sketch:model=nets/hed.pth", {"model": str(Path("nets/hed.pth").absolute())}, True),
        ("sketch", {}, False),
    ],
)
def test_settings_of_networks_are_compared_without_their_weights(spec: str, params: dict, same: bool) -> None:
    assert annotator(spec).made_with_same_settings(params) is same


def test_a_training_run_with_settings(tmp_path: Path, tiny_base: Path, pictures: Path, edges: Path) -> None:
    def words(data: Path) -> list[str]:
        options = ["--base", str(tiny_base), "--data", str(data), "--out", str(tmp_path / "runs"), "--name", "run"]
        quick = ["batch=2", "validate_every=0", "sample_every=0", "--quiet"]
        return ["train", "--cond", "canny:low=50", "--steps", "1", *options, *quick]

    assert cli(words(pictures)) == 0
    described = json.loads((tmp_path / "runs/run/tuner/tuner.json").read_text())
    assert (described["maps"]["canny"]["low"], described["maps"]["canny"]["high"]) == (50, 200)
    assert cli([*words(edges), "--name", "other"]) == 2


def test_the_cache_may_be_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCTOOL_CACHE", "~/x")
    monkeypatch.chdir(tmp_path)
    ensure_maps(open_source(folder_of(tmp_path / "src", 1)), ("canny",), 48)
    assert len(list((tmp_path / "home/x/maps").rglob("*.png"))) == 1
    assert not (tmp_path / "~").exists()


def test_help_names_every_condition_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["annotate", "--help"]) == 0
    words = set(capsys.readouterr().out.replace(",", " ").replace(";", " ").replace(".", " ").split())
    for name, cls in ANNOTATORS.items():
        assert {name, *cls.Settings.model_fields} <= words, name
    names = [condition_names(network=network).split(", ") for network in (False, True)]
    assert sorted(names[0] + names[1]) == sorted(CONDITIONS)


def test_conditions_are_named_without_numpy() -> None:
    code = (
        "import sys, sctool.core.data.conditions; bad = {'torch', 'cv2', 'numpy', 'pydantic'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_annotated_set_keeps_the_classes_of_its_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (tmp_path / "set" / label).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "set" / label / "0.png")
    assert cli(["annotate", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    labels = {record.key: record.label for record in open_source(tmp_path / "out").records}
    assert labels == {record.key: record.label for record in open_source(tmp_path / "set").records}
    assert set(labels.values()) == {"cats", "dogs"}
