"""Finding a base, and what its files say without loading it: family, resolution, content hash, licence.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SctoolError, UsageError, unknown
from ..files import sha256
from .families import Family, family_of_pipeline

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = {name: ASSETS / name for name in ("mini", "mini-dit")}


def find_base(base: str, offline: bool = False) -> Path:
    """The folder of `base`: an embedded base, a local folder, or a downloaded hub snapshot.

    Raises `UsageError` for anything else, `SctoolError` when a hub id cannot be fetched. Local paths never touch the
    network.
    """
    if base in EMBEDDED:
        return EMBEDDED[base]
    path = Path(base).expanduser()
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise UsageError(
                f"--base {base} is not a diffusers-format folder: it has no model_index.json. Give the folder with "
                "unet/, vae/ and text_encoder/; convert a single checkpoint file with diffusers' "
                "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
            )
        return path
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", base):
        if "/" in base or base.startswith((".", "~")):
            raise UsageError(f"--base {base}: there is no such folder, and it is not a hub id (OWNER/NAME).")
        raise unknown("base", base, EMBEDDED)
    try:
        from diffusers import DiffusionPipeline

        return Path(DiffusionPipeline.download(base, local_files_only=offline, use_safetensors=True))
    except Exception as error:  # the hub client raises a dozen kinds for "not reachable" and "not there"
        raise SctoolError(
            f"cannot get base '{base}' from the hub ({type(error).__name__}). "
            "Use a local diffusers folder, or the embedded base: --base mini."
        ) from error


def read_config(folder: Path, part: str, base: str) -> dict[str, Any]:
    """The config.json of one part. Raises `UsageError` naming the file when it cannot be read."""
    try:
        return json.loads((folder / part / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--base {base}: {part}/config.json cannot be read ({error}).") from error


def family_of_base(folder: Path, base: str) -> Family:
    """The family of the base in `folder`. Raises `UsageError` for other pipelines and unreadable files."""
    try:
        pipeline = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--base {base}: its model_index.json cannot be read ({error}).") from error
    return family_of_pipeline(pipeline, base)


def family_of(base: str, offline: bool = False) -> Family:
    """The family of a base by name, folder or hub id. Raises as `find_base` and `family_of_base` do."""
    return family_of_base(find_base(base, offline), base)


def downsampling_factor(vae_config: Mapping[str, Any]) -> int:
    """The autoencoder's downsampling factor: image side over latent side (8 for Stable Diffusion).

    Raises `UsageError` for a config that does not say it.
    """
    for key in ("block_out_channels", "encoder_block_out_channels"):
        if key in vae_config:
            return 2 ** (len(vae_config[key]) - 1)
    raise UsageError("vae/config.json does not say how often the autoencoder halves an image (block_out_channels).")


def resolution(base: str, offline: bool = False) -> int:
    """The image side in pixels that `base` was trained at, read from its configs alone."""
    folder = find_base(base, offline)
    family = family_of_base(folder, base)
    denoiser, vae = (read_config(folder, part, base) for part in (family.denoiser_part, "vae"))
    try:
        return family.latent_size(denoiser) * downsampling_factor(vae)
    except KeyError as error:
        raise UsageError(f"--base {base}: its configs do not say its resolution ({error} is missing).") from error


def weight_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of one part of a base; the full-precision ones where there are both."""
    files = sorted((folder / part).glob("*.safetensors"))
    return [f for f in files if ".fp16." not in f.name] or files


def content_hash(folder: Path, *parts: str) -> str:
    """SHA-256 over the weight files and configs of `parts`, in order; 64 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        for path in [*weight_files(folder, part), *sorted((folder / part).glob("config.json"))]:
            digest.update(sha256(path).encode())
    return digest.hexdigest()


def licence(folder: Path) -> str:
    """The licence named in the front matter of the base's model card."""
    card = folder / "README.md"
    line = re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.M) if card.is_file() else None
    return line.group(1) if line else "unknown (the base has no model card)"
