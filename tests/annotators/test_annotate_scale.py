"""Many processes, parts of an array job, a Ray cluster, workers that die: always the same bytes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from sctool.annotators.engine.run import annotate
from sctool.core.config import AnnotateConfig
from sctool.core.errors import SctoolError, UsageError

PHOTO = data.coffee()
COND = ("canny,color,mask",)


def shards_of(path: Path, shards: int, each: int, side: int = 96) -> Path:
    path.mkdir(parents=True)
    for s in range(shards):
        with tarfile.open(path / f"{s:05d}.tar", "w") as tar:
            for i in range(each):
                y, x = (s * 31 + i * 7) % (400 - side), (i * 53) % (600 - side)
                buffer = io.BytesIO()
                Image.fromarray(PHOTO[y : y + side, x : x + side]).save(buffer, "JPEG")
                for suffix, content in ((".jpg", buffer.getvalue()), (".txt", b"a cup"), (".json", b"{}")):
                    info = tarfile.TarInfo(f"{s:05d}{i:04d}{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return path


def go(src: Path, out: Path, **more) -> dict:
    return annotate(AnnotateConfig(src=str(src), cond=COND, out=str(out), **more))


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("layout", ["merged", "maps"])
def test_parts_of_an_array_job_make_the_same_set(tmp_path, layout):
    src = shards_of(tmp_path / "src", 5, 3)
    with tarfile.open(src / "00003.tar", "a") as tar:
        info = tarfile.TarInfo("000030009.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"text"))
    go(src, tmp_path / "whole", layout=layout)
    wholes = [go(src, tmp_path / "parts", layout=layout, shards=f"{k}/3")["whole"] for k in (1, 3, 2)]
    assert wholes == [False, False, True]
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    assert "000030009" in (tmp_path / "parts/errors.jsonl").read_text()


def test_a_part_of_a_folder_lists_its_own_errors(tmp_path, monkeypatch):
    monkeypatch.setattr("sctool.annotators.engine.listing.CHUNK", 2)
    (tmp_path / "src").mkdir()
    for i in range(6):
        Image.fromarray(PHOTO[i : i + 64, :64]).save(tmp_path / f"src/{i}.jpg")
    (tmp_path / "src/2.jpg").write_text("text")
    summary = go(tmp_path / "src", tmp_path / "out", shards="2/3")
    assert (summary["images"], summary["failed"], summary["whole"]) == (1, 1, False)
    assert "2.jpg" in (tmp_path / "out/errors-2-of-3.jsonl").read_text()
    go(tmp_path / "src", tmp_path / "out", shards="1/3")
    assert go(tmp_path / "src", tmp_path / "out", shards="3/3")["whole"]
    assert [p.name for p in (tmp_path / "out").glob("errors*")] == ["errors.jsonl"]
    assert len((tmp_path / "out/metadata.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("words", ["0/3", "4/3", "3", "a/b", "1/0"])
def test_a_part_that_is_none_is_one_clear_message(tmp_path, words):
    src = shards_of(tmp_path / "src", 1, 1)
    with pytest.raises(UsageError, match="K/N"):
        go(src, tmp_path / "out", shards=words)
    assert not (tmp_path / "out").exists()


def test_a_killed_worker_costs_its_unit_and_not_the_run(tmp_path):
    src = shards_of(tmp_path / "src", 8, 60, 128)
    go(src, tmp_path / "whole", jobs=1)
    out = tmp_path / "out"
    words = [sys.executable, "-m", "sctool", "annotate", str(src), "--cond", COND[0], "--out", str(out), "-j", "2"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not list(out.glob("*_stats.json")) and process.poll() is None:
        time.sleep(0.002)
    killed = kill_one(children(process.pid))
    _, said = process.communicate(timeout=120)
    assert killed, "no worker was found alive"
    assert process.returncode == 0, said
    assert "a worker process died at 0000" in said
    assert tree(out) == tree(tmp_path / "whole")


def children(pid: int) -> list[int]:
    """Worker processes of `pid`; not multiprocessing's own resource tracker."""
    pids = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            words = (status.parent / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if parent == pid and b"spawn_main" in words:
            pids.append(int(status.parent.name))
    return pids


def kill_one(pids: list[int]) -> bool:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            return True
        except ProcessLookupError:
            continue
    return False


def test_a_job_that_kills_every_worker_is_named_and_the_rest_is_done(tmp_path):
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n"
        "def work(job, on_image):\n"
        "    if job == 'bad':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    open(job, 'a').write('x')\n"
        "    return {}\n"
        "if __name__ == '__main__':\n"
        "    from sctool.annotators.engine.pool import run_jobs\n"
        "    import deadly\n"
        "    run_jobs(deadly.work, ['a', 'bad', 'b', 'c'], 2, lambda n: None)\n"
    )
    finished = subprocess.run(
        [sys.executable, "deadly.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert "SctoolError: worker processes died at bad, 2 at each" in finished.stderr
    assert [(tmp_path / name).read_text() for name in "abc"] == ["x", "x", "x"]


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_bytes(tmp_path):
    pytest.importorskip("ray", reason="the optional package ray is not installed")
    src = shards_of(tmp_path / "src", 4, 5)
    go(src, tmp_path / "one", jobs=1)
    words = [sys.executable, "-m", "sctool", "annotate", str(src), "--cond", COND[0], "--out", str(tmp_path / "ray")]
    finished = subprocess.run([*words, "--ray", "local", "-j", "2"], capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert tree(tmp_path / "ray") == tree(tmp_path / "one")


def test_ray_that_is_missing_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'sctool\[ray\]'"):
        go(shards_of(tmp_path / "src", 1, 1), tmp_path / "out", ray="local")


def test_batches_are_bounded_by_pixels_and_number(tmp_path, monkeypatch):
    from sctool.annotators.engine import worker

    sizes = []
    real = worker.make_maps

    def make_maps(images, *args, **more):
        sizes.append(len(images))
        return real(images, *args, **more)

    monkeypatch.setattr(worker, "make_maps", make_maps)
    src = shards_of(tmp_path / "src", 1, 40, 64)
    go(src, tmp_path / "a", jobs=1)
    assert sizes == [16, 16, 8]
    sizes.clear()
    monkeypatch.setattr(worker, "BATCH_PIXELS", 3 * 64 * 64)
    go(src, tmp_path / "b", jobs=1)
    assert sizes == [3] * 13 + [1]
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_listing_shards_reads_no_member(tmp_path, monkeypatch):
    from sctool.core.data import sources

    src = shards_of(tmp_path / "src", 3, 2)
    (src / "conditions/depth").mkdir(parents=True)
    (src / "conditions/depth/00001.tar").write_bytes((src / "00001.tar").read_bytes())
    monkeypatch.setattr(sources, "read_shard", None)
    opened = sources.open_shards(src)
    assert opened is not None
    assert [(s.name, len(s.sidecars)) for s in opened[1]] == [("00000.tar", 0), ("00001.tar", 1), ("00002.tar", 0)]
    assert sources.open_shards("photos") is None


def test_maps_beside_a_shard_are_carried_into_the_merged_set(tmp_path):
    src = shards_of(tmp_path / "src", 2, 3)
    go(src, tmp_path / "maps", layout="maps")
    (tmp_path / "maps/conditions").rename(src / "conditions")
    annotate(AnnotateConfig(src=str(src), cond=("canny:low=20",), out=str(tmp_path / "out")))
    with tarfile.open(tmp_path / "out/00001.tar") as tar:
        names = set(tar.getnames())
        mask = tar.extractfile("000010002.mask.png")
        assert mask is not None
        carried = mask.read()
    assert {"000010002.canny.png", "000010002.color.png", "000010002.mask.png"} <= names
    with tarfile.open(src / "conditions/mask/00001.tar") as tar:
        original = tar.extractfile("000010002.mask.png")
        assert original is not None
        assert original.read() == carried
    assert np.asarray(Image.open(io.BytesIO(carried))).shape == (96, 96)


def test_workers_share_the_gpus(monkeypatch):
    from sctool.annotators import ANNOTATORS
    from sctool.annotators.engine import pool, run

    heavy = (ANNOTATORS["hed"](),)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    for visible, devices, workers in (("", 0, 12), ("-1", 0, 12), ("3", 1, 2), ("0,GPU-ab", 2, 4)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert len(pool.gpus()) == devices
        assert run._workers(None, 9, heavy) == workers
    assert run._workers(None, 9, ()) == 1
    assert run._workers(5, 9, heavy) == 5


def test_shards_without_pictures_are_one_clear_message(tmp_path):
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src/00000.tar", "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"text"))
    with pytest.raises(UsageError, match="contains no images"):
        go(tmp_path / "src", tmp_path / "out")


@pytest.mark.parametrize("layout", ["merged", "maps"])
def test_what_the_source_lost_leaves_the_set(tmp_path, layout):
    src = shards_of(tmp_path / "src", 3, 2)
    go(src, tmp_path / "out", layout=layout)
    (src / "00001.tar").unlink()
    assert go(src, tmp_path / "out", layout=layout)["images"] == 4
    assert not [p for p in (tmp_path / "out").rglob("*00001*")]
    go(src, tmp_path / "fresh", layout=layout)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_what_a_folder_lost_leaves_the_set(tmp_path, monkeypatch):
    monkeypatch.setattr("sctool.annotators.engine.listing.CHUNK", 2)
    (tmp_path / "src").mkdir()
    for i in range(7):
        Image.fromarray(PHOTO[i : i + 64, :64]).save(tmp_path / f"src/{i}.jpg")
    go(tmp_path / "src", tmp_path / "out")
    for i in (0, 3):
        (tmp_path / f"src/{i}.jpg").unlink()
    assert go(tmp_path / "src", tmp_path / "out")["images"] == 5
    go(tmp_path / "src", tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_a_limit_never_throws_finished_maps_away(tmp_path, kind):
    src = tmp_path / "src"
    if kind == "shards":
        shards_of(src, 3, 2)
    else:
        src.mkdir()
        for i in range(6):
            Image.fromarray(PHOTO[i : i + 64, :64]).save(src / f"{i}.jpg")
    assert go(src, tmp_path / "out", limit=3)["images"] == 3
    assert go(src, tmp_path / "out")["images"] == 6
    before = tree(tmp_path / "out")
    with pytest.raises(UsageError, match="more images than --limit"):
        go(src, tmp_path / "out", limit=3)
    assert tree(tmp_path / "out") == before


def test_a_run_that_failed_before_any_map_leaves_the_folder_free(tmp_path):
    src = shards_of(tmp_path / "src", 1, 2)
    (tmp_path / "no.pth").write_bytes(b"no weights")
    with pytest.raises(SctoolError, match="neither HED"):
        annotate(AnnotateConfig(src=str(src), cond=(f"hed:model={tmp_path}/no.pth",), out=str(tmp_path / "out")))
    assert go(src, tmp_path / "out")["images"] == 2
    with pytest.raises(UsageError, match=r"conditions = canny, color, mask, now it is canny"):
        annotate(AnnotateConfig(src=str(src), cond=("canny",), out=str(tmp_path / "out")))


def test_a_damaged_map_beside_a_shard_costs_that_map_alone(tmp_path):
    src = shards_of(tmp_path / "src", 1, 6)
    annotate(AnnotateConfig(src=str(src), cond=("canny",), out=str(tmp_path / "maps"), layout="maps"))
    whole = (tmp_path / "maps/conditions/canny/00000.tar").read_bytes()
    (src / "conditions/canny").mkdir(parents=True)
    (src / "conditions/canny/00000.tar").write_bytes(whole[:2700])
    summary = annotate(AnnotateConfig(src=str(src), cond=("color",), out=str(tmp_path / "out")))
    assert summary["images"] == 6
    said = (tmp_path / "out/errors.jsonl").read_text()
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        names = set(tar.getnames())
    keys = [f"00000{i:04d}" for i in range(6)]
    assert all(f"{key}.color.png" in names for key in keys)
    lost = [key for key in keys if f"{key}.canny.png" not in names]
    assert 0 < len(lost) < 6
    assert all(key in said for key in lost)
    assert '"where": "canny/00000.tar' in said
    assert '"where": "00000.tar"' not in said


def test_a_file_in_the_way_is_one_clear_message(tmp_path):
    src = shards_of(tmp_path / "src", 1, 1)
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file/out"):
        with pytest.raises(SctoolError, match="Choose"):
            go(src, out)
