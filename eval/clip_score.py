"""CLIP score: the cosine between a picture and its prompt, raw and in the two scales that papers use.

Hessel et al. 2021 (arXiv 2104.08718, eq. 1): 2.5 max(cos, 0). Text-to-image papers: 100 cos. No prefix is put before
the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..core.errors import SctoolError, UsageError, unknown
from .clip_models import ClipModel, MiniClip, OpenClip, TransformersClip, mini_at_hand
from .features import FEATURES, is_offline

DEFAULT_MODEL, DEFAULT_TAG = "ViT-L-14", "openai"
W = 2.5
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class ClipScore:
    """Streaming sums of cosines; mergeable."""

    def __init__(self) -> None:
        self.n, self._cos, self._positive = 0, 0.0, 0.0

    def update(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        """Adds unit embeddings of pictures and of their prompts, (B, D) each."""
        cos = (images.double() * texts.double()).sum(-1).cpu()
        self.n += len(cos)
        self._cos += float(cos.sum())
        self._positive += float(cos.clamp(min=0).sum())

    def merge(self, other: ClipScore) -> None:
        """Adds what another process has counted."""
        self.n, self._cos, self._positive = self.n + other.n, self._cos + other._cos, self._positive + other._positive

    def compute(self) -> dict[str, float]:
        """Means: "cos" in -1..1, "100" = 100 cos, "w2.5" = 2.5 max(cos, 0)."""
        if not self.n:
            raise SctoolError("a CLIP score needs pictures with prompts; there is none.")
        cos = self._cos / self.n
        return {"cos": cos, "100": 100 * cos, "w2.5": W * self._positive / self.n}


def find_weights(
    model: str, weights: str | None, offline: bool, *, local_only: bool = False
) -> tuple[Path, bool] | None:
    """The weight file of an open_clip model, and whether it was trained with the quick GELU.

    `weights` is a file or one of open_clip's tags. None where `local_only` and they are not in the cache.
    Raises `UsageError` for an unknown model or tag, `SctoolError` naming the remedies where they cannot be had.
    """
    import open_clip
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if model not in open_clip.list_models():
        raise unknown("--clip-model", model, open_clip.list_models())
    if weights and Path(weights).expanduser().is_file():
        return Path(weights).expanduser(), model.endswith("quickgelu")
    tags = open_clip.list_pretrained_tags_by_model(model)
    tag = weights or (DEFAULT_TAG if DEFAULT_TAG in tags else tags[0] if tags else "")
    if tag not in tags:
        if weights and ("/" in weights or "." in weights):
            raise UsageError(f"--clip-weights {weights}: no such file.")
        raise unknown(f"--clip-weights of {model}", tag, tags or ["none: give a file"])
    config = open_clip.get_pretrained_cfg(model, tag)
    quick = bool(config.get("quick_gelu", False))
    repository = str(config.get("hf_hub", "")).strip("/")
    for name in WEIGHT_FILES if repository else ():
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached), quick
    if local_only:
        return None
    reason = "the network is not to be used (--offline)"
    if repository and not is_offline(offline):
        for name in WEIGHT_FILES:
            try:
                return Path(hf_hub_download(repository, name)), quick
            except Exception as error:  # the hub client raises a dozen kinds for "not reachable" and "not there"
                reason = f"the download failed ({type(error).__name__})"
    raise SctoolError(
        f"the CLIP score needs the weights of open_clip {model} ({tag}), and {reason}. Either download "
        f"{WEIGHT_FILES[0]} from https://huggingface.co/{repository} and give it with --clip-weights PATH, "
        "or use --features mini, the embedded CLIP (reported as 'CLIP score (mini)')."
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
) -> ClipModel:
    """The CLIP model, by the same rule as `choose_features`; `kind` is one of `FEATURES`.

    `model` is an open_clip name or a folder (open_clip's or transformers'); naming it or its weights rules mini out.
    Raises `UsageError`, `SctoolError`.
    """
    if kind not in FEATURES:
        raise unknown("--features value", kind, FEATURES)
    named = model is not None or weights is not None
    if kind == "mini" and not named:
        return mini()
    if model is not None and Path(model).expanduser().is_dir():
        folder = Path(model).expanduser()
        if (folder / "open_clip_config.json").is_file():
            return OpenClip(f"local-dir:{folder}", None, device)
        if (folder / "config.json").is_file():
            return TransformersClip(folder, device)
        raise UsageError(f"--clip-model {model} holds neither open_clip_config.json nor config.json.")
    name = model or DEFAULT_MODEL
    if kind == "auto" and not named and base == "mini" and mini_at_hand():
        found = find_weights(name, None, offline, local_only=True)
        if found is None:
            note(
                f"no CLIP weights here: computing 'CLIP score (mini)' with the embedded CLIP. For the usual score give "
                f"--clip-weights PATH of open_clip {name}."
            )
            return mini()
    else:
        found = find_weights(name, weights, offline)
    assert found is not None
    return OpenClip(name, found[0], device, quick_gelu=found[1])
