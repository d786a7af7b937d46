"""Tuner files: safetensors whose metadata describe the tuner and the base that it was trained on.

`tuner.json` beside it repeats the description. Nothing is pickled. Reading the description imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .backbones.bases import ASSETS
from .errors import SctoolError, UsageError
from .files import replacing, replacing_folder, save_tensors, write_json
from .published import OURS, published_file, published_meta
from .runs import several
from .tuners import method_config, tuner_class

if TYPE_CHECKING:
    from torch import nn

    from .backbones.loading import Backbone
    from .tuners.base import Tuner

NAME = "tuner.safetensors"
EMBEDDED_TUNERS = {"mini-canny": ASSETS / "mini-canny"}
FORMAT = 1


def tuner_file(path: str | Path) -> Path:
    """The tuner file at `path`: a tuner file or folder, a run folder, the name of an embedded tuner or a run.

    The folder of a ControlNet or T2I-Adapter in diffusers' format is one too: its weights.

    Runs are looked up by name in runs/. Raises `UsageError` when there is none, or when there is one for each task.
    """
    path = EMBEDDED_TUNERS.get(str(path), Path(path).expanduser())
    for candidate in (path, path / NAME, path / "tuner" / NAME, Path("runs") / path / "tuner" / NAME):
        if candidate.is_file():
            return candidate
    if file := published_file(path):
        return file
    if tasks := task_files(path):
        raise several(path, tasks)
    reason = f"contains no {NAME} or tuner/{NAME}" if path.is_dir() else "does not exist"
    raise UsageError(f"tuner '{path}' {reason}. Give a run folder, a tuner folder or a tuner file.")


def task_files(path: str | Path) -> dict[str, Path]:
    """The tuner files of a run's tasks by task; {} for anything but a run that has several. `path` as `tuner_file`."""
    path = Path(path).expanduser()
    folders = [f for f in (path, path / "tuner", Path("runs") / path / "tuner") if f.name == "tuner" and f.is_dir()]
    files = sorted(folders[0].glob("*.safetensors")) if folders else []
    return {} if folders and (folders[0] / NAME) in files else {file.stem: file for file in files}


def _header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: tensor names, shapes and metadata."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(100_000_000, path.stat().st_size):
                raise ValueError("its header is broken")
            return json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise SctoolError(f"tuner '{path}' is not a safetensors file, or is damaged: {error}.") from error


def read_meta(path: str | Path, condition: str | None = None) -> dict[str, Any]:
    """The description in a tuner file: method, config, conditions, skips, base, maps, licence. Imports no torch.

    condition: what the maps of an adapter in diffusers' format are, whatever its folder says.
    """
    path = tuner_file(path)
    if published := published_meta(path, condition):
        return published
    try:
        return json.loads(_header(path)["__metadata__"]["sctool"])
    except KeyError as error:
        raise SctoolError(f"'{path}' was not written by sctool: its metadata do not name a method.") from error


def describe(
    tuner: Tuner, backbone: Backbone, maps: Mapping[str, Any] | None = None, task: str | None = None,
    merged: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The metadata of `tuner`, trained on `backbone`: what it is, and what is needed to build it again.

    maps: how each condition's map was made. task: its name, where it was trained as one of several. merged: what it
    was made of, and how.
    """
    from importlib.metadata import version

    return {
        "format": FORMAT,
        "sctool": version("sctool"),
        "method": tuner.method,
        "config": tuner.config.model_dump(mode="json"),
        **({"task": task} if task else {}),
        "conditions": list(tuner.conditions),
        **({"classes": list(tuner.classes)} if tuner.classes else {}),
        "maps": dict(maps or {}),
        "base": {"id": backbone.id, "hash": backbone.hash, "family": backbone.family.name},
        "licence": backbone.licence,
        "vae_scale": tuner.vae_scale,
        **tuner.site_metadata(),
        "parameters": sum(p.numel() for p in tuner.parameters()),
        **({"merged": dict(merged)} if merged else {}),
    }


def save_tuner(
    path: str | Path, tuner: Tuner, backbone: Backbone, *, maps: Mapping[str, Any] | None = None,
    task: str | None = None, merged: Mapping[str, Any] | None = None, **more: Any,
) -> Path:  # fmt: skip
    """Writes the tuner's float32 weights and its description (see `describe`); returns the file. Atomic.

    path: a folder, or a file ending in .safetensors. The file's bytes depend on weights and description only; `more`,
    e.g. the run's name, goes to tuner.json. Raises `SctoolError` when it cannot be written.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / NAME
    meta = describe(tuner, backbone, maps, task, merged)
    tensors = {name: value.detach().cpu() for name, value in sorted(tuner.state_dict().items())}
    with replacing(file) as temporary:
        save_tensors(tensors, temporary, {"format": "pt", "sctool": json.dumps(meta, sort_keys=True)})
    write_json(file.with_suffix(".json"), {**more, **meta})
    return file


def save_in_diffusers(
    folder: Path, model: Any, condition: str, backbone: Backbone, maps: Mapping[str, Any] | None = None
) -> None:
    """Writes a tuner's `model` of one condition (see `Tuner.in_diffusers`) as a folder that diffusers loads. Atomic.

    A file beside the weights says what diffusers' format has no place for. `maps` as `describe`.
    Raises `SctoolError` when it cannot be written.
    """
    from safetensors import SafetensorError

    base = {"id": backbone.id, "hash": backbone.hash, "family": backbone.family.name}
    made = {name: how for name, how in (maps or {}).items() if name == condition}
    with replacing_folder(folder) as temporary:
        try:
            model.save_pretrained(temporary)
        except SafetensorError as error:  # a full disk
            raise OSError(str(error)) from error
        write_json(temporary / OURS, {"condition": condition, "maps": made, "base": base, "licence": backbone.licence})


def load_tuner(
    path: str | Path, target: Backbone | nn.Module, force: bool = False, condition: str | None = None
) -> Tuner:
    """The tuner in `path` (see `tuner_file`), built for `target`, a backbone or a denoiser, on its device.

    condition: as `read_meta`.

    Raises `SctoolError` when it belongs to another base, unless `force`; when its shapes do not fit, always.
    """
    from safetensors.torch import load_file

    file = tuner_file(path)
    meta, denoiser = read_meta(file, condition), getattr(target, "denoiser", target)
    if not force:
        _check_base(file, meta, target)
        _check_places(file, meta, target)
    config = method_config(meta["method"], meta["config"])
    try:
        tuner = tuner_class(meta["method"]).build(
            config, denoiser, tuple(meta["conditions"]), meta["vae_scale"], tuple(meta.get("classes", ()))
        )
    except UsageError as error:  # e.g. it edits a skip that this denoiser lacks
        raise SctoolError(f"tuner '{file}' does not fit {_named(target)}: {error}") from error
    _check_shapes(file, meta, tuner, target)
    try:
        tuner.load_state_dict({meta.get("prefix", "") + name: value.float() for name, value in load_file(file).items()})
    except Exception as error:
        raise SctoolError(f"tuner '{file}' cannot be read: {error}. The file is damaged.") from error
    if hasattr(target, "denoiser"):
        tuner.use(target)
    return tuner


def _named(target: Any) -> str:
    """The target, for messages."""
    return f"base '{target.id}' ({target.hash[:12]})" if hasattr(target, "hash") else f"this {type(target).__name__}"


def _check_base(file: Path, meta: Mapping[str, Any], target: Any) -> None:
    base = meta.get("base", {})
    if not hasattr(target, "hash") or "hash" not in base:
        return
    if base["hash"] in (target.hash, *getattr(target, "ancestors", ())):  # a student takes its teacher's tuners
        return
    raise SctoolError(
        f"tuner '{file}' was trained on base '{base.get('id')}' ({base['hash'][:12]}), not on {_named(target)}. "
        f"Use --base {base.get('id')}; `sctool sample --force` loads it anyway."
    )


def _check_places(file: Path, meta: Mapping[str, Any], target: Any) -> None:
    """Refuses a teacher's tuner that edits what a pruned student lacks, or has under another number.

    Up to the first residual block, skips 0 and 1, all is in its place.
    """
    student = getattr(target, "student", None)
    if student is None or meta.get("base", {}).get("hash") not in student.moved:
        return
    skips = [f"skip {index}" for index in sorted(map(int, meta.get("skips", {}))) if index > 1]
    blocks = {match[1] for name in _header(file) if (match := re.search(r"\b(up_blocks[./]\d+)", name))}
    if edited := [*skips, *sorted(blocks)]:
        raise SctoolError(
            f"tuner '{file}' does not fit {_named(target)}, from which blocks were removed: it edits "
            f"{', '.join(edited)} of its teacher '{student.teacher}'. Train one on the student: --base {target.id}."
        )


def _check_shapes(file: Path, meta: Mapping[str, Any], tuner: Tuner, target: Any) -> None:
    rows = {name: row for name, row in _header(file).items() if name != "__metadata__"}
    stored = {meta.get("prefix", "") + name: tuple(row["shape"]) for name, row in rows.items()}
    wanted = {name: tuple(value.shape) for name, value in tuner.state_dict().items()}
    if stored == wanted:
        return
    name = next(name for name in sorted(stored.keys() | wanted.keys()) if stored.get(name) != wanted.get(name))
    base = meta.get("base", {}).get("id", "another base")
    raise SctoolError(
        f"tuner '{file}', made for base '{base}', does not fit {_named(target)}: {name} is "
        f"{stored.get(name, 'absent')} in the file and {wanted.get(name, 'absent')} here. "
        "--force does not help; use the base that it was trained on."
    )
