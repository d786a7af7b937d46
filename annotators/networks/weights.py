"""Weights of the models: which there are, where they lie on this machine, how they get there, whether they are whole.

Weights are found, never fetched, while annotating or evaluating: a local path, else the Hugging Face cache. Only
`fetch` uses the network. Ids, licences and sizes are those known when this table was written: the model's card decides.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from ...core.errors import SctoolError, UsageError, unknown
from ...core.files import sha256

Role = Literal["annotator", "detector", "evaluator", "metric"]


@dataclass(frozen=True)
class Weights:
    """One row of the table: a file of a hub repository, or a whole repository in transformers' format."""

    name: str
    conds: tuple[str, ...]
    repo: str
    licence: str
    commercial: bool | None
    """Whether the licence allows commercial use; None where only the card can say."""
    megabytes: float
    """About how much a download takes."""
    file: str | None = None
    role: Role = "annotator"
    """annotator: makes maps; evaluator: by default only judges them; detector: finds the persons for a pose model;
    metric: of a figure of `sctool evaluate`, which finds and fetches it by itself too."""
    default: bool = False
    """What its conditions take in this role when no model is named."""
    revision: str = "main"

    @property
    def url(self) -> str:
        """The model's page on the hub."""
        return f"https://huggingface.co/{self.repo}"

    @property
    def label(self) -> str:
        """Id, file and licence in one phrase."""
        return f"{self.repo}{f', {self.file}' if self.file else ''}; {self.licence}"


WEIGHTS: dict[str, Weights] = {
    row.name: row
    for row in (
        Weights("hed", ("hed", "sketch"), "lllyasviel/Annotators", "apache-2.0", True, 59, "ControlNetHED.pth",
                default=True),
        Weights("pidinet", ("hed", "sketch"), "lllyasviel/Annotators", "research only", False, 3, "table5_pidinet.pth"),
        Weights("depth-anything-v2-small", ("depth",), "depth-anything/Depth-Anything-V2-Small-hf", "apache-2.0", True,
                99, default=True),
        Weights("depth-anything-v2-base", ("depth",), "depth-anything/Depth-Anything-V2-Base-hf", "cc-by-nc-4.0",
                False, 390),
        Weights("depth-anything-v2-large", ("depth",), "depth-anything/Depth-Anything-V2-Large-hf", "cc-by-nc-4.0",
                False, 1340),
        Weights("dpt-hybrid", ("depth",), "Intel/dpt-hybrid-midas", "apache-2.0", True, 490),
        Weights("dpt-large", ("depth",), "Intel/dpt-large", "apache-2.0", True, 1370, role="evaluator", default=True),
        Weights("zoedepth", ("depth",), "Intel/zoedepth-nyu-kitti", "mit", True, 1380),
        Weights("upernet", ("seg",), "openmmlab/upernet-convnext-small", "mit", True, 330, default=True),
        Weights("segformer-b0", ("seg",), "nvidia/segformer-b0-finetuned-ade-512-512", "nvidia, research", False, 15),
        Weights("segformer-b5", ("seg",), "nvidia/segformer-b5-finetuned-ade-640-640", "nvidia, research", False, 340),
        Weights("oneformer", ("seg",), "shi-labs/oneformer_ade20k_swin_large", "mit", True, 880),
        Weights("mask2former", ("seg",), "facebook/mask2former-swin-large-ade-semantic", "other", None, 870,
                role="evaluator", default=True),
        Weights("vitpose", ("pose",), "usyd-community/vitpose-base-simple", "apache-2.0", True, 345, default=True),
        Weights("vitpose-plus", ("pose",), "usyd-community/vitpose-plus-base", "apache-2.0", True, 500,
                role="evaluator", default=True),
        Weights("rtdetr", ("pose",), "PekingU/rtdetr_r50vd_coco_o365", "apache-2.0", True, 172, role="detector",
                default=True),
        Weights("clip", ("clip score",), "timm/vit_large_patch14_clip_224.openai", "mit", True, 1710,
                "open_clip_model.safetensors", role="metric"),
        Weights("clip-336", ("cmmd",), "timm/vit_large_patch14_clip_336.openai", "mit", True, 1710,
                "open_clip_model.safetensors", role="metric"),
        Weights("dinov2", ("fd-dinov2",), "facebook/dinov2-large", "apache-2.0", True, 1220, role="metric"),
    )
}  # fmt: skip


def default(cond: str, role: Role = "annotator") -> Weights:
    """The weights that a condition takes in a role when none are named. Raises `KeyError` where it takes none."""
    for row in WEIGHTS.values():
        if cond in row.conds and row.role == role and row.default:
            return row
    raise KeyError((cond, role))


def select(names: Iterable[str]) -> list[Weights]:
    """Rows by name; a condition stands for its default annotator and, where it needs one, detector.

    Raises `UsageError` for an unknown word, naming the nearest.
    """
    conds = {cond for row in WEIGHTS.values() if row.role == "annotator" for cond in row.conds}
    found: dict[str, Weights] = {}
    for name in names:
        if name in WEIGHTS:
            found[name] = WEIGHTS[name]
        elif name in conds:
            rows = [r for r in WEIGHTS.values() if name in r.conds and r.default and r.role != "evaluator"]
            found.update({row.name: row for row in rows})
        else:
            raise unknown("weights", name, WEIGHTS.keys() | conds)
    return list(found.values())


# --------------------------------------------------------------------------------------------------- where they lie


@dataclass(frozen=True)
class Found:
    """Weights on this machine. Hashes are of the bytes that lie there, computed once."""

    name: str
    """What results call it: the row's name, a hub id, or the file's or folder's own name."""
    source: str
    """What finds it again as `model=`: the row's name, a hub id, or the whole path."""
    path: Path
    """A file, or a folder in transformers' format."""
    revision: str | None = None
    """The hub's commit; None for a local path."""

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return weight_files(self.path) if self.path.is_dir() else [self.path]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weight file; of several, that of their hashes in order."""
        return _joined(self.files)

    @cached_property
    def config_sha256(self) -> str | None:
        """The same of the settings beside a network in a folder: how it is built and how it reads pictures."""
        return _joined(sorted(self.path.glob("*config.json"))) if self.path.is_dir() else None


def _joined(files: list[Path]) -> str:
    hashes = [sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder in transformers' format, whole or in shards; [] when one is missing.

    safetensors first; `pytorch_model.bin` else, which is only ever read as tensors, without pickled code.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return [folder / shard for shard in shards] if all((folder / shard).is_file() for shard in shards) else []
        if (folder / name).is_file():
            return [folder / name]
    return []


def locate(cond: str, model: str, role: Role = "annotator", key: str = "model") -> Found:
    """The weights that `model` names: a row of the table, a path, or a hub id (`OWNER/NAME`, `OWNER/NAME:FILE`).

    key: the setting that holds the name, for the messages. Raises `UsageError` for what is none of these, and
    `SctoolError` that says how to get them when they are not on this machine.
    """
    if model in WEIGHTS and cond in WEIGHTS[model].conds:
        row = WEIGHTS[model]
        found = at_hand(row)
        if found is None:
            raise SctoolError(
                f"{cond} needs the weights '{row.name}' ({row.label}) and they are not on this machine. "
                f"Get them with: sctool weights fetch {row.name}   - or give a {'file' if row.file else 'folder'}: "
                f"--cond {cond}:{key}=PATH"
            )
        return found
    path = Path(model).expanduser()
    if path.exists():
        if path.is_dir() and not ((path / "config.json").is_file() and weight_files(path)):
            raise UsageError(
                f"--cond {cond}:{key}={model} is no folder in transformers' format: it needs config.json, "
                "preprocessor_config.json and model.safetensors."
            )
        return Found(path.name, str(path.absolute()), path.absolute())
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?", model)
    if match is None or (match[2] is None and path.suffix in (".pth", ".safetensors")):
        if "/" in model or path.suffix:
            raise UsageError(f"--cond {cond}:{key}={model}: no such file or folder, and no hub id (OWNER/NAME).")
        rows = (row for row in WEIGHTS.values() if cond in row.conds)
        fitting = [row.name for row in rows if (row.role == "detector") == (role == "detector")]
        raise unknown(f"{cond} {key}", model, fitting, " A path or a hub id may be given too.")
    row = Weights(model, (cond,), match[1], "see its card", None, 0, match[2])
    found = at_hand(row)
    if found is None:
        raise SctoolError(
            f"{cond} needs {model} from the hub and it is not on this machine. Get it with: "
            f"hf download {row.repo}{f' {row.file}' if row.file else ''}   - or give a path: --cond {cond}:{key}=PATH"
        )
    return found


def hub_cache() -> Path:
    """The folder of the Hugging Face cache ($HF_HOME/hub)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def at_hand(row: Weights) -> Found | None:
    """Where the row's weights lie in the cache, whole; None where they do not. Never uses the network."""
    from huggingface_hub import try_to_load_from_cache

    file = row.file or "config.json"
    path = try_to_load_from_cache(row.repo, file, cache_dir=hub_cache(), revision=row.revision)
    if not isinstance(path, str):
        return None
    snapshot = Path(path).parents[file.count("/")]
    if row.file is None and not weight_files(snapshot):
        return None
    return Found(row.name, row.name, Path(path) if row.file else snapshot, snapshot.name)


# --------------------------------------------------------------------------------------------------- getting them


def fetch(row: Weights) -> Found:
    """Downloads a row's weights into the cache, with progress on stderr; what is there already is not fetched again.

    Raises `SctoolError` naming the page and the way without network.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        if row.file:
            hf_hub_download(row.repo, row.file, revision=row.revision, cache_dir=hub_cache())
        else:
            names = _needed(HfApi().list_repo_files(row.repo, revision=row.revision))
            snapshot_download(row.repo, revision=row.revision, cache_dir=hub_cache(), allow_patterns=names)
    except Exception as error:  # the hub client raises a dozen kinds for "not reachable", "not there" and "no room"
        folder = f"models--{row.repo.replace('/', '--')}"
        raise SctoolError(
            f"cannot fetch '{row.name}' from {row.url} ({_reason(error)}). Without network: fetch it on another "
            f"machine and copy the folder {folder} from its cache to {hub_cache()} (HF_HOME names another place)."
        ) from error
    found = at_hand(row)
    if found is None:
        raise SctoolError(f"{row.url} has no weights that sctool reads (model.safetensors and its config.json).")
    return found


def _needed(names: Iterable[str]) -> list[str]:
    """Of a repository's files those that a transformers model is loaded from: settings, vocabulary, one weight set."""
    names = [name for name in names if "/" not in name]
    shard = r"(-\d+-of-\d+)?"
    weights = [n for n in names if re.fullmatch(rf"model{shard}\.safetensors", n)]
    weights = weights or [n for n in names if re.fullmatch(rf"pytorch_model{shard}\.bin", n)]
    return sorted([*weights, *(n for n in names if n.endswith((".json", ".txt")))])


def _reason(error: BaseException) -> str:
    """The first line of what the failure began with: "no such host" tells more than "not in the cache"."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# --------------------------------------------------------------------------------------------------- are they whole


@dataclass(frozen=True)
class Check:
    """One file of some weights: whether its bytes are those that the hub has; None where the cache does not say."""

    weights: str
    file: Path
    sound: bool | None


def verify(row: Weights) -> list[Check]:
    """Hashes the row's files again; [] when they are not at hand.

    The cache names every file by what the hub says of its content: SHA-256 for large ones, git's blob hash (SHA-1) for
    small ones; a damaged file is therefore found without network.
    """
    found = at_hand(row)
    if found is None:
        return []
    files = sorted(p for p in found.path.rglob("*") if p.is_file()) if found.path.is_dir() else [found.path]
    return [Check(row.name, file, _sound(file)) for file in files]


def _sound(file: Path) -> bool | None:
    blob = Path(os.path.realpath(file)).name
    if re.fullmatch(r"[0-9a-f]{64}", blob):
        return sha256(file) == blob
    if re.fullmatch(r"[0-9a-f]{40}", blob):
        with open(file, "rb") as data:
            digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
            while chunk := data.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest() == blob
    return None
