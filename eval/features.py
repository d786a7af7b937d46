"""Feature extractors for the Fréchet distance: pytorch-fid's Inception, or the embedded mini CLIP.

An extractor has a name, a dimension, the label of the distance that it gives, and a protocol; called with uint8
pictures (B, 3, H, W) it gives float32 features (B, D). Only Inception features give a figure called FID.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import SctoolError, UsageError, unknown
from ..core.files import sha256
from .clip_models import MiniClip, mini_at_hand

FEATURES = ("auto", "inception", "mini")
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"


class Extractor(Protocol):
    """What a feature extractor offers."""

    name: str
    dim: int
    label: str
    key: str
    protocol: dict[str, Any]

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features (B, D) of uint8 pictures (B, 3, H, W)."""
        ...


class _FidInception(nn.Module):
    """pytorch-fid's Inception up to its last average pool, built without that package's download."""

    def __init__(self) -> None:
        super().__init__()
        from pytorch_fid import inception as fid
        from torchvision.models import inception_v3

        net = inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
        net.Mixed_5b = fid.FIDInceptionA(192, pool_features=32)
        net.Mixed_5c = fid.FIDInceptionA(256, pool_features=64)
        net.Mixed_5d = fid.FIDInceptionA(288, pool_features=64)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            setattr(net, f"Mixed_{name}", fid.FIDInceptionC(768, channels_7x7=width))
        net.Mixed_7b = fid.FIDInceptionE_1(1280)
        net.Mixed_7c = fid.FIDInceptionE_2(2048)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 2048) of pixels (B, 3, 299, 299) in -1..1."""
        net = self.net
        x = net.Conv2d_2b_3x3(net.Conv2d_2a_3x3(net.Conv2d_1a_3x3(x)))
        x = net.Conv2d_4a_3x3(net.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(net, f"Mixed_{name}")(x)
        return x.mean((2, 3))


class InceptionFeatures:
    """The 2048 pool features of the TensorFlow Inception of 2015, as pytorch-fid ports it: what FID means."""

    name, dim, label, key = "inception", 2048, "FID", "fid"

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        """Loads `weights` (a state dict, without pickle). Raises `SctoolError` when the file is another one."""
        self.device = device
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            net = _FidInception()
            net.net.load_state_dict(state)
        except Exception as error:
            raise SctoolError(
                f"--weights {weights} is not pytorch-fid's Inception ({str(error).splitlines()[0]}). "
                f"Download it from {INCEPTION_URL}"
            ) from error
        self.net = net.eval().requires_grad_(False).to(device)
        self.protocol = {
            "extractor": "pytorch-fid InceptionV3, 2048 pool features",
            "weights_sha256": sha256(weights),
            "resize": "bilinear, no antialias, to 299x299 (pytorch-fid's rule)",
        }

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Features (B, 2048) of uint8 pictures (B, 3, H, W)."""
        x = pictures.to(self.device).float() / 255
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        return self.net(2 * x - 1)


class MiniFeatures:
    """The unit picture embeddings of the embedded CLIP. Small and trained on garments: never called FID."""

    name, label, key = "mini", "FD (mini features)", "fd_mini"

    def __init__(self, clip: MiniClip) -> None:
        self.clip, self.dim = clip, clip.dim
        self.protocol = {"extractor": "mini CLIP, unit picture embeddings", **clip.protocol}

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features (B, D) of uint8 pictures (B, 3, H, W)."""
        return self.clip.images(pictures)


def is_offline(offline: bool) -> bool:
    """Whether the network is forbidden, by flag or by the hub's own variable."""
    return offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def inception_cache() -> Path:
    """Where torch.hub, and so pytorch-fid, keeps the Inception weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def find_inception(weights: str | Path | None, offline: bool) -> Path:
    """The Inception weights: the given file, the cached one, or a download.

    Raises `UsageError` for a missing file and `SctoolError`, naming the remedies, when they cannot be had.
    """
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UsageError(f"--weights {weights}: no such file. It is {INCEPTION_URL}")
        return path
    cached = inception_cache()
    if cached.is_file():
        return cached
    reason = "the network is not to be used (--offline)"
    if not is_offline(offline):
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(cached), hash_prefix="6726825d", progress=False)
            return cached
        except (OSError, RuntimeError) as error:  # no network, a full disk, or other bytes than expected
            reason = f"the download failed ({error})"
    raise SctoolError(
        f"FID needs the Inception weights, and {reason}. Either download {INCEPTION_URL} and give it with "
        f"--weights PATH (or put it at {cached}), or use --features mini, the embedded features "
        "(reported as 'FD (mini features)', not FID)."
    )


def choose_features(
    kind: str,
    *,
    weights: str | Path | None = None,
    base: str | None = None,
    offline: bool = False,
    device: str = "cpu",
    note: Callable[[str], None] = lambda text: None,
    mini: Callable[[], MiniClip] = MiniClip,
) -> Extractor:
    """The extractor for `kind`, one of `FEATURES`.

    "auto" is Inception where its weights are at hand; where they are not, pictures of the embedded base fall back to
    mini features and `note` is told; for other bases the weights are downloaded. Raises `UsageError`, `SctoolError`.
    """
    if kind not in FEATURES:
        raise unknown("--features value", kind, FEATURES)
    if kind == "mini" and weights is not None:
        raise UsageError(
            "--weights are Inception weights, which --features mini does not use. Leave out one of the two."
        )
    if kind == "mini":
        return MiniFeatures(mini())
    at_hand = weights is not None or inception_cache().is_file()
    if kind == "auto" and not at_hand and base == "mini" and mini_at_hand():
        note(
            "no Inception weights here: computing 'FD (mini features)' with the embedded CLIP, which is no FID. "
            f"For FID, download {INCEPTION_URL} and give it with --weights PATH."
        )
        return MiniFeatures(mini())
    return InceptionFeatures(find_inception(weights, offline), device)
