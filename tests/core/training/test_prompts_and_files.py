"""Training on class folders uses the labels; equal trainings write equal files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from sctool.annotators.training_sets import open_training_sets
from sctool.core.backbones.families import FAMILIES
from sctool.core.backbones.loading import Backbone, load_backbone
from sctool.core.config import SampleConfig, TrainConfig
from sctool.core.files import sha256
from sctool.core.runs import Run, open_run
from sctool.core.training.plan import plan_run
from sctool.core.training.train import train
from sctool.eval.heldout import sample_heldout

QUICK = TrainConfig(steps=2, batch=2, validate_every=0, sample_every=0, val_count=2)


def trained(out: Path, name: str, settings: TrainConfig) -> Run:
    run = open_run(out, name, settings)
    source, held_out, maps = open_training_sets(settings, 32, quiet=True)
    train(settings, run, source, held_out=held_out, map_meta=maps, quiet=True)
    return run


def test_equal_trainings_write_equal_files(tiny_base: Path, edges: Path, tmp_path: Path) -> None:
    settings = QUICK.model_copy(update={"base": str(tiny_base), "data": str(edges), "cond": ("canny",), "ema": 0.9})
    files = [{p.relative_to(run.path): sha256(p) for p in [run.tuner, *run.path.glob("state/*/*")]} for run in (
        trained(tmp_path, "one", settings), trained(tmp_path, "two", settings),
    )]  # fmt: skip
    assert files[0] == files[1]
    assert len(files[0]) == 5


@pytest.fixture
def classes(pictures: Path, tmp_path: Path) -> Path:
    """Two class folders of six images each; the first image has a caption, and there is an image without a class."""
    for i, file in enumerate(sorted(pictures.glob("*.png"))):
        target = tmp_path / "set" / ("dog" if i % 2 else "cat") / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (tmp_path / "set/cat/000.txt").write_text("a red cat")
    shutil.copy(file, tmp_path / "set/other.png")
    return tmp_path / "set"


def test_labels_are_the_captions_of_class_folders(
    tiny_base: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCTOOL_CACHE", str(tmp_path / "cache"))
    encoded: list[str] = []
    encode = Backbone.encode_prompts

    def recorded(self: Backbone, prompts: list[str]) -> dict:
        encoded.extend(prompts)
        return encode(self, prompts)

    settings = QUICK.model_copy(update={"base": str(tiny_base), "data": str(classes), "caption": "my {label}"})
    source, _, _ = open_training_sets(settings, 32)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "other.png: has no caption"
    assert lines[1] == (
        'set: 11 of 13 images have no caption and use their class label: "my cat" (template: caption=...); '
        "1 of 13 images have an empty caption"
    )
    assert lines[2].startswith("1 fault in set; continuing")
    cache = plan_run(settings.model_copy(update={"val_count": 0}), source)["cache"]
    assert (cache["captions_from_labels"], cache["captions_empty"], cache["captions_too_long"]) == (11, 1, 0)

    monkeypatch.setattr(Backbone, "encode_prompts", recorded)
    run = trained(tmp_path, "run", settings.model_copy(update={"val_count": 1, "seed": 1}))
    assert sorted(set(encoded)) == ["", "a red cat", "my cat", "my dog"]
    folders = sample_heldout(run, count=1, sampling=SampleConfig(steps=1, guidance=1), which=("base",), quiet=True)
    (row,) = [json.loads(line) for line in (folders[0] / "metadata.jsonl").read_text().splitlines()]
    assert row["prompt"] in ("my cat", "my dog")


def test_prompts_longer_than_the_text_encoder_reads(tiny_base: Path) -> None:
    backbone = load_backbone(str(tiny_base))  # reads 16 tokens, of which two mark start and end, one per letter
    assert not backbone.too_long("a" * 14)
    assert backbone.too_long("a" * 15)
    assert not backbone.too_long("")
    encoders = [Tokenizer(16), Tokenizer(77)]
    for first, second in (encoders, encoders[::-1]):
        pipe = SimpleNamespace(tokenizer=first, tokenizer_2=second)
        assert not FAMILIES[1].too_long(pipe, "a" * 16)
        assert FAMILIES[1].too_long(pipe, "a" * 17)


class Tokenizer:
    """One token per letter."""

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length

    def __call__(self, prompt: str, truncation: bool, verbose: bool) -> SimpleNamespace:
        assert not truncation
        return SimpleNamespace(input_ids=list(prompt))
