"""`sctool prepare`: always the same bytes, the items that the cache serves, and one clear message for each fault."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from sctool.annotators.preparing.run import prepare_set
from sctool.annotators.training_sets import open_training_sets
from sctool.core.backbones.loading import load_backbone
from sctool.core.config import PrepareConfig, TrainConfig
from sctool.core.data.prepared import prepare
from sctool.core.data.prompts import PromptRule
from sctool.core.data.sources import open_source
from sctool.core.data.streaming.folder import PreparedFolder
from sctool.core.data.streaming.layout import is_prepared
from sctool.core.errors import SctoolError, UsageError
from sctool.core.training.setup import stream
from sctool.core.training.splits import split_records

PHOTO = data.coffee()


def shards_of(path: Path, shards: int = 3, each: int = 5, side: int = 48, split: bool = False) -> Path:
    """Shards as img2dataset writes them; every caption occurs in several images."""
    path.mkdir(parents=True)
    for s in range(shards):
        with tarfile.open(path / f"{s:05d}.tar", "w") as tar:
            for i in range(each):
                y, x = (s * 31 + i * 7) % (400 - side), (i * 53) % (600 - side)
                buffer = io.BytesIO()
                Image.fromarray(PHOTO[y : y + side, x : x + side]).save(buffer, "PNG")
                meta = {"split": "validation"} if split and i % 5 == 4 else {}
                for suffix, content in (
                    (".png", buffer.getvalue()),
                    (".txt", f"cup {i % 3}".encode()),
                    (".json", json.dumps(meta).encode()),
                ):
                    info = tarfile.TarInfo(f"{s:05d}{i:04d}{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return path


def go(src: Path | str, out: Path, base: Path | str, **more) -> dict:
    return prepare_set(PrepareConfig(**{"src": str(src), "out": str(out), "base": str(base), "jobs": 1, **more}))


def tree(path: Path) -> dict[str, bytes]:
    """All files but the lock and the settings, which name the source."""
    hidden = ("lock", "settings.json")
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name not in hidden
    }


def run_config(folder: Path, base: Path | str, **more) -> TrainConfig:
    return TrainConfig(**{"data": str(folder), "base": str(base), **more})


def served(folder: Path, base: Path, **more):
    """The training and the held-out set of a prepared folder, as training opens them."""
    config = run_config(folder, base, size=32, **more)
    source, held_out, _ = open_training_sets(config, 32, quiet=True)
    training, validation = split_records(source, held_out, config)
    backbone = load_backbone(str(base))
    return stream(training, backbone, config, config.flip), stream(validation, backbone, config, False)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Three shards of five images with canny and mask, one in five marked for validation."""
    folder = tmp_path_factory.mktemp("prepared")
    src = shards_of(folder / "src", split=True)
    go(src, folder / "out", tiny_base, cond=("canny", "mask"))
    return folder / "out"


# ------------------------------------------------------------------------------------------------- the same bytes


def test_parts_of_an_array_job_write_the_same_bytes(tmp_path, tiny_base, prepared):
    src = prepared.parent / "src"
    words = {"cond": ("canny", "mask")}
    parts = [go(src, tmp_path / "parts", tiny_base, shards=f"{k}/3", **words) for k in (3, 1, 2)]
    assert [part["whole"] for part in parts] == [False, False, True]
    assert tree(tmp_path / "parts") == tree(prepared)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_write_the_same_bytes(tmp_path, tiny_base, prepared):
    go(prepared.parent / "src", tmp_path / "two", tiny_base, cond=("canny", "mask"), jobs=2)
    assert tree(tmp_path / "two") == tree(prepared)


def test_threads_do_not_change_the_bytes(tmp_path, tiny_base, prepared, monkeypatch):
    """The way of a GPU: images are decoded ahead by threads."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("sctool.annotators.preparing.worker.nullcontext", lambda: ThreadPoolExecutor(4))
    go(prepared.parent / "src", tmp_path / "threads", tiny_base, cond=("canny", "mask"))
    assert tree(tmp_path / "threads") == tree(prepared)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_a_ray_cluster_writes_the_same_bytes(tmp_path, tiny_base, prepared):
    go(prepared.parent / "src", tmp_path / "ray", tiny_base, cond=("canny", "mask"), ray="local")
    assert tree(tmp_path / "ray") == tree(prepared)


def test_a_set_annotated_before_gives_the_same_maps(tmp_path, tiny_base, prepared):
    from sctool.annotators.engine.run import annotate
    from sctool.core.config import AnnotateConfig

    src, out = prepared.parent / "src", tmp_path / "annotated"
    annotate(AnnotateConfig(src=str(src), cond=("canny",), size="crop:32", out=str(out)))
    go(out, tmp_path / "from-maps", tiny_base, cond=("canny",))
    go(src, tmp_path / "made-here", tiny_base, cond=("canny",))
    for i in range(3):
        one, two = (PreparedFolder(tmp_path / name).everything[i].maps["canny"] for name in ("from-maps", "made-here"))
        assert one.read() == two.read()
    maps = tmp_path / "maps"
    annotate(AnnotateConfig(src=str(src), cond=("canny",), layout="maps", out=str(maps)))
    assert go(src, tmp_path / "beside", tiny_base, cond=("canny",), maps=str(maps))["images"] == 15


def test_a_finished_shard_is_not_done_again_and_a_changed_one_is(tmp_path, tiny_base):
    src = shards_of(tmp_path / "src")
    go(src, tmp_path / "out", tiny_base)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert go(src, tmp_path / "out", tiny_base)["skipped"] == 15
    shutil.rmtree(src)
    shards_of(src, each=4)
    go(src, tmp_path / "out", tiny_base)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert all(after[name] != before[name] for name in before)
    assert PreparedFolder(tmp_path / "out").manifest.count("train") == 12
    (src / "00002.tar").unlink()
    assert go(src, tmp_path / "out", tiny_base)["skipped"] == 8
    assert not (tmp_path / "out/00002.tar").exists()
    assert not (tmp_path / "out/00002.index.safetensors").exists()


def test_other_libraries_read_the_shards(prepared):
    from datasets import load_dataset

    tars = [str(path) for path in sorted(prepared.glob("*.tar"))]
    rows = load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True)
    first = next(iter(rows))
    assert np.asarray(first["latents.npy"]).shape == (2, 4, 8, 8)
    assert first["json"]["text"] == "cup 0"
    assert first["canny.png"].size == (32, 32)


# ------------------------------------------------------------------------------------------------- the same items


def test_the_items_are_those_of_the_cache(tmp_path, tiny_base, edges):
    go(edges, tmp_path / "out", tiny_base, cond=("canny",))
    training, held_out = served(tmp_path / "out", tiny_base, cond=("canny",))
    backbone = load_backbone(str(tiny_base))
    config = run_config(edges, tiny_base, cond=("canny",))
    for ours, records in zip((training, held_out), split_records(open_source(edges), None, config), strict=True):
        theirs = prepare(records, backbone, size=32, conds=("canny",), cache=tmp_path / "cache", prompt=PromptRule())
        assert len(ours) == len(theirs) > 0
        for i in range(len(ours)):
            one, two = ours[i], theirs[i]
            assert (one["key"], one["caption"]) == (two["key"], two["caption"])
            for name in ("mean", "std"):
                torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(one["text"], two["text"], rtol=1e-5, atol=1e-6)
            assert torch.equal(one["hints"]["canny"], two["hints"]["canny"])
        torch.testing.assert_close(ours.null_rows, theirs.null_rows)


@pytest.mark.parametrize("cond", ["mask", "color", "outpaint"])
def test_hints_are_those_that_an_image_folder_gives(tmp_path, tiny_base, pictures, cond):
    from sctool.annotators.engine.ondemand import ensure_maps

    go(pictures, tmp_path / "out", tiny_base, cond=(cond,))
    training, _ = served(tmp_path / "out", tiny_base, cond=(cond,))
    config = run_config(pictures, tiny_base, cond=(cond,))
    source, _ = ensure_maps(open_source(pictures), [cond], 32, cache=tmp_path / "cache")
    records = split_records(source, None, config)[0]
    theirs = prepare(records, load_backbone(str(tiny_base)), size=32, conds=(cond,), cache=tmp_path / "cache")
    for i in range(len(theirs)):
        assert torch.equal(training[i]["hints"][cond], theirs[i]["hints"][cond])


@pytest.mark.parametrize("shape", [(32, 32), (5, 13), (64, 8)])
def test_one_bit_maps_are_read_as_opencv_reads_them(shape):
    from sctool.annotators.engine.maps import encode_png
    from sctool.core.data.streaming.reading import one_bit

    map = (np.random.default_rng(0).random(shape) < 0.3).astype(np.uint8) * 255
    assert np.array_equal(one_bit(bytearray(encode_png(map, bilevel=True))), map)  # pyright: ignore
    assert one_bit(bytearray(encode_png(map))) is None
    assert one_bit(bytearray(encode_png(map, bilevel=True)[:-9])) is None
    buffer = io.BytesIO()
    Image.fromarray(map).convert("1").save(buffer, "PNG")
    others = one_bit(bytearray(buffer.getvalue()))
    assert others is None or np.array_equal(others, map)


def test_mirror_images_belong_to_their_images(tmp_path, tiny_base, edges):
    go(edges, tmp_path / "out", tiny_base, cond=("canny",), flip=True)
    plain, held_out = served(tmp_path / "out", tiny_base, cond=("canny",))
    both, _ = served(tmp_path / "out", tiny_base, cond=("canny",), flip=True)
    assert (len(plain), len(both), len(held_out)) == (9, 18, 3)
    config = run_config(edges, tiny_base, cond=("canny",), flip=True)
    records = split_records(open_source(edges), None, config)[0]
    theirs = prepare(
        records, load_backbone(str(tiny_base)), size=32, conds=("canny",), flip=True, cache=tmp_path / "cache"
    )
    by_row = {(item["key"], item["mean"].numpy().round(3).tobytes()) for item in (theirs[i] for i in range(18))}
    assert {(item["key"], item["mean"].numpy().round(3).tobytes()) for item in (both[i] for i in range(18))} == by_row


def test_equal_captions_are_stored_once_a_shard(prepared):
    folder = PreparedFolder(prepared)
    entries = [folder.shards[0].entry(row) for row in range(5)]
    assert sorted({entry[3] for entry in entries}) == [0, 1, 2]
    assert json.loads((prepared / "00000_stats.json").read_text())["captions"] == 3


@pytest.mark.parametrize(("dtype", "least"), [("bf16", 45), ("fp16", 60)])
def test_sixteen_bits_halve_the_set_and_the_error_is_said(tmp_path, tiny_base, dtype, least):
    src = shards_of(tmp_path / "src", 1)
    exact = go(src, tmp_path / "fp32", tiny_base)
    short = go(src, tmp_path / dtype, tiny_base, dtype=dtype)
    assert short["bytes"] < exact["bytes"]
    one, two = (served(tmp_path / name, tiny_base)[0] for name in ("fp32", dtype))
    ours = torch.stack([torch.stack([two[i]["mean"], two[i]["std"]]) for i in range(len(two))]).double()
    true = torch.stack([torch.stack([one[i]["mean"], one[i]["std"]]) for i in range(len(one))]).double()
    error = 10 * torch.log10(true.square().sum() / (true - ours).square().sum())
    assert error > least
    assert abs(short["error_db"]["latents"] - float(error)) < 3  # the set says it over all rows, held-out ones too
    assert exact["error_db"] == {}


def test_numbers_that_do_not_fit_into_fp16_leave_the_image_out(tmp_path, tiny_base, monkeypatch):
    from sctool.core.backbones.loading import Backbone

    encode = Backbone.encode_images

    def too_large(self, pixels):
        mean, std = encode(self, pixels)
        return mean * torch.where(torch.arange(len(mean)) == 1, 1e9, 1.0).view(-1, 1, 1, 1), std

    monkeypatch.setattr(Backbone, "encode_images", too_large)
    summary = go(shards_of(tmp_path / "src", 1), tmp_path / "out", tiny_base, dtype="fp16")
    assert (summary["images"], summary["failed"]) == (4, 1)
    assert "do not fit into fp16; use --dtype bf16" in (tmp_path / "out/errors.jsonl").read_text()


# ----------------------------------------------------------------------------------------------- what may go wrong


def test_a_bad_image_is_listed_and_left_out(tmp_path, tiny_base):
    src = shards_of(tmp_path / "src", 2, 3)
    with tarfile.open(src / "00001.tar", "a") as tar:
        info = tarfile.TarInfo("000010009.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"text"))
    summary = go(src, tmp_path / "out", tiny_base)
    assert (summary["images"], summary["failed"]) == (6, 1)
    assert "000010009.jpg" in (tmp_path / "out/errors.jsonl").read_text()
    with pytest.raises(SctoolError, match="1 of 7 images could not be used"):
        go(src, tmp_path / "out", tiny_base, strict=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_costs_its_shard_and_not_the_run(tmp_path, tiny_base, prepared, capfd):
    out, ended, killed = tmp_path / "out", threading.Event(), list[int]()

    def kill_one() -> None:
        """Kills the first worker that is in the middle of a shard."""
        while not ended.is_set() and not killed:
            for pid in children(os.getpid()):
                if any_part(out, pid):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return
            time.sleep(0.002)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        go(prepared.parent / "src", out, tiny_base, cond=("canny", "mask"), jobs=2)
    finally:
        ended.set()
        killer.join()
    assert killed
    assert "a worker process died at 0000" in capfd.readouterr().err
    assert tree(out) == tree(prepared)


def children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found.append(int(status.parent.name))
    return found


def any_part(out: Path, pid: int) -> bool:
    return any(f".{pid}.part" in path.name for path in out.glob(".*.part"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_disk_leaves_finished_shards_and_no_part_of_a_file(tmp_path, tiny_base):
    src = shards_of(tmp_path / "src", 1, 2)
    shards_of(tmp_path / "more", 1, 40)
    shutil.move(tmp_path / "more/00000.tar", src / "00001.tar")
    limit = 80_000  # bytes of a file; the second shard needs more
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); from sctool.cli import run; import sys; "
        f"sys.exit(run(['prepare', {str(src)!r}, '--base', {str(tiny_base)!r}, '--out', {str(tmp_path / 'out')!r}, "
        "'-j', '1', '--quiet']))"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failed.returncode == 1, failed.stderr
    assert "free some space or choose another folder, then run the same command again" in failed.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name != ".sctool") == [
        "00000.index.safetensors", "00000.tar", "00000_stats.json",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="is not finished: 1 shards are prepared"):
        PreparedFolder(tmp_path / "out")
    assert go(src, tmp_path / "out", tiny_base)["skipped"] == 2


def test_too_little_room_is_refused_before_anything_is_written(tmp_path, tiny_base, monkeypatch):
    src = shards_of(tmp_path / "src")
    said: list[str] = []
    plan = prepare_set(
        PrepareConfig(src=str(src), out=str(tmp_path / "out"), base=str(tiny_base), jobs=1), dry_run=True
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan["bytes"] - 1))
    with pytest.raises(SctoolError, match=r"preparing needs .* MB in .*, and .* are free there.*--dtype bf16"):
        prepare_set(
            PrepareConfig(src=str(src), out=str(tmp_path / "out"), base=str(tiny_base), jobs=1), say=said.append
        )
    assert "about 15 images still to prepare" in said[0]
    assert not list((tmp_path / "out").glob("*.tar"))


def test_the_plan_is_close_to_what_is_written(tmp_path, tiny_base):
    src = shards_of(tmp_path / "src", 3, 40)
    config = PrepareConfig(src=str(src), out=str(tmp_path / "out"), base=str(tiny_base), cond=("canny", "mask"), jobs=1)
    plan = prepare_set(config, dry_run=True)
    assert not (tmp_path / "out").exists()
    written = prepare_set(config)["bytes"]
    assert 0.9 < plan["bytes"] / written < 1.3


def test_settings_are_not_mixed_in_a_folder(tmp_path, tiny_base):
    src = shards_of(tmp_path / "src", 1, 2)
    go(src, tmp_path / "out", tiny_base)
    with pytest.raises(UsageError, match='was made with dtype = "fp32", now it is "bf16"'):
        go(src, tmp_path / "out", tiny_base, dtype="bf16")


def test_maps_made_with_other_settings_are_refused(tmp_path, tiny_base):
    from sctool.annotators.engine.run import annotate
    from sctool.core.config import AnnotateConfig

    src = shards_of(tmp_path / "src", 1, 2)
    annotate(AnnotateConfig(src=str(src), cond=("canny",), out=str(tmp_path / "annotated")))
    with pytest.raises(UsageError, match=r"--cond canny:low=50 does not fit .* were made with low=100"):
        go(tmp_path / "annotated", tmp_path / "out", tiny_base, cond=("canny:low=50",))


@pytest.mark.parametrize("name", ["00001.tar", "00001.index.safetensors"])
@pytest.mark.parametrize("fault", ["cut off", "missing", "changed after"])
def test_damaged_shards_are_named_before_training(tmp_path, prepared, name, fault):
    shutil.copytree(prepared, tmp_path / "out")
    file = tmp_path / "out" / name
    data = file.read_bytes()
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-700] if fault == "cut off" else data + b"x")
    with pytest.raises(SctoolError, match=f"{name} .*{fault}.*Run the same sctool prepare again"):
        PreparedFolder(tmp_path / "out")


def test_an_index_of_another_preparation_is_noticed(tmp_path, tiny_base, prepared):
    shutil.copytree(prepared, tmp_path / "out")
    go(prepared.parent / "src", tmp_path / "plain", tiny_base, cond=("canny", "mask"), batch=2, seed=1)
    shutil.copy(tmp_path / "plain/00000.index.safetensors", tmp_path / "out/00000.index.safetensors")
    manifest = json.loads((tmp_path / "out/prepared.json").read_text())
    manifest["shards"][0]["index_bytes"] = (tmp_path / "out/00000.index.safetensors").stat().st_size
    manifest["shards"][0]["tar_bytes"] += 512
    with open(tmp_path / "out/00000.tar", "ab") as tar:
        tar.write(bytes(512))
    (tmp_path / "out/prepared.json").write_text(json.dumps(manifest))
    with pytest.raises(SctoolError, match=r"00000\.index\.safetensors does not belong to its tar"):
        PreparedFolder(tmp_path / "out").everything[0]


def test_a_preparation_that_was_interrupted_is_no_set_yet(tmp_path, tiny_base, prepared):
    go(prepared.parent / "src", tmp_path / "out", tiny_base, shards="1/3")
    assert is_prepared(tmp_path / "out")
    with pytest.raises(UsageError, match="is not finished: 1 shards are prepared"):
        open_training_sets(run_config(tmp_path / "out", tiny_base), 32, quiet=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cond": ("depth",)}, "was prepared for canny, mask, and has no depth maps"),
        ({"cond": ("canny:low=7",)}, "--cond canny:low=7 does not fit .* were made with .*low=100"),
        ({"flip": True}, "has no mirror images"),
        ({"trigger": "<x>"}, "was prepared with trigger=, and this run has trigger=<x>"),
        ({"maps": "elsewhere"}, "--maps does not fit"),
    ],
)
def test_a_run_that_wants_something_else_is_refused(prepared, tiny_base, settings, words):
    with pytest.raises(UsageError, match=words):
        open_training_sets(run_config(prepared, tiny_base, **settings), 32, quiet=True)
    with pytest.raises(UsageError, match="was prepared with size=32, and this run has size=64"):
        open_training_sets(run_config(prepared, tiny_base), 64, quiet=True)


def test_another_base_is_refused_and_one_with_the_same_encoders_is_not(tmp_path, prepared, tiny_base, base_maker):
    other = load_backbone(str(base_maker(tmp_path / "other", seed=1)))
    config = run_config(prepared, tmp_path / "other")
    folder = PreparedFolder(prepared)
    with pytest.raises(UsageError, match=r"has another autoencoder\. Prepare it for this base: sctool prepare"):
        stream(folder.everything, other, config, False)
    shutil.copytree(tiny_base, tmp_path / "same")
    shutil.rmtree(tmp_path / "same/unet")
    shutil.copytree(tmp_path / "other/unet", tmp_path / "same/unet")
    assert len(stream(folder.everything, load_backbone(str(tmp_path / "same")), config, False)) == 15


def test_a_source_that_changed_is_said(prepared, tiny_base, tmp_path, capsys):
    shutil.copytree(prepared.parent / "src", tmp_path / "src")
    go(tmp_path / "src", tmp_path / "out", tiny_base)
    os.utime(tmp_path / "src/00001.tar", (1, 1))
    open_training_sets(run_config(tmp_path / "out", tiny_base), 32)
    assert "1 of 3 shards of" in " ".join(capsys.readouterr().err.split())


def test_held_out_rows_lead_back_to_their_images(tmp_path, prepared, tiny_base):
    folder = PreparedFolder(prepared)
    record = folder.records[0]
    original = {r.key: r for r in open_source(prepared.parent / "src")}[record.key]
    assert (record.image.read(), record.text, record.split) == (original.image.read(), original.text, "validation")
    assert len(folder) == len(list(folder)) == 15
    assert len(folder.records) == 3
