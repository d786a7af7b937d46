"""The cache is keyed by content, goes on after a kill, and serves what the encoders gave."""

import copy
import pickle

import cv2
import numpy as np
import pytest
import torch

from sctool.core.data import cache as cache_module
from sctool.core.data import prepared as prepared_module
from sctool.core.data.images import Geometry, decode_rgb
from sctool.core.data.prepared import cache_plan, prepare
from sctool.core.data.prompts import PromptRule
from sctool.core.data.sources import open_source


class Encoders:
    """Stands for a backbone: 4x pooled pictures as latents, letter counts as text; counts what it is asked."""

    vae_scale, latent_channels = 4, 3

    def __init__(self, latents_id=("v", "torch.float32"), conditioning_id=("t", "torch.float32"), die_after=None):
        self.latents_id, self.conditioning_id, self.die_after = latents_id, conditioning_id, die_after
        self.pictures, self.captions = 0, []

    def encode_images(self, pixels):
        assert pixels.dtype == torch.float32
        assert -1 <= pixels.min() <= pixels.max() <= 1
        if self.die_after is not None and self.pictures >= self.die_after:
            raise KeyboardInterrupt
        self.pictures += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels, 4)
        return mean, mean.abs()

    def encode_prompts(self, captions):
        self.captions += captions
        rows = torch.tensor([[len(c), c.count("a")] for c in captions], dtype=torch.float32)
        return {"prompt_embeds": rows[:, :, None].repeat(1, 1, 4), "pooled": rows}

    def too_long(self, prompt):
        return len(prompt) > 24


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Twelve pictures with canny and mask maps; chunks of 4 rows."""
    monkeypatch.setattr(cache_module, "CHUNK", 4)
    monkeypatch.setattr(prepared_module, "CHUNK", 4)
    root = tmp_path / "set"
    for name in ("", "canny", "mask"):
        (root / name).mkdir(exist_ok=True, parents=True)
    rng = np.random.default_rng(0)
    for i in range(12):
        image = cv2.resize(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8), (48, 32))
        cv2.imwrite(str(root / f"{i:02d}.png"), image)
        cv2.imwrite(str(root / f"canny/{i:02d}.png"), (rng.random((32, 48)) > 0.5) * np.uint8(255))
        cv2.imwrite(str(root / f"mask/{i:02d}.png"), np.eye(32, 48, dtype=np.uint8) * 255)
        (root / f"{i:02d}.txt").write_text(f"a photo of number {i % 3}")
    return root


def ready(folder, encoders=None, **options):
    encoders = encoders or Encoders()
    options = {"size": 16, "cache": folder.parent / "cache", "batch": 3} | options
    return prepare(open_source(folder), encoders, **options), encoders


def test_items_are_what_the_encoders_gave(folder):
    data, encoders = ready(folder, conds=("canny", "mask"), flip=True, prompt=PromptRule("<sce>"))
    assert len(data) == 24
    assert encoders.pictures == 24
    assert sorted(encoders.captions) == ["", *(f"<sce> a photo of number {i}" for i in range(3))]
    for i in (0, 5, 12 + 5):
        item = data[i]
        pixels = Geometry(16).apply(decode_rgb((folder / f"{i % 12:02d}.png").read_bytes()), flip=i >= 12)
        pixels = torch.from_numpy(pixels).permute(2, 0, 1)
        expected = torch.nn.functional.avg_pool2d(pixels[None].float() / 127.5 - 1, 4)[0]
        assert torch.equal(item["mean"], expected)
        assert torch.equal(item["std"], expected.abs())
        assert torch.equal(data.image(i), pixels)
        assert item["caption"] == f"<sce> a photo of number {i % 3}"
        assert item["text"]["pooled"].tolist() == [25, 1]
        assert item["text"]["prompt_embeds"].shape == (2, 4)
        assert item["hints"]["canny"].shape == item["hints"]["mask"].shape == (3, 16, 16)
        assert item["hints"]["canny"].dtype == torch.uint8
        hole = item["hints"]["mask"].sum(0) == 0
        assert hole.any()
        assert torch.equal(item["hints"]["mask"][:, ~hole], pixels[:, ~hole])
    assert torch.equal(data[17]["hints"]["canny"], data[5]["hints"]["canny"].flip(-1))
    assert data.null_rows["pooled"].tolist() == [0, 0]
    assert data.bytes_on_disk == sum(path.stat().st_size for path in (folder.parent / "cache").rglob("*.safetensors"))


def test_second_run_encodes_nothing_and_is_equal(folder):
    first, _ = ready(folder, conds=("canny",))
    second, encoders = ready(folder, conds=("canny",))
    assert (encoders.pictures, encoders.captions) == (0, [])
    loader = torch.utils.data.DataLoader(pickle.loads(pickle.dumps(second)), batch_size=5)
    means = torch.cat([batch["mean"] for batch in loader])
    assert torch.equal(means, torch.stack([first[i]["mean"] for i in range(12)]))


def test_a_changed_picture_recomputes_itself_only(folder):
    ready(folder)
    cv2.imwrite(str(folder / "07.png"), np.full((32, 48, 3), 200, np.uint8))
    (folder / "08.txt").write_text("another caption")
    (folder / "09.png").rename(folder / "99.png")
    data, encoders = ready(folder)
    assert encoders.pictures == 1
    assert encoders.captions == ["another caption"]
    changed = next(item for item in (data[i] for i in range(12)) if item["key"] == "07")
    assert torch.allclose(changed["mean"], torch.full((3, 4, 4), 200 / 127.5 - 1))


@pytest.mark.parametrize("change", [{"size": 20}, {"flip": True}, {"encoders": Encoders(("other", "torch.float32"))}])
def test_key_holds_geometry_flip_and_weights(folder, change):
    ready(folder)
    encoders = copy.copy(change.get("encoders")) or Encoders()
    ready(folder, encoders, **{k: v for k, v in change.items() if k != "encoders"})
    assert encoders.pictures == 12
    assert not encoders.captions
    other = Encoders(conditioning_id=("other", "torch.float32"))
    ready(folder, other)
    assert other.pictures == 0
    assert len(other.captions) == 4


def test_key_holds_the_precision(folder):
    ready(folder)
    encoders = Encoders(("v", "torch.float16"))
    ready(folder, encoders)
    assert encoders.pictures == 12


def test_killed_run_loses_one_chunk(folder):
    with pytest.raises(KeyboardInterrupt):
        ready(folder, Encoders(die_after=7))
    data, encoders = ready(folder)
    assert encoders.pictures == 8
    fresh, _ = ready(folder, cache=folder.parent / "other")
    assert all(torch.equal(data[i]["mean"], fresh[i]["mean"]) for i in range(12))
    names = [sorted(p.name for p in (folder.parent / c).rglob("*.safetensors")) for c in ("cache", "other")]
    assert names[0] == names[1]


def test_damaged_chunk_is_noticed_and_written_again(folder):
    first, _ = ready(folder)
    expected = [first[i]["mean"].clone() for i in range(12)]
    one, two, three = sorted((folder.parent / "cache/latents").rglob("*.safetensors"))
    del first
    one.write_bytes(one.read_bytes()[:-10])
    two.write_bytes(b"garbage")
    three.write_bytes(b"")
    data, encoders = ready(folder)
    assert encoders.pictures == 12
    assert all(torch.equal(data[i]["mean"], expected[i]) for i in range(12))


def test_bad_records_are_left_out_listed_and_never_cached(folder):
    (folder / "03.png").write_bytes(b"words")
    cv2.imwrite(str(folder / "04.png"), np.zeros((1, 1, 3), np.uint8))
    (folder / "canny/05.png").unlink()
    (folder / "canny/06.png").write_bytes(b"words")
    lines = []
    data, _ = ready(folder, conds=("canny",), flip=True, progress=lines.append)
    assert len(data) == 16
    assert {(f.where, f.reason.split(";")[0]) for f in data.faults} == {
        ("03.png", "is not an image, whatever its name says"),
        ("04.png", "is 1x1 pixels, smaller than 8 on a side"),
        ("05.png", "has no canny map"),
        ("06.png", "its canny map canny/06.png is not an image, whatever its name says"),
    }
    assert [record.key for record in data.records] == ["00", "01", "02", "07", "08", "09", "10", "11"]
    assert lines[-1].startswith("4 images left out")
    again, encoders = ready(folder, conds=("canny",), flip=True)
    assert (len(again), len(again.faults), encoders.pictures) == (16, 4, 0)
    (folder / "03.png").write_bytes((folder / "00.png").read_bytes())
    assert len(ready(folder, conds=("canny",))[0]) == 9


def test_plan_tells_what_is_missing(folder):
    before = cache_plan(open_source(folder), Encoders(), size=16, cache=folder.parent / "cache")
    assert (before["pictures_to_encode"], before["captions_to_encode"]) == (12, 4)
    assert before["bytes_to_add"] == before["bytes"] == 12 * (2 * 3 * 16 * 4 + 8) + 4 * (8 + 2) * 4
    assert not (folder.parent / "cache").exists()
    ready(folder)
    after = cache_plan(open_source(folder), Encoders(), size=16, cache=folder.parent / "cache")
    assert (after["pictures_to_encode"], after["captions_to_encode"], after["bytes_to_add"]) == (0, 0, 0)


def test_missing_captions_and_one_map_for_whichever_condition(folder):
    (folder / "00.txt").unlink()
    data, _ = ready(folder, prompt=PromptRule("<sce>"))
    assert data[0]["caption"] == "<sce>"
    records = open_source(folder).records
    nameless = [type(r)(r.key, r.image, r.text, {"conditioning_image": r.maps["canny"]}) for r in records]
    cache = folder.parent / "cache"
    assert len(prepare(nameless, Encoders(), size=16, conds=("depth",), cache=cache)) == 12
    assert len(prepare(nameless, Encoders(), size=16, conds=("depth", "canny"), cache=cache)) == 0
