"""CLIP models behind one interface: unit embeddings of images and of texts, and a protocol.

`OpenClip` wraps any open_clip model, `TransformersClip` one saved by transformers, `MiniClip` the embedded one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import SctoolError
from ...core.files import sha256

MINI = Path(__file__).parents[2] / "core" / "assets" / "mini" / "clip"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own pixel statistics
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipModel(Protocol):
    """A CLIP model. `label` follows "CLIP score" in reports; empty for all but the embedded model."""

    label: str
    dim: int
    protocol: dict[str, Any]
    truncated: int

    def images(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, D) of uint8 images (B, 3, H, W)."""
        ...

    def texts(self, texts: list[str]) -> Tensor:
        """Unit embeddings (B, D) of texts; long ones are truncated, keep the end token, and are counted."""
        ...


def prepared(images: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...], *, crop: bool) -> Tensor:
    """uint8 (B, 3, H, W) to normalised float32 (B, 3, size, size): bicubic with antialias, not quantised.

    crop: resize the shorter side to `size` and take the centre; else resize both sides.
    """
    x = images.float() / 255
    height, width = x.shape[-2:]
    target = (size, size)
    if crop:
        scale = size / min(height, width)
        target = (max(size, round(height * scale)), max(size, round(width * scale)))
    if (height, width) != target:
        x = F.interpolate(x, size=target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    x = x[..., top : top + size, left : left + size]
    return (x - torch.tensor(mean, device=x.device).view(3, 1, 1)) / torch.tensor(std, device=x.device).view(3, 1, 1)


class TransformersClip:
    """A `CLIPModel` with its tokenizer, saved by transformers. Resolution and context length are the model's own."""

    label = ""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Loads `folder`; the tokenizer is in it or in `tokenizer` beside it. Raises `SctoolError`."""
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # it would interfere with ours

        tokenizer = folder if (folder / "tokenizer_config.json").is_file() else folder.parent / "tokenizer"
        try:
            model = CLIPModel.from_pretrained(
                str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
            self.tokenizer = CLIPTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise SctoolError(f"CLIP model {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
        self.model = model.eval().requires_grad_(False).to(device)
        self.device, self.truncated = device, 0
        self.size = int(model.config.vision_config.image_size)
        self.dim = int(model.config.projection_dim)
        self.context = int(model.config.text_config.max_position_embeddings)
        self.protocol = {
            "clip_model": f"transformers CLIP {folder.parent.name}/{folder.name}",
            "weights_sha256": [sha256(file) for file in sorted(folder.glob("*.safetensors"))],
            "resize": f"bicubic, antialias, to {self.size}x{self.size}",
            "dtype": "float32",
        }

    @torch.no_grad()
    def embed(self, images: Tensor, *, crop: bool) -> Tensor:
        """Embeddings (B, D) of uint8 images (B, 3, H, W); see `prepared` for `crop`."""
        pixels = prepared(images.to(self.device), self.size, MEAN, STD, crop=crop)
        return self.model.visual_projection(self.model.vision_model(pixels).pooler_output)

    def images(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, D) of uint8 images (B, 3, H, W)."""
        return F.normalize(self.embed(images, crop=False), dim=-1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Unit embeddings (B, D) of texts."""
        untruncated = self.tokenizer(texts, verbose=False)["input_ids"]
        self.truncated += sum(len(ids) > self.context for ids in untruncated)
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.context, return_tensors="pt")
        pooled = self.model.text_model(**tokens.to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)


class MiniClip(TransformersClip):
    """The embedded CLIP, trained on the captions of the embedded base. Its scores are marked (mini)."""

    label = "mini"

    def __init__(self, folder: Path = MINI, device: str = "cpu") -> None:
        if not mini_installed(folder):
            raise SctoolError(f"the embedded CLIP is missing from this installation ({folder}). Reinstall sctool.")
        super().__init__(folder, device)
        self.protocol["clip_model"] = "mini"


def mini_installed(folder: Path = MINI) -> bool:
    """Whether the embedded CLIP is installed."""
    return (folder / "config.json").is_file()


class OpenClip:
    """An open_clip model with weights from a file."""

    label = ""

    def __init__(self, model: str, weights: Path | None, device: str = "cpu", quick_gelu: bool = False) -> None:
        """`model` is an open_clip name, or `local-dir:FOLDER` with its own weights. Raises `SctoolError`."""
        import open_clip

        pretrained = {"pretrained": str(weights)} if weights else {}
        try:
            net = open_clip.create_model(model, **pretrained, force_quick_gelu=quick_gelu, weights_only=True)
            self.tokenizer = open_clip.get_tokenizer(model)
        except Exception as error:
            raise SctoolError(
                f"CLIP model '{model}' with weights {weights or 'from its folder'} cannot be loaded: "
                f"{str(error).splitlines()[0]}"
            ) from error
        self.net = net.eval().requires_grad_(False).to(device)
        self.device, self.truncated = device, 0
        size = net.visual.image_size
        self.size = int(size if isinstance(size, int) else size[0])
        self.mean, self.std = net.visual.image_mean or MEAN, net.visual.image_std or STD
        files = [weights] if weights else sorted(Path(model.removeprefix("local-dir:")).glob("*.safetensors"))
        self.dim = int(self.texts([""]).shape[1])
        self.protocol = {
            "clip_model": f"open_clip {model.rsplit('/', 1)[-1]}",
            "weights_sha256": [sha256(file) for file in files],
            "resize": f"bicubic, antialias, shorter side to {self.size}, centre crop",
            "dtype": "float32",
        }

    @torch.no_grad()
    def embed(self, images: Tensor, *, crop: bool) -> Tensor:
        """Embeddings (B, D) of uint8 images (B, 3, H, W); see `prepared` for `crop`."""
        pixels = prepared(images.to(self.device), self.size, self.mean, self.std, crop=crop)
        return self.net.encode_image(pixels).float()

    def images(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, D) of uint8 images (B, 3, H, W)."""
        return F.normalize(self.embed(images, crop=True), dim=-1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Unit embeddings (B, D) of texts; open_clip's tokenizer keeps the end token when it truncates."""
        tokens = self.tokenizer(texts)
        if hasattr(self.tokenizer, "encode"):
            self.truncated += sum(len(self.tokenizer.encode(text)) + 2 > tokens.shape[1] for text in texts)
        return F.normalize(self.net.encode_text(tokens.to(self.device)).float(), dim=-1)
