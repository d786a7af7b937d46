"""Opens a data set of any layout and lists its records, without decoding images.

A condition map is a column, a sibling file (`KEY.canny.png`, `canny/KEY.png`, `conditions/canny/KEY.png`), a member
of the shard (`KEY.canny.png`) or of a sidecar shard (`conditions/canny/00000.tar`).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UsageError
from .conditions import MAP_FOLDERS
from .paths import is_picture, walk
from .photos import photos
from .records import Blob, Fault, FileBlob, Record, Source, split_name, without_duplicates
from .shards import list_maps, list_shard, read_shard
from .tables import read_metadata, read_prompts

__all__ = ["Shard", "list_shard", "open_shards", "open_source"]

TABLES = {"metadata.jsonl": "imagefolder", "prompt.json": "prompts"}


def open_source(path: str | Path, maps: str | Path | None = None) -> Source:
    """Opens and lists a set: `photos`, an image folder with `metadata.jsonl`, a folder with `.txt` captions, a folder
    or file of webdataset shards, or a folder with ControlNet's `prompt.json`.

    maps: a folder of further condition maps, laid out as `COND/KEY.png`, `COND/SHARD.tar` or `KEY.COND.png`.
    Faults of single rows, files or members are listed in `.faults`. Raises `UsageError` for a set that is missing, is
    empty or contains no images.
    """
    if str(path) == "photos":
        source = photos()
        return _with_maps(source, _existing(maps)) if maps else source
    given = _existing(path)
    root, only = (given.parent, given.name) if given.is_file() else (given, None)
    faults: list[Fault] = []
    names = walk(root, faults) if only is None or not only.lower().endswith(".tar") else [only]
    kind, tables = _kind(given, names, only)
    if kind == "shards":
        records = _shards(root, tables, faults)
    elif kind == "textfolder":
        records = _folder(root, names, faults)
    else:
        read = read_metadata if kind == "imagefolder" else read_prompts
        records = [record for table in tables for record in read(root, table, faults)]
        records = _with_siblings(records, _siblings(root, names))
    records = without_duplicates(records, faults)
    if not records:
        raise UsageError(_nothing(given, names, faults))
    source = Source(root.name if only is None else given.stem, kind, records, faults, root)
    if kind == "shards":
        source = _with_sidecars(source, root)
    return _with_maps(source, _existing(maps)) if maps else source


@dataclass(frozen=True)
class Shard:
    """One tar of a set, its members not listed: path below the root, file, split, and (condition, tar) of its maps."""

    name: str
    tar: str
    split: str | None = None
    sidecars: tuple[tuple[str, str], ...] = ()


def open_shards(path: str | Path, maps: str | Path | None = None) -> tuple[Source, list[Shard]] | None:
    """The shards of a set, without listing their members; None for a set of another layout.

    The maps of a shard are in `conditions/COND/` or `COND/` under its own file name, also below `maps`, which take
    precedence. The source has no records. Raises as `open_source` does.
    """
    if str(path) in ("photos", "-"):
        return None
    given = _existing(path)
    root, only = (given.parent, given.name) if given.is_file() else (given, None)
    faults: list[Fault] = []
    names = [only] if only is not None else walk(root, faults)
    if only is not None and not only.lower().endswith(".tar"):
        return None
    kind, tars = _kind(given, names, only)
    if kind != "shards":
        return None
    beside = _map_tars(root, names)
    if maps is not None:
        further = _existing(maps)
        found = _map_tars(further, walk(further, faults), every=True)
        if not found.keys() & {name.replace("/", "-") for name in tars}:
            raise UsageError(f"no .tar in '{maps}' has maps of '{path}': expected e.g. conditions/canny/{tars[0]}.")
        for file, own in found.items():
            beside[file] = {**beside.get(file, {}), **own}
    shards = [
        Shard(
            name,
            str(root / name),
            split_name(name.rpartition("/")[0].split("/")[0]),
            tuple(sorted(beside.get(name.replace("/", "-"), {}).items())),
        )
        for name in tars
    ]
    return Source(root.name if only is None else given.stem, "shards", [], faults, root), shards


def _map_tars(root: Path, names: Iterable[str], every: bool = False) -> dict[str, dict[str, str]]:
    """{file name of a shard: {condition: tar of its maps}}; with `every`, any folder may be that of a condition."""
    tars: dict[str, dict[str, str]] = {}
    for name in names:
        folder, _, file = name.removeprefix("conditions/").partition("/")
        if file.lower().endswith(".tar") and (every or name.startswith("conditions/") or folder in MAP_FOLDERS):
            tars.setdefault(file, {})[folder] = str(root / name)
    return tars


def _existing(path: str | Path) -> Path:
    given = Path(path).expanduser()
    if given.exists():
        return given
    parent = given.parent
    while not parent.is_dir():
        given, parent = parent, parent.parent
    near = difflib.get_close_matches(given.name, os.listdir(parent), n=1, cutoff=0.7)
    hint = f" Did you mean '{parent / near[0]}'?" if near else ""
    raise UsageError(f"'{path}' does not exist.{hint} Give a folder of images, of .tar shards, or 'photos'.")


def _kind(given: Path, names: list[str], only: str | None) -> tuple[str, list[str]]:
    """The layout, and the tables or shards that it is listed from."""
    if only is not None:
        if only.lower().endswith(".tar"):
            return "shards", [only]
        if only in TABLES:
            return TABLES[only], [only]
        raise UsageError(f"'{given}' is not a .tar shard, metadata.jsonl or prompt.json; give the folder of the set.")
    if not names:
        raise UsageError(f"'{given}' is empty. Give a folder of images, of .tar shards, or 'photos'.")
    for table, kind in TABLES.items():
        tables = [name for name in names if name == table or _in_split(name, table)]
        if tables:
            return kind, tables
    shards = [name for name in names if name.lower().endswith(".tar") and not _is_map_folder(name)]
    return ("shards", shards) if shards else ("textfolder", [])


def _in_split(name: str, file: str) -> bool:
    """Whether `name` is that file, directly in a folder named after a split."""
    folder, _, last = name.rpartition("/")
    return split_name(folder) is not None and last == file


def _nothing(given: Path, names: list[str], faults: list[Fault]) -> str:
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return f"'{given}' contains no usable image. {faults[0]}{more}."
    if not any(is_picture(name) for name in names):
        return f"'{given}' contains no images (.jpg, .png, .webp …) and no .tar shards among its {len(names)} files."
    return f"'{given}' lists no images: its table is empty, or all its images are condition maps."


# ------------------------------------------------------------------------------------------------------ folders


def _folder(root: Path, names: list[str], faults: list[Fault]) -> list[Record]:
    """Images below `root`, with `.txt` captions beside them; the subfolder is the split or the class."""
    images = {name for name in names if is_picture(name)}
    siblings = _siblings(root, names)
    maps = {blob.label for by_cond in siblings.values() for blob in by_cond.values() if isinstance(blob, FileBlob)}
    captions = {name[:-4]: name for name in names if name.lower().endswith(".txt")}
    records = []
    for name in sorted(images - maps):
        if _is_map_folder(name):
            continue
        key = os.path.splitext(name)[0]
        text = None
        if key in captions:
            try:
                text = (root / captions[key]).read_text("utf-8", "replace").strip() or None
            except OSError as error:
                faults.append(Fault(captions[key], f"the caption cannot be read: {error.strerror}"))
        split = split_name(name.split("/")[0]) if "/" in name else None
        above = name.split("/")[-2] if "/" in name else None
        label = above if above and split_name(above) is None else None
        records.append(Record(key, FileBlob(str(root / name), name), text, siblings.get(key, {}), split, label))
    return records


def _is_map_folder(name: str) -> bool:
    parts = name.lower().split("/")[:-1]
    return any(part in MAP_FOLDERS or part == "conditions" for part in parts)


def _siblings(root: Path, names: Iterable[str]) -> dict[str, dict[str, Blob]]:
    """{key: {cond: map}} of the maps beside the images: `KEY.cond.png`, `cond/KEY.png`, `conditions/…`."""
    names = [name for name in names if is_picture(name)]
    stems = {os.path.splitext(name)[0] for name in names}
    maps: dict[str, dict[str, Blob]] = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        key, cond = _map_key(stem, stems)
        if cond:
            maps.setdefault(key, {})[cond] = FileBlob(str(root / name), name)
    return maps


def _map_key(stem: str, stems: set[str]) -> tuple[str, str | None]:
    """(key of the image, condition) of a map's path without extension; condition None when it is not a map."""
    parts = stem.split("/")
    for i, part in enumerate(parts[:-1]):
        if part == "conditions" and i + 2 < len(parts):
            return _undotted("/".join(parts[:i] + parts[i + 2 :]), parts[i + 1]), parts[i + 1]
        if part.lower() in MAP_FOLDERS:
            return _undotted("/".join(parts[:i] + parts[i + 1 :]), part.lower()), part.lower()
    key, _, cond = stem.rpartition(".")
    if key and "/" not in cond and (key in stems or cond in MAP_FOLDERS):
        return key, cond
    return stem, None


def _undotted(key: str, cond: str) -> str:
    return key.removesuffix(f".{cond}")


def _with_siblings(records: list[Record], siblings: dict[str, dict[str, Blob]]) -> list[Record]:
    """Adds the maps beside the images; those named by a column take precedence."""
    images = {record.image.name for record in records}
    result = []
    for record in records:
        maps = {c: b for c, b in siblings.get(record.key, {}).items() if b.name not in images}
        result.append(replace(record, maps={**maps, **record.maps}) if maps else record)
    return result


# ------------------------------------------------------------------------------------------------------- shards


def _shards(root: Path, names: list[str], faults: list[Fault]) -> list[Record]:
    records = []
    for name in names:
        listed, shard_faults = read_shard(root / name)
        faults += shard_faults
        split = split_name(name.rpartition("/")[0].split("/")[0])
        records += [replace(record, split=split) if split and not record.split else record for record in listed]
    return records


def _with_sidecars(source: Source, folder: Path, every: bool = False) -> Source:
    """Adds maps of `conditions/COND/*.tar` and `COND/*.tar` in `folder`; with `every`, COND may be any name."""
    added: dict[str, dict[str, Blob]] = {}
    for base, any_name in ((folder / "conditions", True), (folder, every)):
        if not base.is_dir():
            continue
        for cond in sorted(entry.name for entry in base.iterdir() if entry.is_dir()):
            if not any_name and cond not in MAP_FOLDERS:
                continue
            for tar in sorted((base / cond).glob("*.tar")):
                maps, tar_faults = list_maps(tar, cond)
                source.faults.extend(tar_faults)
                for key, blob in maps.items():
                    added.setdefault(key, {})[cond] = blob
    return _adding(source, added)


def _with_maps(source: Source, folder: Path) -> Source:
    """Adds the maps of a `maps` folder; they take precedence over the set's own."""
    if not folder.is_dir():
        raise UsageError(f"'{folder}' is not a folder; --maps takes a folder such as conditions/ with canny/KEY.png.")
    before = {id(record): record.maps for record in source.records}
    source = _with_sidecars(source, folder, every=True)
    if any(folder.glob("*.tar")):  # the folder of one condition
        source = _with_sidecars_of(source, folder)
    names = walk(folder, source.faults)
    keys = {record.key for record in source.records}
    added: dict[str, dict[str, Blob]] = {}
    for name in filter(is_picture, names):
        key, cond = _map_of(os.path.splitext(name)[0], keys, folder.name)
        if key is not None:
            added.setdefault(key, {})[cond] = FileBlob(str(folder / name), name)
    source = _adding(source, added)
    if all(record.maps == before.get(id(record)) for record in source.records):
        raise UsageError(
            f"no file in '{folder}' is a map of an image in '{source.name}': expected e.g. "
            f"'{folder}/canny/{source.records[0].key}.png'."
        )
    return source


def _with_sidecars_of(source: Source, folder: Path) -> Source:
    added: dict[str, dict[str, Blob]] = {}
    for tar in sorted(folder.glob("*.tar")):
        maps, tar_faults = list_maps(tar, folder.name)
        source.faults.extend(tar_faults)
        for key, blob in maps.items():
            added.setdefault(key, {})[folder.name] = blob
    return _adding(source, added)


def _map_of(stem: str, keys: set[str], folder: str) -> tuple[str | None, str]:
    """(key, condition) of a file in a `maps` folder: `cond/KEY`, `KEY.cond`, or `KEY` in a folder `cond`."""
    stem = stem.removeprefix("conditions/")
    cond, _, key = stem.partition("/")
    for candidate in (key, key.removesuffix(f".{cond}")):
        if candidate in keys:
            return candidate, cond
    key, _, cond = stem.rpartition(".")
    if key in keys:
        return key, cond
    return (stem, folder) if stem in keys else (None, "")


def _adding(source: Source, maps: dict[str, dict[str, Blob]]) -> Source:
    records = [
        replace(record, maps={**record.maps, **maps[record.key]}) if record.key in maps else record
        for record in source.records
    ]
    return replace(source, records=records)
