"""Sampling: a seed gives one picture in any batch, files explain themselves, hints and tuners by flag."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sctool.cli import run
from sctool.cli.prompts import read_hints
from sctool.core.backbones.loading import Backbone, load_backbone
from sctool.core.checkpoint import save_tuner
from sctool.core.chosen import split_scale
from sctool.core.config import SampleConfig
from sctool.core.errors import SctoolError, UsageError
from sctool.core.fast import KEYS, key_steps, with_fast
from sctool.core.resolving import resolve_config
from sctool.core.sampling import (
    Request,
    batched,
    check_sizes,
    hint_tensor,
    initial_noise,
    sample_images,
    sampling_protocol,
    write_samples,
)
from sctool.core.tuners.configs import SCEditConfig
from sctool.core.tuners.scedit import SCEdit


@pytest.fixture(scope="module")
def backbone(tiny_base: Path) -> Backbone:
    return load_backbone(str(tiny_base))


@pytest.fixture(scope="module")
def tuners(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tuner for each of two conditions, with random weights so that hints show."""
    folder, files = tmp_path_factory.mktemp("tuners"), {}
    for name in ("canny", "color"):
        torch.manual_seed(len(files))
        tuner = SCEdit.build(SCEditConfig(), backbone.denoiser, (name,), vae_scale=backbone.vae_scale)
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.normal_(0, 0.2)
        files[name] = save_tuner(folder / name, tuner, backbone)
    return files


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def map_file(folder: Path, seed: int, side: int = 32) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 2, (side, side), np.uint8) * 255
    Image.fromarray(pixels).save(folder / f"map{seed}.png")
    return folder / f"map{seed}.png"


def test_noise_depends_on_the_seed_alone() -> None:
    both = initial_noise([5, 9], (4, 8, 8))
    assert torch.equal(both[1:], initial_noise([9], (4, 8, 8)))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "unipc"])
def test_a_seed_gives_the_same_picture_in_any_batch(backbone: Backbone, scheduler: str) -> None:
    requests = [Request("a cat", seed) for seed in range(3)]
    config = SampleConfig(steps=3, batch=3, scheduler=scheduler)  # pyright: ignore[reportArgumentType]
    together = [p for _, p in sample_images(backbone, requests, config)]
    alone = [p for _, p in sample_images(backbone, requests, config.model_copy(update={"batch": 1}))]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 2


def test_two_tuners_with_weighted_hints(
    tuners: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hints = [f"--hint=canny={map_file(tmp_path, 0)}:0.7", f"--hint=color={map_file(tmp_path, 1)}:0.3"]
    words = ["sample", "a cat", "--tuner", str(tuners["canny"]), "--tuner", f"{tuners['color']}:0.8", *hints]
    assert run([*words, "--steps", "2", "--count", "2", "--out", str(tmp_path / "a"), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["sheets"] == [str(tmp_path / "a" / "sheet.png")]
    row = json.loads((tmp_path / "a" / "metadata.jsonl").read_text().splitlines()[1])
    assert (row["prompt"], row["seed"], sorted(row["hints"])) == ("a cat", 1, ["canny", "color"])
    inside = json.loads(Image.open(tmp_path / "a" / "000000.png").info["sctool"])
    assert inside["base"]["hash"]
    assert [t["scale"] for t in inside["tuners"]] == [1.0, 0.8]
    other = [*words[:-2], f"--hint=canny={map_file(tmp_path, 2)}:0.7", hints[1]]
    assert run([*other, "--steps", "2", "--out", str(tmp_path / "b"), "--quiet"]) == 0
    assert not np.array_equal(picture(tmp_path / "a" / "000000.png"), picture(tmp_path / "b" / "000000.png"))


def test_prompts_from_a_file_with_their_own_hints(tuners: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": "one", "seed": 7, "hints": {"canny": map_file(tmp_path, 0).name}}, {"prompt": "two"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sample", "--prompts", str(tmp_path / "prompts.jsonl"), "--tuner", str(tuners["canny"])]
    assert run([*words, "--steps", "2", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    made = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [(m["prompt"], m["seed"], list(m["hints"])) for m in made] == [("one", 7, ["canny"]), ("two", 1, [])]


def test_a_photograph_becomes_a_hint(tuners: dict[str, Path], tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).save(tmp_path / "photo.jpg")
    words = ["sample", "a cat", "--tuner", str(tuners["canny"]), f"--photo=canny={tmp_path / 'photo.jpg'}"]
    assert run([*words, "--steps", "2", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert set(np.unique(picture(tmp_path / "out" / "canny" / "000000.png"))) <= {0, 255}


def test_a_photograph_is_annotated_as_the_tuners_maps_were(
    backbone: Backbone, tuners: dict[str, Path], tmp_path: Path
) -> None:
    import cv2

    from sctool.core.checkpoint import load_tuner

    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8), (5, 5), 0)
    Image.fromarray(image).save(tmp_path / "photo.png")
    maps = {"canny": {"low": 20, "high": 60, "version": "canny-1"}}
    save_tuner(tmp_path / "low", load_tuner(tuners["canny"], backbone), backbone, maps=maps)
    words = ["sample", "a cat", f"--photo=canny={tmp_path / 'photo.png'}", "--steps", "1", "--quiet"]
    for tuner, thresholds in ((tmp_path / "low", (20, 60)), (tuners["canny"], (100, 200))):
        assert run([*words, "--tuner", str(tuner), "--out", str(tmp_path / "out")]) == 0
        hint = picture(tmp_path / "out" / "canny" / "000000.png")
        assert np.array_equal(hint[..., 0], cv2.Canny(image, *thresholds))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--hint=canny"], "NAME=FILE"),
        (["--hint=canny=nowhere.png"], "no such file"),
        (["--hint=cany={map}"], "Did you mean 'canny'?"),
        (["--hint=canny={text}"], "not an image"),
        (["--size=30"], "divisible by 8"),
        (["--no-tuner"], "exclude"),
        (["--scheduler=dpm"], "scheduler"),
    ],
)
def test_wrong_words(
    more: list[str], said: str, tuners: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("text")
    more = [m.format(map=map_file(tmp_path, 0), text=tmp_path / "text.png") for m in more]
    words = ["sample", "a cat", "--tuner", str(tuners["canny"]), *more, "--steps", "2", "--out", str(tmp_path / "out")]
    assert run(words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "metadata.jsonl").exists()


def test_tuner_of_another_base(
    base_maker, tuners: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = base_maker(tmp_path / "other", seed=1)
    words = ["sample", "a cat", "--tuner", str(tuners["canny"]), "--base", str(other), "--steps", "2", "--quiet"]
    assert run([*words, "--out", str(tmp_path / "out")]) == 1
    assert "--force" in capsys.readouterr().err
    assert run([*words, "--out", str(tmp_path / "out"), "--force"]) == 0


def test_scale_after_a_colon() -> None:
    assert split_scale("runs/a:0.5") == ("runs/a", 0.5)
    assert split_scale("runs/a") == ("runs/a", 1.0)
    assert split_scale("C:file") == ("C:file", 1.0)


def test_a_hint_without_a_file() -> None:
    with pytest.raises(UsageError, match="NAME=FILE"):
        read_hints(["canny"], [], 32)


def test_noise_of_a_seed_is_torchs_own() -> None:
    expected = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    assert torch.equal(initial_noise([7], (4, 8, 8)), expected)


def test_requests_share_a_batch_up_to_its_size_and_only_with_the_same_hints() -> None:
    hint = np.zeros((8, 8, 3), np.uint8)
    requests = [Request("a", i, {"canny": hint} if i in (3, 4) else {}) for i in range(8)]
    assert [[r.seed for r in batch] for batch in batched(requests, 2)] == [[0, 1], [2], [3, 4], [5, 6], [7]]
    assert [[r.seed for r in batch] for batch in batched(requests, 8)] == [[0, 1, 2], [3, 4], [5, 6, 7]]
    assert list(batched([], 2)) == []


def test_hints_become_numbers_from_0_to_1() -> None:
    hints = [np.full((2, 4, 3), value, np.uint8) for value in (0, 51, 255)]
    hints[1][0, 3] = (255, 0, 51)
    tensor = hint_tensor(hints)
    assert tensor.shape == (3, 3, 2, 4)
    torch.testing.assert_close(tensor[:, 0, 1, 0], torch.tensor([0, 0.2, 1]))
    torch.testing.assert_close(tensor[1, :, 0, 3], torch.tensor([1, 0, 0.2]))


@pytest.mark.parametrize(
    ("size", "hint", "reason"),
    [(36, None, "size=36 is not divisible by 8"), (40, (32, 40), "hint 'canny' is 40x32 px, the image 40x40"),
     (None, (40, 40), "the image 32x32 px"), (40, (40, 40), None), (None, (32, 32), None)],
)  # fmt: skip
def test_sizes_are_checked_before_anything_is_drawn(
    backbone: Backbone, size: int | None, hint: tuple[int, int] | None, reason: str | None
) -> None:
    hints = {"canny": np.zeros((*hint, 3), np.uint8)} if hint else {}
    config = SampleConfig(size=size)
    if reason is None:
        check_sizes(backbone, [Request("a", 0, hints)], config)
        return
    with pytest.raises(UsageError, match=reason):
        check_sizes(backbone, [Request("a", 0), Request("a", 0, hints)], config)


def test_the_protocol_names_all_that_decides_an_image(backbone: Backbone) -> None:
    config = SampleConfig(steps=7, guidance=2.0, scheduler="unipc", negative="bad")
    protocol = sampling_protocol(backbone, config, [{"id": "t", "scale": 0.5}])
    assert protocol == {
        "base": {"id": backbone.id, "hash": backbone.hash, "family": "sd"}, "tuners": [{"id": "t", "scale": 0.5}],
        **config.model_dump(mode="json", exclude={"key_steps"}), "size": 32,
    }  # fmt: skip
    assert sampling_protocol(backbone, SampleConfig(size=64))["size"] == 64


def test_samples_on_disk_say_what_they_show(tmp_path: Path) -> None:
    """Images, hints, references and class maps under the names of the table; a short sheet beside them."""
    pixels = [np.full((8, 8, 3), value, np.uint8) for value in range(40)]
    requests = [Request(f"p{i}", 10 + i) for i in range(40)]
    requests[1] = Request("x", 5, {"seg": pixels[3]}, pixels[4], "photo", "cat", {"seg": pixels[6][..., 0]})
    paths = write_samples(tmp_path, iter(zip(requests, pixels, strict=True)), {"steps": 3})
    assert paths == [tmp_path / f"{i:06d}.png" for i in range(40)]
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "file_name": "000000.png", "prompt": "p0", "seed": 10, "key": "000000", "label": None, "reference": None,
        "hints": {},
    }  # fmt: skip
    assert rows[1] == {
        "file_name": "000001.png", "prompt": "x", "seed": 5, "key": "photo", "label": "cat",
        "reference": "reference/000001.png", "hints": {"seg": "seg/000001.png"}, "maps": {"seg": "maps/seg/000001.png"},
    }  # fmt: skip
    files = ("000001.png", "seg/000001.png", "reference/000001.png", "maps/seg/000001.png")
    for name, value in zip(files, (1, 3, 4, 6), strict=True):
        assert (picture(tmp_path / name) == value).all()
    assert json.loads((tmp_path / "sampling.json").read_text()) == {"steps": 3}
    assert json.loads(Image.open(tmp_path / "000001.png").info["sctool"]) == {**rows[1], "steps": 3}
    assert (tmp_path / "sheet.png").is_file()
    with pytest.raises(SctoolError, match="nothing was drawn"):
        write_samples(tmp_path, iter(()), {})
    assert not (tmp_path / "metadata.jsonl").exists(), "a folder that has one is complete"


def test_samplers_are_diffusers_own_with_the_bases_noise_schedule(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def sample(self: Any, pipe: Any, noise: torch.Tensor, *_: Any) -> torch.Tensor:
        used.append((type(pipe.scheduler).__name__, pipe.scheduler.config.beta_end))
        return noise

    monkeypatch.setattr(type(backbone.family), "sample", sample)
    for name in ("ddim", "dpm++", "unipc"):
        list(sample_images(backbone, [Request("a", 0)], SampleConfig(scheduler=name)))
    classes = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    assert used == [(name, 0.012) for name in classes]


def test_the_bases_own_scheduler_comes_back_after_sampling(backbone: Backbone) -> None:
    before = backbone.pipe.scheduler
    list(sample_images(backbone, [Request("a", 0)], SampleConfig(steps=1, scheduler="unipc")))
    assert backbone.pipe.scheduler is before


def test_progress_counts_images_and_prompts_are_encoded_by_whom_they_are_given_to(backbone: Backbone) -> None:
    prompts: list[list[str]] = []
    counts: list[int] = []

    def encode(texts: list[str]) -> dict[str, torch.Tensor]:
        prompts.append(texts)
        return backbone.encode_prompts(texts)

    requests = [Request(f"p{i}", i) for i in range(3)]
    config = SampleConfig(steps=1, batch=2, negative="no")
    images = list(sample_images(backbone, requests, config, counts.append, encode))
    assert prompts == [["no"], ["p0", "p1"], ["p2"]]
    assert counts == [2, 1]
    assert [request.seed for request, _ in images] == [0, 1, 2]
    assert {image.shape for _, image in images} == {(32, 32, 3)}


def test_a_second_sampling_leaves_no_image_of_the_first(backbone: Backbone, tmp_path: Path) -> None:
    words = ["sample", "a", "b", "--no-tuner", "--base", backbone.id, "--steps", "1", "--quiet"]
    words += ["--out", str(tmp_path / "o")]
    assert run([*words, "--count", "2"]) == 0
    (tmp_path / "o" / "mine.png").write_bytes(b"x")
    assert run(words) == 0
    names = [path.name for path in (tmp_path / "o").glob("*.png")]
    assert sorted(names) == ["000000.png", "000001.png", "mine.png", "sheet.png"]


def test_an_image_set_of_ones_own_is_never_overwritten(
    backbone: Backbone, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = (pictures / "metadata.jsonl").read_text()
    words = ["sample", "a", "--no-tuner", "--base", backbone.id, "--steps", "1", "--quiet"]
    assert run([*words, "--out", str(pictures)]) == 1
    assert "did not write" in capsys.readouterr().err
    assert (pictures / "metadata.jsonl").read_text() == table
    (tmp_path / "file").write_text("")
    assert run([*words, "--out", str(tmp_path / "file")]) == 1
    assert "cannot write samples" in capsys.readouterr().err


def test_a_run_is_named_as_a_tuner(backbone: Backbone, tuners: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "runs" / "edges").mkdir(parents=True)
    (tmp_path / "runs" / "edges" / "tuner").symlink_to(tuners["canny"].parent)
    monkeypatch.chdir(tmp_path)
    assert run(["sample", "a", "--tuner", "edges:0.5", "--steps", "1", "--quiet", "--out", "o"]) == 0


# ------------------------------------------------------------------------------------------------------------ fast


def protocol_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sampling.json").read_text())


def test_fast_images_say_how_they_were_drawn(tuners: dict[str, Path], tmp_path: Path) -> None:
    words = ["sample", "a cat", "--tuner", str(tuners["canny"]), f"--hint=canny={map_file(tmp_path, 0)}", "--quiet"]
    drawn = {}
    for name, more in {
        "plain": ["--steps", "10", "--scheduler", "dpm++"],
        "fast": ["--fast", "--steps", "10"],
        "all": ["--fast", "--steps", "10", "--key-steps", ",".join(map(str, range(10)))],
        "own": ["--steps", "10", "--scheduler", "dpm++", "--key-steps", "5,2"],
    }.items():
        assert run([*words, *more, "--out", str(tmp_path / name)]) == 0
        drawn[name] = picture(tmp_path / name / "000000.png")
    assert "key_steps" not in protocol_of(tmp_path / "plain"), "the protocol of images drawn before there were any"
    assert protocol_of(tmp_path / "fast")["key_steps"] == list(key_steps(10))
    assert protocol_of(tmp_path / "fast")["scheduler"] == "dpm++"
    assert json.loads(Image.open(tmp_path / "own" / "000000.png").info["sctool"])["key_steps"] == [0, 2, 5]
    assert np.array_equal(drawn["all"], drawn["plain"])
    assert not np.array_equal(drawn["fast"], drawn["plain"])


def test_what_fast_stands_for() -> None:
    assert with_fast({}) == {"scheduler": "dpm++", "steps": 20, "key_steps": KEYS}
    given = {"scheduler": "ddim", "steps": 50, "key_steps": "0,9", "guidance": None}
    assert with_fast(given) == given
    for steps in (1, 2, 5, 20, 50, 1000):
        keys = key_steps(steps)
        assert keys == resolve_config(SampleConfig, flags=with_fast({"steps": steps})).key_steps
        assert keys[0] == 0
        assert len(keys) <= len(KEYS)


@pytest.mark.parametrize("keys", ["20", "-1", "a"])
def test_key_steps_that_are_not_there(keys: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "a", "--no-tuner", "--fast", f"--key-steps={keys}"]) == 2
    assert "key" in capsys.readouterr().err


def test_a_base_without_an_encoder_is_refused_before_anything_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", "--class", "0", "--no-tuner", "--base", "mini-dit", "--steps", "1", "--quiet"]
    assert run([*words, "--out", str(tmp_path / "o")]) == 0
    assert run([*words, "--out", str(tmp_path / "o"), "--fast"]) == 2
    assert "reuses a U-Net's encoder" in capsys.readouterr().err
    assert (tmp_path / "o" / "000000.png").is_file()


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "unipc"])
def test_reuse_with_every_scheduler(backbone: Backbone, scheduler: Any) -> None:
    requests = [Request("a cat", seed) for seed in range(2)]
    config = SampleConfig(steps=6, scheduler=scheduler)
    plain = [image for _, image in sample_images(backbone, requests, config)]
    every = config.model_copy(update={"key_steps": tuple(range(6))})
    assert all(np.array_equal(a, b) for a, (_, b) in zip(plain, sample_images(backbone, requests, every), strict=True))
    some = config.model_copy(update={"key_steps": (0, 2), "batch": 1})
    together = config.model_copy(update={"key_steps": (0, 2)})
    for (_, a), (_, b) in zip(
        sample_images(backbone, requests, some), sample_images(backbone, requests, together), strict=True
    ):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 2
    assert not backbone.denoiser._forward_hooks
