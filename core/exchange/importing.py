"""From another tool's file to a tuner of ours, without dropping a key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..backbones.loading import Backbone
from ..checkpoint import load_tuner, read_meta, save_tuner
from ..errors import SctoolError, UsageError
from ..files import sha256
from ..published import published_file
from ..tuners import method_config, tuner_class
from ..tuners.base import Tuner
from .foreign import Reading, read_foreign
from .table import recognised

SHOWN = 4
"""Keys of a file that a message names."""


@dataclass(frozen=True)
class Imported:
    """A tuner, where it came from, and what became of each of the file's keys: {their key: ours} and those left out."""

    tuner: Tuner
    file: Path
    what: str
    used: Mapping[str, str]
    unused: Sequence[str]
    maps: Mapping[str, Any]

    def origin(self) -> dict[str, Any]:
        """For the tuner's description."""
        return {"file": self.file.name, "sha256": sha256(self.file), "format": self.what, "left_out": [*self.unused]}


def read_tuner(
    path: str | Path, backbone: Backbone, condition: str | None = None, ignore: Sequence[str] = ()
) -> Imported:
    """The tuner in another tool's file or folder, built for `backbone`.

    condition: what its maps are, where the file does not say. ignore: regular expressions of keys to leave out.
    Raises `UsageError` for a format that is not known, a file for another base, and keys that would be dropped, and
    `SctoolError` for a damaged file.
    """
    wrong = [text for text in ignore if not _valid(text)]
    if wrong:
        raise UsageError(f"--ignore {wrong[0]} is not a valid regular expression.")
    path = Path(path).expanduser()
    if file := published_file(path):
        return published(file, backbone, condition, ignore)
    foreign = read_foreign(path)
    form = recognised(foreign)
    reading = form.read(foreign, backbone, condition)
    unused = [key for key in foreign.tensors if key not in reading.used]
    refuse_unused(foreign.path, [key for key in unused if not any(re.search(text, key) for text in ignore)])
    tuner = built(foreign.path, reading, backbone)
    if condition and not tuner.conditions:
        raise UsageError(f"{foreign.path} is {form.what}, which has no condition maps; leave --cond out.")
    return Imported(tuner, foreign.path, form.what, reading.used, unused, {})


def published(file: Path, backbone: Backbone, condition: str | None, ignore: Sequence[str]) -> Imported:
    """A ControlNet, T2I-Adapter or ControlNet-XS in diffusers' own format. All its keys are used, or it is refused."""
    if ignore:
        raise UsageError("an adapter of diffusers is read as a whole; leave --ignore out.")
    tuner, meta = load_tuner(file, backbone, condition=condition), read_meta(file, condition)
    used = {name.removeprefix(meta["prefix"]): name for name in tuner.state_dict()}
    return Imported(tuner, file, f"{tuner.method} of diffusers", used, (), meta["maps"])


def refuse_unused(file: Path, keys: Sequence[str]) -> None:
    """Raises `UsageError` for keys that are neither used nor to be ignored."""
    if keys:
        shown = ", ".join(keys[:SHOWN]) + (" ..." if len(keys) > SHOWN else "")
        raise UsageError(
            f"{file} has {len(keys)} keys that would be dropped: {shown}. --ignore REGEX leaves keys out on purpose."
        )


def built(file: Path, reading: Reading, backbone: Backbone) -> Tuner:
    """The tuner with the file's weights. Raises `SctoolError` for weights that are no numbers or do not fit."""
    bad = [name for name, value in reading.state.items() if not torch.isfinite(value).all()]
    if bad:
        raise SctoolError(f"{file}: {bad[0]} has values that are not finite; the file is damaged.")
    config = method_config(reading.method, reading.config)
    tuner = tuner_class(reading.method).build(config, backbone.denoiser, reading.conditions, backbone.vae_scale)
    wanted = {name: value.shape for name, value in tuner.state_dict().items()}
    theirs = {name: value.shape for name, value in reading.state.items()}
    if wanted != theirs:
        name = next(name for name in sorted(wanted.keys() | theirs.keys()) if wanted.get(name) != theirs.get(name))
        found, here = (tuple(one[name]) if name in one else "absent" for one in (theirs, wanted))
        raise UsageError(
            f"{file} does not fit --base {backbone.id}: {name} is {found} in it and {here} here. Give the base that it "
            "is for."
        )
    tuner.load_state_dict({name: value.float() for name, value in reading.state.items()})
    tuner.use(backbone)
    return tuner


def write_tuner(out: Path, imported: Imported, backbone: Backbone) -> Path:
    """Writes the tuner in our own format into the folder `out`; returns the file."""
    return save_tuner(out, imported.tuner, backbone, maps=imported.maps, imported=imported.origin())


def _valid(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
