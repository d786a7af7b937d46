"""Feature extractors for distances between image sets, and which of them to use.

Only figures of Inception features are called FID, KID and so on; other names say which features they use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core.backbones.bases import EMBEDDED
from ...core.errors import SctoolError, UsageError, unknown
from ...core.files import sha256
from .clip_models import MiniClip, OpenClip, TransformersClip, mini_installed, prepared
from .clip_weights import Purpose, choose_clip
from .inception import InceptionFeatures, find_inception, inception_cache, is_offline, offline_reason
from .names import DINOV2, FEATURES, INCEPTION_URL

CLIP_336 = Purpose("CMMD or FD-CLIP", "--weights clip=", "CMMD (mini features)", "ViT-L-14-336")


class Extractor(Protocol):
    """A network that turns images into features."""

    name: str
    dim: int
    label: str
    """Name of the Fréchet distance of its features, e.g. "FID"."""
    key: str
    """Key of that figure."""
    mark: str
    """Suffix of the names of other metrics, e.g. " (mini features)"; empty for Inception."""
    protocol: dict[str, Any]

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D), float32, of uint8 images (B, 3, H, W)."""
        ...


class MiniFeatures:
    """Unit image embeddings of the embedded CLIP, which is small and trained on garments: never called FID."""

    name, label, key, mark = "mini", "FD (mini features)", "fd_mini", " (mini features)"

    def __init__(self, clip: MiniClip) -> None:
        self.clip, self.dim = clip, clip.dim
        self.protocol = {"extractor": "mini CLIP, unit picture embeddings", **clip.protocol}

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D), float32, of uint8 images (B, 3, H, W)."""
        return self.clip.images(images)


class ClipFeatures:
    """A CLIP's image embeddings, not normalised; images are resized without cropping."""

    name, label, key, mark = "clip", "FD-CLIP", "fd_clip", " (CLIP features)"

    def __init__(self, clip: OpenClip | TransformersClip) -> None:
        self.clip, self.dim = clip, clip.dim
        self.protocol = {
            **clip.protocol,
            "extractor": f"{clip.protocol['clip_model']}, picture embeddings",
            "resize": f"bicubic, antialias, to {clip.size}x{clip.size}",
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D), float32, of uint8 images (B, 3, H, W)."""
        return self.clip.embed(images, crop=False)


class DinoFeatures:
    """DINOv2's class token after the last norm, which Stein et al. 2023 (arXiv 2306.04675) use instead of Inception."""

    name, label, key, mark = "dinov2", "FD-DINOv2", "fd_dinov2", " (DINOv2 features)"
    side = 224
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Loads a folder in transformers' format. Raises `SctoolError` if it is not a DINOv2."""
        from transformers import Dinov2Model
        from transformers.utils import logging

        logging.disable_progress_bar()  # it would interfere with ours
        try:
            net = Dinov2Model.from_pretrained(
                str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise SctoolError(
                f"DINOv2 model {folder} cannot be loaded: {str(error).splitlines()[0]}. It should be {DINOV2}."
            ) from error
        self.net = net.eval().requires_grad_(False).to(device)
        self.device, self.dim = device, int(net.config.hidden_size)
        self.protocol = {
            "extractor": f"DINOv2, {self.dim} class token features",
            "weights_sha256": [sha256(file) for file in sorted(folder.glob("*.safetensors"))],
            "resize": f"bicubic, antialias, to {self.side}x{self.side}",
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D), float32, of uint8 images (B, 3, H, W)."""
        return self.net(prepared(images.to(self.device), self.side, self.mean, self.std, crop=False)).pooler_output


def find_dinov2(weights: str | Path | None, offline: bool) -> Path:
    """The DINOv2 folder: the given one, the hub's cache, or a download. Raises `UsageError` or `SctoolError`."""
    if weights is not None:
        folder = Path(weights).expanduser()
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"--weights dinov2={weights}: there is no folder with config.json and model.safetensors of {DINOV2}."
            )
        return folder
    from huggingface_hub import hf_hub_download

    try:
        files = [
            hf_hub_download(DINOV2, name, local_files_only=is_offline(offline))
            for name in ("config.json", "model.safetensors")
        ]
    except Exception as error:  # the hub client raises a dozen types for "unreachable" and "missing"
        reason = offline_reason(offline)
        if not is_offline(offline):
            reason = f"the download failed ({type(error).__name__})"
        raise SctoolError(
            f"DINOv2 features need {DINOV2}, and {reason}. Either download its config.json and model.safetensors "
            f"from https://huggingface.co/{DINOV2} and pass the folder with --weights dinov2=PATH, or use "
            "--features mini, the embedded features (reported as 'FD (mini features)')."
        ) from error
    return Path(files[-1]).parent


def choose_features(
    kind: str,
    *,
    weights: Mapping[str, str] | None = None,
    base: str | None = None,
    offline: bool = False,
    device: str = "cpu",
    note: Callable[[str], None] = lambda text: None,
    mini: Callable[[], MiniClip] = MiniClip,
) -> Extractor:
    """The extractor for `kind`, one of `FEATURES`; `weights` as `named_weights` returns them.

    "auto" is Inception. If its weights are not on this machine, images of the embedded base use mini features, with a
    note; for other bases the weights are downloaded. Raises `UsageError` or `SctoolError`.
    """
    weights = weights or {}
    if kind not in FEATURES:
        raise unknown("--features value", kind, FEATURES)
    if kind == "mini":
        return MiniFeatures(mini())
    if kind == "clip":
        return clip_features("clip", weights=weights, base=base, offline=offline, device=device)
    if kind == "dinov2":
        return DinoFeatures(find_dinov2(weights.get("dinov2"), offline), device)
    available = "inception" in weights or inception_cache().is_file()
    if kind == "auto" and not available and base in EMBEDDED and mini_installed():
        note(
            "no Inception weights on this machine: computing 'FD (mini features)' with the embedded CLIP, which is not "
            f"a FID. For FID, download {INCEPTION_URL} and pass it with --weights PATH."
        )
        return MiniFeatures(mini())
    file = find_inception(weights.get("inception"), offline)
    return InceptionFeatures(file, device, clean=kind == "inception-clean")


def clip_features(
    kind: str,
    *,
    weights: Mapping[str, str],
    base: str | None = None,
    offline: bool = False,
    device: str = "cpu",
    note: Callable[[str], None] = lambda text: None,
    mini: Callable[[], MiniClip] = MiniClip,
) -> Extractor:
    """CLIP ViT-L/14 at 336 px, which CMMD uses; "auto" may fall back to mini as in `choose_features`.

    Weights are a file of open_clip's ViT-L-14-336 or a folder of open_clip or transformers.
    """
    given = weights.get("clip")
    folder = given is not None and Path(given).expanduser().is_dir()
    clip = choose_clip(
        kind,
        model=given if folder else None,
        weights=None if folder else given,
        base=base,
        offline=offline,
        device=device,
        note=note,
        mini=mini,
        purpose=CLIP_336,
    )
    if isinstance(clip, MiniClip):
        return MiniFeatures(clip)
    assert isinstance(clip, OpenClip | TransformersClip)
    return ClipFeatures(clip)
