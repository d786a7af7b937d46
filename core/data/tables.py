"""Sets described by a file of JSON lines: Hugging Face's `metadata.jsonl` and ControlNet's `prompt.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .conditions import MAP_FOLDERS
from .paths import inside, is_picture
from .records import ANY, Blob, Fault, FileBlob, Record, split_name
from .shards import caption, label

_IMAGE_COLUMNS = ("file_name", "image_file_name", "image")


def read_metadata(root: Path, table: str, faults: list[Fault]) -> list[Record]:
    """Records of the `metadata.jsonl` at `root/table`; its paths are relative to its own folder.

    Columns: `file_name`; `text`, `caption` or `prompt`; `split`; `class` or `label`; `<cond>_file_name` (or a column
    named after a condition) is a map, `conditioning_image_file_name` the map of whichever single condition is used.
    """
    folder = os.path.dirname(table)
    records = []
    for where, row in _rows(root, table, faults):
        name = next((row[column] for column in _IMAGE_COLUMNS if isinstance(row.get(column), str)), None)
        if name is None:
            faults.append(Fault(where, "has no file_name"))
            continue
        image = _file(root, folder, name, where, faults)
        if image is None:
            continue
        maps = {}
        for cond, column in _map_columns(row):
            blob = _file(root, folder, row[column], f"{where}, {column}", faults)
            if blob is not None:
                maps[cond] = blob
        key = os.path.splitext(image.label)[0]
        split = split_name(row.get("split")) or split_name(image.label.split("/")[0])
        meta = {k: v for k, v in row.items() if k not in _IMAGE_COLUMNS}
        records.append(Record(key, image, caption(row), maps, split, label(row), meta))
    return records


def read_prompts(root: Path, table: str, faults: list[Fault]) -> list[Record]:
    """Records of ControlNet's `prompt.json`: rows of `source` (the map), `target` (the image) and `prompt`."""
    folder = os.path.dirname(table)
    records = []
    for where, row in _rows(root, table, faults):
        target = row.get("target")
        if not isinstance(target, str):
            faults.append(Fault(where, "has no target (the image)"))
            continue
        image = _file(root, folder, target, where, faults)
        if image is None:
            continue
        maps: dict[str, Blob] = {}
        columns = [(ANY, "source")] if isinstance(row.get("source"), str) else []
        for cond, column in columns + _map_columns(row):
            blob = _file(root, folder, row[column], f"{where}, {column}", faults)
            if blob is not None:
                maps[cond] = blob
        meta = {k: v for k, v in row.items() if k not in ("source", "target", "prompt")}
        key = os.path.splitext(image.label)[0]
        records.append(Record(key, image, caption(row), maps, split_name(row.get("split")), label(row), meta))
    return records


def _rows(root: Path, table: str, faults: list[Fault]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of JSON lines, or of one JSON list of rows."""
    text = (root / table).read_bytes().decode("utf-8-sig", "replace")
    if text.lstrip().startswith("["):
        try:
            for i, row in enumerate(json.loads(text), start=1):
                if isinstance(row, dict):
                    yield f"{table}, row {i}", row
                else:
                    faults.append(Fault(f"{table}, row {i}", "is not a JSON object"))
        except ValueError as error:
            faults.append(Fault(table, f"is not valid JSON: {error}"))
        return
    for i, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            faults.append(Fault(f"{table}, line {i}", f"is not valid JSON: {error}"))
            continue
        if isinstance(row, dict):
            yield f"{table}, line {i}", row
        else:
            faults.append(Fault(f"{table}, line {i}", "is not a JSON object"))


def _map_columns(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(condition, column) of the columns that name a map."""
    columns = []
    for column, value in row.items():
        if not isinstance(value, str) or column in _IMAGE_COLUMNS:
            continue
        cond = column.removesuffix("_file_name")
        if cond != column or ((column in MAP_FOLDERS or column == ANY) and is_picture(value)):
            columns.append((cond, column))
    return columns


def _file(root: Path, folder: str, name: str, where: str, faults: list[Fault]) -> FileBlob | None:
    relative = os.path.normpath(os.path.join(folder, name)) if not os.path.isabs(name) and ".." not in name else name
    path, reason = inside(root, relative.replace(os.sep, "/"))
    if path is None:
        faults.append(Fault(where, f"'{name}': {reason}"))
        return None
    return FileBlob(path, os.path.relpath(path, root).replace(os.sep, "/"))
