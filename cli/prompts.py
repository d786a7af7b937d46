"""Prompts, hints and photographs of the command line, read as what is to be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UsageError, unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..core.sampling import Request


def read_hints(
    hints: list[str], photos: list[str], size: int, map_settings: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """NAME=FILE[:WEIGHT] flags as uint8 (size, size, 3) hints and the weights that were given, by condition.

    `map_settings` says how maps were made that photographs are to be annotated like. Raises `UsageError`.
    """
    from ..annotators.hint_files import hint_from_map, hint_from_photo
    from ..core.chosen import split_scale
    from ..core.data.images import BadImage

    images: dict[str, Any] = {}
    weights: dict[str, float] = {}
    for flag, text in [*(("--hint", text) for text in hints), *(("--photo", text) for text in photos)]:
        name, equals, rest = text.partition("=")
        if not equals or not rest:
            raise UsageError(f"{flag} {text}: write it as NAME=FILE, e.g. canny=edges.png.")
        if name in images:
            raise UsageError(f"{flag} {text}: condition '{name}' is given twice.")
        file, weight = split_scale(rest)
        if weight != 1.0 or file != rest:
            weights[name] = weight
        if not Path(file).is_file():
            raise UsageError(f"{flag} {text}: no such file {file}.")
        try:
            if flag == "--hint":
                images[name] = hint_from_map(name, file, size)
            else:
                images[name] = hint_from_photo(name, file, size, (map_settings or {}).get(name))
        except BadImage as error:
            raise UsageError(f"{flag} {text}: the file {error.reason}.") from error
    return images, weights


def read_rows(prompts: list[str], file: Path | None) -> list[dict[str, Any]]:
    """The prompts, then the file's, as mappings with "prompt" and what else a .jsonl row has. Raises `UsageError`."""
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except OSError as error:
            raise UsageError(f"--prompts {file}: {error.strerror}.") from error
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if file.suffix == ".jsonl" else {"prompt": line}
                row["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f'--prompts {file}, line {number}: each row needs a "prompt".') from error
            rows.append(row)
    if not rows:
        raise UsageError(f"--prompts {file} contains no prompt.")
    return rows


def read_requests(
    rows: list[dict[str, Any]], file: Path | None, count: int, seed: int, maps: dict[str, Any], size: int,
    conditions: Mapping[str, set[str]],
) -> list[Request]:  # fmt: skip
    """Every row `count` times with counting seeds; a .jsonl row of `file` may name its own seed, hints and task.

    `conditions` are those of each task; a row without a task is drawn once for each of them, with the same seed, and
    takes the hints that the task has conditions for. Raises `UsageError` for a row of another task.
    """
    from ..core.sampling import Request

    requests = []
    images = 0
    for row in rows:
        own, _ = read_hints([f"{n}={(file or Path()).parent / f}" for n, f in row.get("hints", {}).items()], [], size)
        if row.get("task") and row["task"] not in conditions:
            raise unknown("task", str(row["task"]), conditions or ("none: pass --task",))
        for copy in range(count):
            start = int(row["seed"]) + copy if "seed" in row else seed + images
            images += 1
            for task in [row["task"]] if row.get("task") else [*conditions] or [None]:
                hints = {n: hint for n, hint in {**maps, **own}.items() if task is None or n in conditions[task]}
                requests.append(Request(row["prompt"], start, hints, task=task))
    return requests
