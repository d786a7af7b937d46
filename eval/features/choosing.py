"""Feature extractors for distances between sets of pictures, and which of them to take.

An extractor has a name, a dimension, the label and key of the Fréchet distance that it gives, the mark that follows
the names of other metrics, and a protocol; called with uint8 pictures (B, 3, H, W) it gives float32 features (B, D).
Only Inception features give figures called FID, KID and so on without a mark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core.errors import SctoolError, UsageError, unknown
from ...core.files import sha256
from .clip_models import MiniClip, OpenClip, TransformersClip, mini_at_hand, prepared
from .clip_weights import Purpose, choose_clip
from .inception import INCEPTION_URL, InceptionFeatures, find_inception, inception_cache, is_offline, offline_reason

FEATURES = ("auto", "inception", "inception-clean", "clip", "dinov2", "mini")
DINOV2 = "facebook/dinov2-large"
WEIGHTS = {
    "inception": f"It is {INCEPTION_URL}",
    "clip": "It is a file of open_clip's ViT-L-14-336, or a folder of open_clip or transformers.",
    "dinov2": f"It is a folder with config.json and model.safetensors of {DINOV2}.",
}
"""What `--weights NAME=PATH` may name, and what lies there."""
CLIP_336 = Purpose("CMMD or FD-CLIP", "--weights clip=", "CMMD (mini features)", "ViT-L-14-336")


class Extractor(Protocol):
    """What a feature extractor offers."""

    name: str
    dim: int
    label: str
    key: str
    mark: str
    protocol: dict[str, Any]

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features (B, D) of uint8 pictures (B, 3, H, W)."""
        ...


class MiniFeatures:
    """The unit picture embeddings of the embedded CLIP. Small and trained on garments: never called FID."""

    name, label, key, mark = "mini", "FD (mini features)", "fd_mini", " (mini features)"

    def __init__(self, clip: MiniClip) -> None:
        self.clip, self.dim = clip, clip.dim
        self.protocol = {"extractor": "mini CLIP, unit picture embeddings", **clip.protocol}

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features (B, D) of uint8 pictures (B, 3, H, W)."""
        return self.clip.images(pictures)


class ClipFeatures:
    """A CLIP's picture embeddings as they are, not of unit length; pictures are resized whole, not cropped."""

    name, label, key, mark = "clip", "FD-CLIP", "fd_clip", " (CLIP features)"

    def __init__(self, clip: OpenClip | TransformersClip) -> None:
        self.clip, self.dim = clip, clip.dim
        self.protocol = {
            **clip.protocol,
            "extractor": f"{clip.protocol['clip_model']}, picture embeddings",
            "resize": f"bicubic, antialias, to {clip.size}x{clip.size}",
        }

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features (B, D) of uint8 pictures (B, 3, H, W)."""
        return self.clip.embed(pictures, crop=False)


class DinoFeatures:
    """DINOv2's class token after the last norm: Stein et al. 2023 (arXiv 2306.04675) put it in Inception's place."""

    name, label, key, mark = "dinov2", "FD-DINOv2", "fd_dinov2", " (DINOv2 features)"
    side = 224
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Loads a folder in transformers' format. Raises `SctoolError` when it is another network."""
        from transformers import Dinov2Model
        from transformers.utils import logging

        logging.disable_progress_bar()  # it would break ours
        try:
            net = Dinov2Model.from_pretrained(
                str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise SctoolError(
                f"DINOv2 model {folder} cannot be loaded: {str(error).splitlines()[0]}. It is {DINOV2} of the hub."
            ) from error
        self.net = net.eval().requires_grad_(False).to(device)
        self.device, self.dim = device, int(net.config.hidden_size)
        self.protocol = {
            "extractor": f"DINOv2, {self.dim} class token features",
            "weights_sha256": [sha256(file) for file in sorted(folder.glob("*.safetensors"))],
            "resize": f"bicubic, antialias, to {self.side}x{self.side}",
        }

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Features (B, D) of uint8 pictures (B, 3, H, W)."""
        return self.net(prepared(pictures.to(self.device), self.side, self.mean, self.std, crop=False)).pooler_output


def find_dinov2(weights: str | Path | None, offline: bool) -> Path:
    """The DINOv2 folder: the given one, the hub's cache, or a download. Raises `UsageError`, `SctoolError`."""
    if weights is not None:
        folder = Path(weights).expanduser()
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"--weights dinov2={weights}: no folder with config.json and model.safetensors of {DINOV2}."
            )
        return folder
    from huggingface_hub import hf_hub_download

    try:
        files = [
            hf_hub_download(DINOV2, name, local_files_only=is_offline(offline))
            for name in ("config.json", "model.safetensors")
        ]
    except Exception as error:  # the hub client raises a dozen kinds for "not reachable" and "not there"
        reason = offline_reason(offline)
        if not is_offline(offline):
            reason = f"the download failed ({type(error).__name__})"
        raise SctoolError(
            f"DINOv2 features need {DINOV2}, and {reason}. Either download its config.json and model.safetensors "
            f"from https://huggingface.co/{DINOV2} and give the folder with --weights dinov2=PATH, or use "
            "--features mini, the embedded features (reported as 'FD (mini features)')."
        ) from error
    return Path(files[-1]).parent


def named_weights(specs: Sequence[str], features: str) -> dict[str, str]:
    """`--weights` by network: each is `NAME=PATH` with a name of `WEIGHTS`, or the PATH for what `--features` names.

    Raises `UsageError` for unknown features or networks, a network given twice, a path that does not exist, or mini
    features, which take none.
    """
    if features not in FEATURES:
        raise unknown("--features value", features, FEATURES)
    found: dict[str, str] = {}
    for spec in specs:
        name, mark, path = spec.partition("=")
        if not mark or name not in WEIGHTS:
            if mark and "/" not in name and not Path(spec).expanduser().exists():
                raise unknown("--weights network", name, WEIGHTS, " Write NETWORK=PATH, or the path alone.")
            name, path = features if features in WEIGHTS else "inception", spec
            if features == "mini":
                raise UsageError(
                    f"--weights {spec} are Inception weights, which --features mini does not use. "
                    "Leave out one of the two."
                )
        if name in found:
            raise UsageError(f"--weights gives {name} twice: {found[name]} and {path}.")
        found[name] = path
    for name, path in found.items():
        if not Path(path).expanduser().exists():
            named = f"{name}={path}" if f"{name}={path}" in specs else path
            raise UsageError(f"--weights {named}: no such file. {WEIGHTS[name]}")
    return found


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
    """The extractor for `kind`, one of `FEATURES`; `weights` as `named_weights` gives them.

    "auto" is Inception where its weights are at hand; where they are not, pictures of the embedded base fall back to
    mini features and `note` is told; for other bases the weights are downloaded. Raises `UsageError`, `SctoolError`.
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
    at_hand = "inception" in weights or inception_cache().is_file()
    if kind == "auto" and not at_hand and base == "mini" and mini_at_hand():
        note(
            "no Inception weights here: computing 'FD (mini features)' with the embedded CLIP, which is no FID. "
            f"For FID, download {INCEPTION_URL} and give it with --weights PATH."
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
    """CLIP ViT-L/14 at 336 px, which CMMD is made of, by the rule of `choose_features`: "auto" may fall back to mini.

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
