"""TensorFlow's Inception of 2015 as ported by pytorch-fid: FID is defined on its 2048 pool features."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SctoolError, UsageError
from ...core.files import sha256
from .names import INCEPTION_FILE, INCEPTION_URL

SIDE = 299


class FidInception(nn.Module):
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
    """Pool features after pytorch-fid's or clean-fid's resize, and class logits computed from them."""

    dim, classes = 2048, 1008

    def __init__(self, weights: Path, device: str = "cpu", *, clean: bool = False) -> None:
        """Loads `weights` (a state dict, without pickle). Raises `SctoolError` for any other file.

        clean: resize and normalise as clean-fid does (Parmar et al. 2022, arXiv 2104.11222): bicubic with antialias.
        """
        self.device, self.clean = device, clean
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            net = FidInception()
            net.net.load_state_dict(state)
        except Exception as error:
            raise SctoolError(
                f"--weights {weights} is not pytorch-fid's Inception ({str(error).splitlines()[0]}). "
                f"Download it from {INCEPTION_URL}"
            ) from error
        self.net = net.eval().requires_grad_(False).to(device)
        self.name, self.label, self.key, self.mark = "inception", "FID", "fid", ""
        resize = f"bilinear, no antialias, to {SIDE}x{SIDE} (pytorch-fid's rule)"
        if clean:
            self.name, self.label, self.key, self.mark = "clean", "FID (clean resize)", "fid_clean", " (clean resize)"
            resize = f"bicubic, antialias, not quantised, to {SIDE}x{SIDE} (clean-fid's rule)"
        self.protocol = {
            "extractor": "pytorch-fid InceptionV3, 2048 pool features",
            "weights_sha256": sha256(weights),
            "resize": resize,
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of uint8 images (B, 3, H, W)."""
        images = images.to(self.device)
        if self.clean:
            return self.net((clean_resize(images) - 128) / 128)
        x = F.interpolate(images.float() / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return self.net(2 * x - 1)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, 1008) of features (B, 2048), without bias, as the Inception score uses them."""
        return features @ self.net.net.fc.weight.T


def clean_resize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 (B, 3, 299, 299) in 0..255: Pillow's bicubic on float channels, clipped."""
    x = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    return x.clamp(0, 255)


def is_offline(offline: bool) -> bool:
    """Whether network access is forbidden, by the flag or by the hub's environment variable."""
    return offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def offline_reason(offline: bool) -> str:
    """Why nothing was downloaded, for messages; `offline` is the flag."""
    return f"downloads are forbidden ({'--offline' if offline else 'HF_HUB_OFFLINE is set'})"


def inception_cache() -> Path:
    """Where torch.hub, and therefore pytorch-fid, stores the Inception weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def find_inception(weights: str | Path | None, offline: bool) -> Path:
    """The Inception weights: the given file, the cached one, or a download.

    Raises `UsageError` for a missing file and `SctoolError`, with the remedies, if they are unavailable.
    """
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UsageError(f"--weights {weights}: no such file. It is {INCEPTION_URL}")
        return path
    cached = inception_cache()
    if cached.is_file():
        return cached
    reason = offline_reason(offline)
    if not is_offline(offline):
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(cached), hash_prefix="6726825d", progress=False)
            return cached
        except (OSError, RuntimeError) as error:  # no network, a full disk, or a wrong checksum
            reason = f"the download failed ({error})"
    raise SctoolError(
        f"Inception features (FID, KID, IS, precision and recall) need their weights, and {reason}. Either download "
        f"{INCEPTION_URL} and pass it with --weights PATH (or put it at {cached}), or use --features mini, the "
        "embedded features (reported as 'FD (mini features)', not FID)."
    )
