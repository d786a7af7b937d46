"""Which CLIP model to use and where its weights are: a file, a folder, the hub's cache, or a download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...core.backbones.bases import EMBEDDED
from ...core.errors import SctoolError, UsageError, unknown
from .clip_models import ClipModel, MiniClip, OpenClip, TransformersClip, mini_installed
from .inception import is_offline, offline_reason
from .names import CLIP_MODEL, CLIP_TAG

WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Purpose:
    """What a CLIP model is used for, as messages put it."""

    name: str
    flag: str
    """The flag that takes a path to weights, up to the path."""
    mini: str
    """Name of the figure when the embedded CLIP computes it."""
    model: str
    """open_clip's name of the default model."""


SCORE = Purpose("the CLIP score", "--clip-weights ", "CLIP score (mini)", CLIP_MODEL)


def find_weights(
    model: str, weights: str | None, offline: bool, *, local_only: bool = False, purpose: Purpose = SCORE
) -> tuple[Path, bool] | None:
    """The weight file of an open_clip model, and whether it was trained with the quick GELU.

    `weights` is a file or one of open_clip's tags. None if `local_only` and the weights are not in the cache.
    Raises `UsageError` for an unknown model or tag, and `SctoolError` with the remedies if they are unavailable.
    """
    import open_clip
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if model not in open_clip.list_models():
        raise unknown("--clip-model", model, open_clip.list_models())
    if weights and Path(weights).expanduser().is_file():
        return Path(weights).expanduser(), model.endswith("quickgelu")
    tags = open_clip.list_pretrained_tags_by_model(model)
    tag = weights or (CLIP_TAG if CLIP_TAG in tags else tags[0] if tags else "")
    if tag not in tags:
        if weights and ("/" in weights or "." in weights):
            raise UsageError(f"{purpose.flag}{weights}: no such file.")
        raise unknown(f"{purpose.flag.strip(' =')} of {model}", tag, tags or ["none: pass a file"])
    config = open_clip.get_pretrained_cfg(model, tag)
    quick = bool(config.get("quick_gelu", False))
    repository = str(config.get("hf_hub", "")).strip("/")
    for name in WEIGHT_FILES if repository else ():
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached), quick
    if local_only:
        return None
    reason = offline_reason(offline)
    if repository and not is_offline(offline):
        for name in WEIGHT_FILES:
            try:
                return Path(hf_hub_download(repository, name)), quick
            except Exception as error:  # the hub client raises a dozen types for "unreachable" and "missing"
                reason = f"the download failed ({type(error).__name__})"
    raise SctoolError(
        f"{purpose.name} needs the weights of open_clip {model} ({tag}), and {reason}. Either download "
        f"{WEIGHT_FILES[0]} from https://huggingface.co/{repository} and pass it with {purpose.flag}PATH, "
        f"or use --features mini, the embedded CLIP (reported as '{purpose.mini}')."
    )


def choose_clip(
    kind: str,
    *,
    model: str | None = None,
    weights: str | None = None,
    base: str | None = None,
    offline: bool = False,
    device: str = "cpu",
    note: Callable[[str], None] = lambda text: None,
    mini: Callable[[], MiniClip] = MiniClip,
    purpose: Purpose = SCORE,
) -> ClipModel:
    """The CLIP model by the rule of `choose_features`; `kind` is "auto", "mini", or any other text for no fallback.

    `model` is an open_clip name or a folder (open_clip's or transformers'). With a named model or weights, mini is
    never used. Raises `UsageError` or `SctoolError`.
    """
    named = model is not None or weights is not None
    if kind == "mini" and not named:
        return mini()
    if model is not None and Path(model).expanduser().is_dir():
        folder = Path(model).expanduser()
        if (folder / "open_clip_config.json").is_file():
            return OpenClip(f"local-dir:{folder}", None, device)
        if (folder / "config.json").is_file():
            return TransformersClip(folder, device)
        flag = "--clip-model " if purpose is SCORE else purpose.flag
        raise UsageError(f"{flag}{model} contains neither open_clip_config.json nor config.json.")
    name = model or purpose.model
    if kind == "auto" and not named and base in EMBEDDED and mini_installed():
        file = find_weights(name, None, offline, local_only=True, purpose=purpose)
        if file is None:
            note(
                f"no CLIP weights on this machine: computing '{purpose.mini}' with the embedded CLIP. For the usual "
                f"figure pass {purpose.flag}PATH of open_clip {name}."
            )
            return mini()
    else:
        file = find_weights(name, weights, offline, purpose=purpose)
    assert file is not None
    return OpenClip(name, file[0], device, quick_gelu=file[1])
