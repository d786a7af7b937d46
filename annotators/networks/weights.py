"""Weights of the networks: the known ones, finding them on this machine, fetching them, and checking them.

Annotating and evaluating only look for weights, at a path or in the Hugging Face cache. Only `fetch` downloads. Ids,
licences and sizes are as they were when this table was written; the model's card is authoritative.
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
    """Whether the licence allows commercial use; None if only the model card says."""
    megabytes: float
    """Approximate size of the download."""
    file: str | None = None
    role: Role = "annotator"
    """annotator: makes maps; evaluator: by default only measures adherence; detector: detects the persons for a pose
    model; metric: used by a metric of `sctool evaluate`, which also fetches it."""
    default: bool = False
    """Whether its conditions use it in this role if no model is named."""
    revision: str = "main"

    @property
    def url(self) -> str:
        """The model's page on the hub."""
        return f"https://huggingface.co/{self.repo}"

    @property
    def label(self) -> str:
        """Id, file and licence, for messages."""
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
    """The weights that a condition uses in a role if none are named. Raises `KeyError` if it has none."""
    for row in WEIGHTS.values():
        if cond in row.conds and row.role == role and row.default:
            return row
    raise KeyError((cond, role))


def select(names: Iterable[str]) -> list[Weights]:
    """Rows by name; the name of a condition selects its default annotator and, if it needs one, its detector.

    Raises `UsageError` for an unknown name, naming the nearest.
    """
    conds = {cond for row in WEIGHTS.values() if row.role == "annotator" for cond in row.conds}
    selected: dict[str, Weights] = {}
    for name in names:
        if name in WEIGHTS:
            selected[name] = WEIGHTS[name]
        elif name in conds:
            rows = [r for r in WEIGHTS.values() if name in r.conds and r.default and r.role != "evaluator"]
            selected.update({row.name: row for row in rows})
        else:
            raise unknown("weights", name, WEIGHTS.keys() | conds)
    return list(selected.values())


# ------------------------------------------------------------------------------------------------- finding weights


@dataclass(frozen=True)
class LocalWeights:
    """Weights on this machine. Hashes are of the actual files, computed once."""

    name: str
    """Their name in results: the row's name, a hub id, or the name of the file or folder."""
    source: str
    """The value of `model=` that finds them again: the row's name, a hub id, or the absolute path."""
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
        """SHA-256 of the weight file; for several files, SHA-256 of their hashes in order."""
        return _combined_hash(self.files)

    @cached_property
    def config_sha256(self) -> str | None:
        """The same for the `*config.json` files of a folder, which define the network and its preprocessing."""
        return _combined_hash(sorted(self.path.glob("*config.json"))) if self.path.is_dir() else None


def _combined_hash(files: list[Path]) -> str:
    hashes = [sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder in transformers' format, one or several shards; [] if one is missing.

    safetensors first, else `pytorch_model.bin`, which is read as tensors only, so that no code in it runs.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return [folder / shard for shard in shards] if all((folder / shard).is_file() for shard in shards) else []
        if (folder / name).is_file():
            return [folder / name]
    return []


def find_weights(cond: str, model: str, role: Role = "annotator", key: str = "model") -> LocalWeights:
    """The weights that `model` names: a row of the table, a path, or a hub id (`OWNER/NAME`, `OWNER/NAME:FILE`).

    key: the setting with this name, for messages. Raises `UsageError` for anything else, and `SctoolError` that says
    how to get the weights if they are not on this machine.
    """
    if model in WEIGHTS and cond in WEIGHTS[model].conds:
        row = WEIGHTS[model]
        weights = find_cached(row)
        if weights is None:
            raise SctoolError(
                f"{cond} needs the weights '{row.name}' ({row.label}) and they are not on this machine. "
                f"Get them with: sctool weights fetch {row.name}   - or give a {'file' if row.file else 'folder'}: "
                f"--cond {cond}:{key}=PATH"
            )
        return weights
    path = Path(model).expanduser()
    if path.exists():
        if path.is_dir() and not ((path / "config.json").is_file() and weight_files(path)):
            raise UsageError(
                f"--cond {cond}:{key}={model} is not a folder in transformers' format: it needs config.json, "
                "preprocessor_config.json and model.safetensors."
            )
        return LocalWeights(path.name, str(path.absolute()), path.absolute())
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?", model)
    if match is None or (match[2] is None and path.suffix in (".pth", ".safetensors")):
        if "/" in model or path.suffix:
            raise UsageError(f"--cond {cond}:{key}={model}: no such file or folder, and not a hub id (OWNER/NAME).")
        rows = (row for row in WEIGHTS.values() if cond in row.conds)
        candidates = [row.name for row in rows if (row.role == "detector") == (role == "detector")]
        raise unknown(f"{cond} {key}", model, candidates, " A path or a hub id may be given too.")
    row = Weights(model, (cond,), match[1], "see its card", None, 0, match[2])
    weights = find_cached(row)
    if weights is None:
        raise SctoolError(
            f"{cond} needs {model} from the hub and it is not on this machine. Get it with: "
            f"hf download {row.repo}{f' {row.file}' if row.file else ''}   - or give a path: --cond {cond}:{key}=PATH"
        )
    return weights


def hub_cache() -> Path:
    """The folder of the Hugging Face cache ($HF_HOME/hub)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def find_cached(row: Weights) -> LocalWeights | None:
    """The row's weights in the Hugging Face cache; None if they are missing or incomplete. Never uses the network."""
    from huggingface_hub import try_to_load_from_cache

    file = row.file or "config.json"
    path = try_to_load_from_cache(row.repo, file, cache_dir=hub_cache(), revision=row.revision)
    if not isinstance(path, str):
        return None
    snapshot = Path(path).parents[file.count("/")]
    if row.file is None and not weight_files(snapshot):
        return None
    return LocalWeights(row.name, row.name, Path(path) if row.file else snapshot, snapshot.name)


# ------------------------------------------------------------------------------------------------ fetching weights


def fetch(row: Weights) -> LocalWeights:
    """Downloads a row's weights into the cache, with progress on stderr. Files that are there are not fetched again.

    Raises `SctoolError` with the model's page and how to do it without network.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        if row.file:
            hf_hub_download(row.repo, row.file, revision=row.revision, cache_dir=hub_cache())
        else:
            names = _files_to_fetch(HfApi().list_repo_files(row.repo, revision=row.revision))
            snapshot_download(row.repo, revision=row.revision, cache_dir=hub_cache(), allow_patterns=names)
    except Exception as error:  # the hub client raises many types: no connection, no such repository, disk full
        folder = f"models--{row.repo.replace('/', '--')}"
        raise SctoolError(
            f"cannot fetch '{row.name}' from {row.url} ({_reason(error)}). Without network: fetch it on another "
            f"machine and copy the folder {folder} from its cache to {hub_cache()} (HF_HOME changes that location)."
        ) from error
    weights = find_cached(row)
    if weights is None:
        raise SctoolError(f"{row.url} has no weights that sctool can read (model.safetensors and config.json).")
    return weights


def _files_to_fetch(names: Iterable[str]) -> list[str]:
    """The files of a repository that loading needs: settings, vocabulary, and one set of weight files."""
    names = [name for name in names if "/" not in name]
    shard = r"(-\d+-of-\d+)?"
    weights = [n for n in names if re.fullmatch(rf"model{shard}\.safetensors", n)]
    weights = weights or [n for n in names if re.fullmatch(rf"pytorch_model{shard}\.bin", n)]
    return sorted([*weights, *(n for n in names if n.endswith((".json", ".txt")))])


def _reason(error: BaseException) -> str:
    """The first line of the original cause: "no such host" is more helpful than "not in the cache"."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# ------------------------------------------------------------------------------------------------ checking weights


@dataclass(frozen=True)
class Check:
    """One weight file: whether it is identical to the hub's; None if the cache does not record that."""

    weights: str
    file: Path
    intact: bool | None


def verify(row: Weights) -> list[Check]:
    """Hashes the row's files again; [] if they are not on this machine.

    The cache names every file by its hash on the hub, SHA-256 for large files and git's blob hash (SHA-1) for small
    ones, so a damaged file is found without network.
    """
    weights = find_cached(row)
    if weights is None:
        return []
    files = sorted(p for p in weights.path.rglob("*") if p.is_file()) if weights.path.is_dir() else [weights.path]
    return [Check(row.name, file, _is_intact(file)) for file in files]


def _is_intact(file: Path) -> bool | None:
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
