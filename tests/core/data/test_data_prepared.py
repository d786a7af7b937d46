"""The cache is keyed by content, goes on after a kill, and serves what the encoders gave."""

import copy
import hashlib
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sctool.core.data import cache as cache_module
from sctool.core.data import prepared as prepared_module
from sctool.core.data.cache import Memo, TensorCache, cache_folder
from sctool.core.data.conditions import condition
from sctool.core.data.images import Geometry, decode_rgb
from sctool.core.data.prepared import cache_plan, prepare
from sctool.core.data.prompts import PromptRule, caption_of
from sctool.core.data.records import BytesBlob, FileBlob
from sctool.core.data.sources import open_source
from sctool.core.errors import SctoolError


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
    assert sorted(set(encoders.captions)) == ["", *(f"<sce> a photo of number {i}" for i in range(3))]
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
    assert len(other.captions) == 5  # the empty one also to see how large a row is


def test_key_holds_the_precision(folder):
    ready(folder)
    encoders = Encoders(("v", "torch.float16"))
    ready(folder, encoders)
    assert encoders.pictures == 12


def test_caches_on_disk_stay_valid(folder):
    """Folder names and row keys of the first release; another rule would encode every set again."""

    def key(*parts):
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    ready(folder, Encoders(("v", "torch.float32"), ("t", "torch.float16")), flip=True)
    cache = folder.parent / "cache"
    latents = TensorCache(cache / "latents" / key("short-centre-area-cubic-16", "v", "torch.float32")[:24])
    digests = [hashlib.sha256((folder / f"{i:02d}.png").read_bytes()).hexdigest() for i in range(12)]
    assert sorted(latents.places) == sorted(digests + [f"{digest}-mirrored" for digest in digests])
    texts = TensorCache(cache / "text" / key("t", "torch.float16")[:24])
    captions = ["", *(f"a photo of number {i}" for i in range(3))]
    assert set(texts.places) == {key("caption", caption) for caption in captions}
    assert {path.stem for path in texts.folder.iterdir()} == {key(*texts.places)[:40]}
    assert latents.read(digests[0])["shape"].tolist() == [32, 48]
    (memo,) = (cache / "memo").iterdir()
    assert memo.stem == key(str(folder))[:24]


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
    assert (before["images_to_encode"], before["captions_to_encode"]) == (12, 4)
    assert before["bytes_to_add"] == before["bytes"] == 12 * (2 * 3 * 16 * 4 + 8) + 4 * (8 + 2) * 4
    assert not (folder.parent / "cache").exists()
    ready(folder)
    after = cache_plan(open_source(folder), Encoders(), size=16, cache=folder.parent / "cache")
    assert (after["images_to_encode"], after["captions_to_encode"], after["bytes_to_add"]) == (0, 0, 0)


def test_missing_captions_and_one_map_for_whichever_condition(folder):
    (folder / "00.txt").unlink()
    data, _ = ready(folder, prompt=PromptRule("<sce>"))
    assert data[0]["caption"] == "<sce>"
    records = open_source(folder).records
    nameless = [type(r)(r.key, r.image, r.text, {"conditioning_image": r.maps["canny"]}) for r in records]
    cache = folder.parent / "cache"
    assert len(prepare(nameless, Encoders(), size=16, conds=("depth",), cache=cache)) == 12
    assert len(prepare(nameless, Encoders(), size=16, conds=("depth", "canny"), cache=cache)) == 0


def test_hints_are_kept_up_to_a_limit(folder, monkeypatch):
    monkeypatch.setattr(prepared_module, "HINT_MEMORY", 3 * 16 * 16)
    data, _ = ready(folder, conds=("canny",))
    hints = [data[i]["hints"]["canny"] for i in range(12)]
    assert sorted(data._maps) == [(i, "canny") for i in range(3)]
    assert all(torch.equal(data[i]["hints"]["canny"], hint) for i, hint in enumerate(hints))
    assert not pickle.loads(pickle.dumps(data))._maps


def test_class_ids_are_not_averaged(folder):
    (folder / "seg").mkdir()
    ids = np.random.default_rng(1).integers(0, 150, (32, 48), dtype=np.uint8)
    for i in range(12):
        cv2.imwrite(str(folder / f"seg/{i:02d}.png"), ids)
    data, _ = ready(folder, conds=("seg",))
    nearest = Geometry(16).apply_map(ids, (32, 48), names=True)
    expected = condition("seg").render(nearest, nearest)
    assert np.array_equal(data[0]["hints"]["seg"].permute(1, 2, 0), expected)


def test_cut_captions_are_counted_once(folder):
    for i in range(3):
        (folder / f"{i:02d}.txt").write_text("a caption of more letters than are read")
    (folder / "03.txt").write_text("another caption of more letters than are read")
    (folder / "04.txt").unlink()
    lines = []
    ready(folder, flip=True, progress=lines.append)
    line = "2 of 5 captions (4 images) are longer than the text encoder reads; the rest of each is ignored"
    assert [text for text in lines if "longer" in text] == [line]
    records = open_source(folder).records
    labelled = [replace(record, label="dog") for record in records]
    counts = {"captions_from_labels": 0, "captions_empty": 1, "captions_too_long": 2}
    for rows, prompt, changes in (
        (records, caption_of, {}),
        (labelled, caption_of, {}),
        (labelled, PromptRule(template="a {label}"), {"captions_from_labels": 1, "captions_empty": 0}),
        (labelled, PromptRule(template="a {label} that is not cut" * 2), {
            "captions_from_labels": 1, "captions_empty": 0, "captions_too_long": 3}),
    ):  # fmt: skip
        figures = cache_plan(rows, Encoders(), size=16, flip=True, cache=folder.parent / "cache", prompt=prompt)
        assert counts | changes == {key: figures[key] for key in counts}
    lines.clear()
    (folder / "05.txt").write_text("short")
    prepare(open_source(folder).records[4:], Encoders(), size=16, cache=folder.parent / "c", progress=lines.append)
    assert not any("longer" in text for text in lines)


def test_plan_encodes_nothing_when_a_caption_is_cached(folder):
    cold, warm = Encoders(), Encoders()
    options = {"size": 16, "cache": folder.parent / "cache"}
    first = cache_plan(open_source(folder), cold, **options)
    assert (cold.pictures, cold.captions) == (0, [""])
    ready(folder)
    second = cache_plan(open_source(folder), warm, **options)
    assert (warm.pictures, warm.captions) == (0, [])
    assert second["bytes"] == first["bytes"]


def test_plan_counts_mirror_images_and_what_is_left_out(folder):
    (folder / "canny/05.png").unlink()
    figures = cache_plan(open_source(folder), Encoders(), size=20, conds=["canny"], flip=True, cache=folder / "c")
    assert (figures["images"], figures["left_out"]) == (22, 1)
    assert figures["bytes"] == 22 * (2 * 3 * 25 * 4 + 8) + 4 * (8 + 2) * 4


def test_unchanged_maps_are_decoded_once(folder, monkeypatch):
    decoded, decode = [], prepared_module.decode_map
    monkeypatch.setattr(prepared_module, "decode_map", lambda blob: decoded.append(blob.name) or decode(blob))
    ready(folder, conds=("canny",))
    assert len(decoded) == 12
    prepare(open_source(folder).records[3:7], Encoders(), size=20, conds=["canny"], cache=folder.parent / "cache")
    assert len(decoded) == 12
    cv2.imwrite(str(folder / "canny/04.png"), np.zeros((32, 48), np.uint8))
    ready(folder, conds=("canny",))
    assert decoded[12:] == ["canny/04.png"]
    (memo,) = (folder.parent / "cache/memo").iterdir()
    memo.unlink()
    ready(folder, conds=("canny",))
    assert memo.is_file(), "learned without encoding anything"


def test_faults_are_shown(folder):
    for i in range(4):
        (folder / f"{i:02d}.png").write_bytes(b"words")
    lines = []
    ready(folder, progress=lines.append)
    reasons = "; ".join(f"{i:02d}.png: is not an image, whatever its name says" for i in range(3))
    assert lines[-1] == f"4 images left out: {reasons} …"


def test_long_work_is_reported(folder):
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text(f"number {i}")
    lines = []
    ready(folder, progress=lines.append)
    images = [f"encoding images: {i} of 12" for i in (0, 4, 8)]
    assert lines == [*images, *(f"encoding captions: {i} of 13" for i in (0, 4, 8, 12))]


# ------------------------------------------------------------------------------------------------- cache and memo


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SCTOOL_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "sctool"
    monkeypatch.setenv("SCTOOL_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"
    assert cache_folder("given") == Path("given")


def test_rows_are_read_from_the_first_file_that_has_them(tmp_path):
    for name, value in (("b", 2.0), ("a", 1.0), ("c", 3.0)):
        cache = TensorCache(tmp_path / name)
        cache.write(["x", "y"], {"row": torch.full((2, 1), value)})
        (path,) = (tmp_path / name).iterdir()
        path.rename(tmp_path / f"{name}.safetensors")
    both = TensorCache(tmp_path)
    assert both.read("x")["row"].item() == 1
    assert both.missing(["y", "z", "x", "z", "w"]) == ["z", "w"]
    assert both.bytes(["x", "y", "z"]) == (tmp_path / "a.safetensors").stat().st_size
    save_file({"row": torch.zeros(1, 1)}, tmp_path / "f.safetensors", {"keys": '["z"]', "format": "another"})
    save_file({"row": torch.zeros(2, 1)}, tmp_path / "d.safetensors", {"keys": '["z"]', "format": "sctool-rows-1"})
    assert TensorCache(tmp_path).missing(["z"]) == ["z"]
    save_file({"row": torch.zeros(1, 1)}, tmp_path / "e.safetensors", {"keys": '["z"]', "format": "sctool-rows-1"})
    assert TensorCache(tmp_path).missing(["z"]) == []


def test_a_row_written_again_is_read_anew(tmp_path):
    cache = TensorCache(tmp_path)
    for value in (1.0, 2.0):
        cache.write(["x"], {"row": torch.full((1, 1), value)})
        assert cache.read("x")["row"].item() == value


def test_memo_asks_again_only_for_changed_files(tmp_path):
    asked = []

    def look(memo, blob, what="map"):
        def compute():
            asked.append(what)
            return f"answer {len(asked)}"

        return memo.recall(what, blob, compute)

    file = tmp_path / "a.png"
    file.write_bytes(b"one")
    one, two = Memo(tmp_path / "memo.json"), Memo(tmp_path / "memo.json")
    assert [look(one, FileBlob(file)) for _ in range(2)] == ["answer 1", "answer 1"]
    assert look(one, FileBlob(file), "digest") == "answer 2"
    one.save()
    assert look(two, BytesBlob(b"in memory")) == "answer 3", "bytes in memory have no time of change"
    assert look(two, FileBlob(file), "other") == "answer 4"
    two.save()
    merged = Memo(tmp_path / "memo.json")
    assert [look(merged, FileBlob(file), what) for what in ("map", "digest", "other")] == [
        "answer 1", "answer 2", "answer 4",
    ]  # fmt: skip
    os.utime(file, ns=(1, 1))
    assert look(merged, FileBlob(file)) == "answer 5"
    file.write_bytes(b"longer")
    os.utime(file, ns=(1, 1))
    assert look(merged, FileBlob(file)) == "answer 6"
    for text in ("[1]", "{", ""):
        (tmp_path / "memo.json").write_text(text)
        assert Memo(tmp_path / "memo.json").known == {}


def test_a_disk_with_too_little_room_is_refused_before_anything_is_encoded(folder, monkeypatch):
    plan = cache_plan(open_source(folder), Encoders(), size=16, cache=folder.parent / "cache")
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=plan["bytes_to_add"] - 1))
    encoders = Encoders()
    with pytest.raises(
        SctoolError, match=r"the cache needs .* and .* are free there\. Free some space, or set SCTOOL_CACHE"
    ):
        ready(folder, encoders)
    assert encoders.pictures == 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=plan["bytes_to_add"]))
    assert len(ready(folder, encoders)[0]) == 12
