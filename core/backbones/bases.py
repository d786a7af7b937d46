"""Where a base lies and what its files say of it: folder, resolution, content hash, licence. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from ..errors import SctoolError, UsageError, unknown
from ..files import sha256

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = {"mini": ASSETS / "mini"}


def locate(base: str, offline: bool = False) -> Path:
    """The folder that holds `base`: an embedded base, a local folder, or a downloaded hub snapshot.

    Raises `UsageError` for what is neither, `SctoolError` when a hub id cannot be fetched. Local paths never
    touch the network.
    """
    if base in EMBEDDED:
        return EMBEDDED[base]
    path = Path(base).expanduser()
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise UsageError(
                f"--base {base} is no diffusers-format folder: it has no model_index.json. Give the folder that holds "
                "unet/, vae/ and text_encoder/; convert a single checkpoint file with diffusers' "
                "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
            )
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        if "/" in base or base.startswith("."):
            raise UsageError(f"--base {base}: no such folder, and no hub id (OWNER/NAME) either.")
        raise unknown("base", base, EMBEDDED)
    try:
        from diffusers import DiffusionPipeline

        return Path(DiffusionPipeline.download(base, local_files_only=offline, use_safetensors=True))
    except Exception as error:  # the hub client raises a dozen kinds for "not reachable" and "not there"
        raise SctoolError(
            f"cannot get base '{base}' from the hub ({type(error).__name__}). "
            "Give a local diffusers folder with --base, or use the embedded base: --base mini."
        ) from error


def resolution(base: str, offline: bool = False) -> int:
    """The side in pixels that `base` was trained at, read from its configs alone."""
    folder = locate(base, offline)
    try:
        size = json.loads((folder / "unet" / "config.json").read_text())["sample_size"]
        blocks = json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--base {base}: the configs of unet/ and vae/ cannot be read ({error}).") from error
    return (size if isinstance(size, int) else size[0]) * 2 ** (len(blocks) - 1)


def weight_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of one part of a base; the full-precision ones where both kinds lie there."""
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
    found = re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.M) if card.is_file() else None
    return found.group(1) if found else "unknown (the base has no model card)"
