"""`sctool merge`: files in, one file or one base out, and one clear message for what cannot be."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sctool.cli import run as sctool
from sctool.core.backbones.loading import Backbone, load_backbone
from sctool.core.checkpoint import load_tuner, read_meta, save_tuner
from sctool.core.merging.measuring import fixed_batch, outputs
from sctool.core.tuners import method_config, tuner_class


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Backbone:
    return load_backbone(str(tiny_base))


@pytest.fixture
def make(base: Backbone, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, method: str = "scedit", conditions: tuple = (), seed: int = 0, **settings: Any) -> Path:
        torch.manual_seed(seed)
        config = method_config(method, settings)
        tuner = tuner_class(method).build(config, base.denoiser, conditions, base.vae_scale)
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return save_tuner(tmp_path / name, tuner, base, maps={name: {"low": 100} for name in conditions}).parent

    return make


def text(*words: Any) -> list[str]:
    return [str(word) for word in words]


def test_three_tuners_reloaded_are_the_three_together(
    make: Callable[..., Path], base: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "scedit": [{"ratio": 0.5}, {"conditions": ("canny",)}, {"conditions": ("color",)}],
        "diffscaler": [{"dim": 2}, {"dim": 3, "conditions": ("canny",)}, {"dim": 1, "conditions": ("color",)}],
        "lora": [{"rank": 1}, {"rank": 2}, {"rank": 3}],
    }
    for method, rows in settings.items():
        files = [make(f"{method}{seed}", method, seed=seed, **row) for seed, row in enumerate(rows)]
        out = tmp_path / f"merged-{method}"
        assert sctool(text("merge", *files, "--weights", "0.5,0.25,-1.5", "--out", out, "--json")) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["exact"]
        assert report["error"]["largest"] < 1e-5 < report["error"]["effect"]
        meta = read_meta(out)
        assert [one["weight"] for one in meta["merged"]["of"]] == [0.5, 0.25, -1.5]
        assert all(len(one["sha256"]) == 64 for one in meta["merged"]["of"])
        assert meta["maps"] == ({} if method == "lora" else {"canny": {"low": 100}, "color": {"low": 100}})
        assert report["parameters"] == meta["parameters"]
        tuners = [load_tuner(file, base) for file in files]
        whole = load_tuner(out, base)
        batch = fixed_batch(base, whole.conditions)
        together = list(outputs(base, batch, tuners, [0.5, 0.25, -1.5]))
        assert len(together) == (1 if method == "lora" else 4)
        for ours, theirs in zip(outputs(base, batch, [whole], [1.0]), together, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_rank_leaves_units_out_and_says_what_that_costs(
    make: Callable[..., Path], base: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [make(f"d{seed}", "diffscaler", seed=seed, dim=dim) for seed, dim in enumerate((2, 3))]
    whole, small, named, full = (tmp_path / name for name in ("whole", "small", "named", "full"))
    assert sctool(text("merge", *files, "--out", whole)) == 0
    capsys.readouterr()
    assert sctool(text("merge", *files, "--rank", 2, "--out", small, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rule"], report["exact"]) == ("prune", False)
    assert 0 < report["residual"]["mean"] < report["residual"]["truncated"]
    assert report["residual"]["rank"] == 2
    assert 0 < report["error"]["mean"] < report["error"]["effect"]
    assert read_meta(small)["merged"]["residual"] == report["residual"]
    assert set(load_tuner(small, base).dims.values()) == {2}
    assert sctool(text("merge", *files, "--rule", "prune", "--rank", 2, "--out", named)) == 0
    said = capsys.readouterr().out
    assert "rule prune (approximate)" in said
    assert "cut to 2 units" in said
    assert "without the refit" in said
    assert "difference of the output" in said
    assert (named / "tuner.safetensors").read_bytes() == (small / "tuner.safetensors").read_bytes()
    assert sctool(text("merge", *files, "--rank", 5, "--out", full)) == 0
    assert "no layer has more than 5 units" in capsys.readouterr().out
    ours, theirs = load_tuner(full, base).state_dict(), load_tuner(whole, base).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    alone = tmp_path / "alone"  # a single tuner is made narrower, too
    assert sctool(text("merge", files[1], "--rank", 1, "--out", alone)) == 0
    assert set(load_tuner(alone, base).dims.values()) == {1}


def test_minus_takes_a_tuner_away(
    make: Callable[..., Path], base: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    big, small = make("big", "lora", seed=1), make("small", "lora", seed=2)
    both, back = tmp_path / "both", tmp_path / "back"
    assert sctool(text("merge", big, small, "--out", both)) == 0
    assert sctool(text("merge", both, "--minus", small, "--out", back)) == 0
    assert "exact" in capsys.readouterr().out
    batch = fixed_batch(base, ())
    [ours], [theirs] = (list(outputs(base, batch, [load_tuner(file, base)], [1.0])) for file in (back, big))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_base_with_the_tuner_in_it_is_a_base(
    make: Callable[..., Path], base: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = make("hats", "lora"), tmp_path / "with-hats"
    assert sctool(text("merge", f"{one}:0.7", "--into-base", "--out", out, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["folding_error"]["largest"] < 1e-5 < report["folding_error"]["effect"]
    plain = load_backbone(str(out))
    batch = fixed_batch(base, ())
    [ours], [theirs] = list(outputs(plain, batch, [], [])), list(outputs(base, batch, [load_tuner(one, base)], [0.7]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert f"The base {base.id} with tuners of method lora" in (out / "README.md").read_text()
    assert (
        sctool(text("sample", "a photo", "--no-tuner", "--base", out, "--steps", 2, "--out", tmp_path / "drawn")) == 0
    )
    with pytest.raises(Exception, match="trained on base"):
        load_tuner(one, plain)


@pytest.mark.parametrize("method", ["dora", "lokr", "difffit"])
def test_a_single_tuner_goes_into_a_base_without_a_rule(
    method: str, make: Callable[..., Path], base: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = make("one", method), tmp_path / "base"
    assert sctool(text("merge", one, "--into-base", "--out", out, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["folding_error"]["largest"] < 1e-5
    batch = fixed_batch(base, ())
    [ours] = outputs(load_backbone(str(out)), batch, [], [])
    [theirs] = outputs(base, batch, [load_tuner(one, base)], [1.0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_an_approximate_fold_says_how_far_it_is_off(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = make("styles", "diffscaler", dim=2, shift="biased"), tmp_path / "base"
    words = text("merge", one, "--into-base", "--approximate", "--out", out)
    assert sctool([*words, "--max-error", "1e-9"]) == 1
    assert "above the allowed 1e-09. Nothing was written" in capsys.readouterr().err
    assert not out.exists()
    assert sctool(words) == 0
    assert "(approximate)" in capsys.readouterr().out


REFUSED = {
    "unequal methods": (["a", "other"], [], 2, "cannot become one"),
    "too few weights": (["a", "b"], ["--weights", "1"], 2, "1 numbers for 2 tuners"),
    "no number": (["a", "b"], ["--weights", "1,x"], 2, "'x' is not a number"),
    "weights twice": (["a:0.5", "b"], ["--weights", "1,1"], 2, "not both"),
    "a weight that is not finite": (["a", "b"], ["--weights", "1,nan"], 2, "give a finite number"),
    "an unknown rule": (["a", "b"], ["--rule", "stak"], 2, "Did you mean 'stack'"),
    "an unknown rule of a method": (["d"], ["--rule", "prun", "--rank", "2"], 2, "Did you mean 'prune'"),
    "pruning to no rank": (["d"], ["--rule", "prune"], 2, "say how many, e.g. --rank 8"),
    "pruning by density": (["d"], ["--rank", "2", "--density", "0.5"], 2, "--density has no meaning"),
    "a method without units": (["a", "b"], ["--rank", "2"], 2, "no rule for scedit makes a tuner of a given rank"),
    "pruning another method": (["other"], ["--rule", "prune", "--rank", "2"], 2, "unknown rule for lora 'prune'"),
    "NaN weights": (["a", "nan"], [], 1, "values that are not finite"),
    "a truncated file": (["a", "short"], [], 1, "damaged"),
    "a pickle": (["a", "pickle"], [], 1, "not a safetensors file"),
    "another base": (["a", "foreign"], [], 1, "was trained on base"),
    "a missing file": (["a", "gone"], [], 2, "does not exist"),
    "approximate without a base": (["a"], ["--approximate"], 2, "belongs to --into-base"),
    "skips into a base": (["a"], ["--into-base"], 2, "use it as a tuner"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_ends_with_one_message_and_nothing_written(
    case: str, make: Callable[..., Path], base: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    names, flags, code, message = REFUSED[case]
    make("a", seed=0)
    make("b", seed=1)
    make("other", "lora")
    make("d", "diffscaler", dim=2)
    file = make("short", seed=2) / "tuner.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    monkeypatch.setattr(base, "hash", "f" * 64)
    make("foreign", seed=3)
    monkeypatch.undo()
    _spoil(make("nan", seed=4) / "tuner.safetensors")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "tuner.safetensors").write_bytes(pickle.dumps(Bomb()))
    out = tmp_path / "out"
    assert sctool(text("merge", *(tmp_path / name for name in names), *flags, "--out", out)) == code
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 3
    assert not out.exists()


def test_a_rank_of_nothing_is_refused(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert sctool(text("merge", make("d", "diffscaler", dim=2), "--rank", 0, "--out", out)) == 2
    assert "--rank" in capsys.readouterr().err
    assert not out.exists()


class Bomb:
    def __reduce__(self) -> tuple:
        return (print, ("code in a pickle was run",))


def _spoil(file: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[next(iter(tensors))].view(-1)[0] = math.nan
    save_file(tensors, file, metadata)


def test_a_full_disk_leaves_nothing(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    one, out = make("a"), tmp_path / "out"
    monkeypatch.setattr("sctool.core.checkpoint.save_tensors", full)
    assert sctool(text("merge", one, "--out", out)) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not any(out.glob("*")) if out.exists() else True


def test_what_is_there_already_is_not_overwritten(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = make("a"), make("b")
    before = (out / "tuner.safetensors").read_bytes()
    assert sctool(text("merge", one, "--out", out)) == 2
    assert "exists already" in capsys.readouterr().err
    assert (out / "tuner.safetensors").read_bytes() == before
