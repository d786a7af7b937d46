"""The two networks for soft edges: ControlNet's HED and PiDiNet, with the keys of their published files.

HED: lllyasviel/Annotators, ControlNetHED.pth, Apache-2.0; after Xie and Tu 2015 (arXiv 1504.06375).
PiDiNet: table5_pidinet.pth; Su et al. 2021 (arXiv 2108.07009), configuration carv4 with dilation and attention.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SctoolError


class _Block(nn.Module):
    """3x3 convolutions with ReLU, and a 1x1 projection to this scale's edge logit."""

    def __init__(self, before: int, width: int, convs: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(nn.Conv2d(width if i else before, width, 3, padding=1) for i in range(convs)))
        self.projection = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) to features (B, width, h, w) and logits (B, 1, h, w)."""
        for conv in self.convs:
            x = F.relu(conv(x))
        return x, self.projection(x)


class Hed(nn.Module):
    """Five VGG blocks, each with its own logit; the edge is the sigmoid of their mean. 14,716,168 parameters."""

    multiple = 16
    bgr = False

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.block1 = _Block(3, 64, 2)
        self.block2 = _Block(64, 128, 2)
        self.block3 = _Block(128, 256, 3)
        self.block4 = _Block(256, 512, 3)
        self.block5 = _Block(512, 512, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        """RGB (B, 3, H, W), float32 of 0..255 and not 0..1, to edges (B, H, W), float32 in 0..1."""
        x = (pixels - self.norm.float()).to(self.norm.dtype)
        logits = []
        for i, block in enumerate((self.block1, self.block2, self.block3, self.block4, self.block5)):
            x, logit = block(F.max_pool2d(x, 2) if i else x)
            logits.append(F.interpolate(logit.float(), pixels.shape[-2:], mode="bilinear", align_corners=False))
        return torch.stack(logits).mean(0).sigmoid()[:, 0]


class _PixelDifference(nn.Module):
    """Depthwise convolution, ReLU, 1x1 convolution, and a shortcut; the first one of a stage halves the size."""

    def __init__(self, before: int, width: int, kernel: int, halves: bool) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(before, width, 1) if halves else None
        self.conv1 = nn.Conv2d(before, before, kernel, padding=kernel // 2, groups=before, bias=False)
        self.conv2 = nn.Conv2d(before, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, h, w) to (B, width, h, w), or (B, width, h / 2, w / 2)."""
        if self.shortcut is None:
            return self.conv2(F.relu(self.conv1(x))) + x
        x = F.max_pool2d(x, 2)
        return self.conv2(F.relu(self.conv1(x))) + self.shortcut(x)


class _Dilated(nn.Module):
    """Compact dilation module (CDCM): the sum of four dilated convolutions."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1)
        for i, step in enumerate((5, 7, 9, 11), 1):
            setattr(self, f"conv2_{i}", nn.Conv2d(width, width, 3, padding=step, dilation=step, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, h, w) to (B, width, h, w)."""
        x = self.conv1(F.relu(x))
        return self.conv2_1(x) + self.conv2_2(x) + self.conv2_3(x) + self.conv2_4(x)


class _Attention(nn.Module):
    """Compact spatial attention (CSAM)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 4, 1)
        self.conv2 = nn.Conv2d(4, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) weighted by position."""
        return x * self.conv2(self.conv1(F.relu(x))).sigmoid()


class _Reduce(nn.Module):
    """A scale's features to its edge logit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to (B, 1, h, w)."""
        return self.conv(x)


# Kinds of the 16 layers (carv4): three pixel differences and a plain convolution, repeated.
DIFFERENCES = ("centre", "angular", "radial", "plain") * 4
STAGES = ((60, 3), (120, 4), (240, 4), (240, 4))
DILATION = 24


class PiDiNet(nn.Module):
    """PiDiNet with its pixel differences folded into ordinary kernels, as its authors do for speed.

    The published file has 83 tensors, 710,149 parameters; `load_edges` folds them.
    """

    multiple = 8
    bgr = True

    def __init__(self) -> None:
        super().__init__()
        self.init_block = nn.Conv2d(3, STAGES[0][0], 3, padding=1, bias=False)
        before, layer = STAGES[0][0], 1
        self.stages: list[list[str]] = []
        for stage, (width, blocks) in enumerate(STAGES, 1):
            self.stages.append([])
            for i in range(1, blocks + 1):
                kernel = 5 if DIFFERENCES[layer] == "radial" else 3
                block = _PixelDifference(before, width, kernel, halves=stage > 1 and i == 1)
                setattr(self, f"block{stage}_{i}", block)
                self.stages[-1].append(f"block{stage}_{i}")
                before, layer = width, layer + 1
        self.dilations = nn.ModuleList(_Dilated(width, DILATION) for width, _ in STAGES)
        self.attentions = nn.ModuleList(_Attention(DILATION) for _ in STAGES)
        self.conv_reduces = nn.ModuleList(_Reduce(DILATION) for _ in STAGES)
        self.classifier = nn.Conv2d(4, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """BGR (B, 3, H, W), float32 of 0..255, to edges (B, H, W), float32 in 0..1."""
        x = self.init_block((pixels / 255).to(self.classifier.weight.dtype))
        logits = []
        for stage, names in enumerate(self.stages):
            for name in names:
                x = getattr(self, name)(x)
            logit = self.conv_reduces[stage](self.attentions[stage](self.dilations[stage](x)))
            logits.append(F.interpolate(logit, pixels.shape[-2:], mode="bilinear", align_corners=False))
        return self.classifier(torch.cat(logits, 1)).float().sigmoid()[:, 0]


def _folded(kind: str, kernel: Tensor) -> Tensor:
    """The ordinary kernel (out, in, k, k) that is equivalent to a pixel difference with `kernel` (out, in, 3, 3)."""
    if kind == "plain":
        return kernel
    if kind == "centre":  # w_i (x_i - x_centre)
        kernel = kernel.clone()
        kernel[..., 1, 1] -= kernel.sum((2, 3))
        return kernel
    flat = kernel.flatten(2)
    if kind == "angular":  # w_i (x_i - x_next), clockwise
        return (flat - flat[..., [3, 0, 1, 6, 4, 2, 7, 8, 5]]).view_as(kernel)
    wide = kernel.new_zeros(*kernel.shape[:2], 25)  # radial: w_i (x_outer - x_inner)
    wide[..., [0, 2, 4, 10, 14, 20, 22, 24]] = flat[..., 1:]
    wide[..., [6, 7, 8, 11, 13, 16, 17, 18]] = -flat[..., 1:]
    return wide.view(*kernel.shape[:2], 5, 5)


def _fold(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """PiDiNet's published tensors with every pixel difference as an ordinary kernel."""
    names = ["init_block.weight"]
    names += [f"block{s}_{i}.conv1.weight" for s, (_, n) in enumerate(STAGES, 1) for i in range(1, n + 1)]
    folded = {name: _folded(kind, state[name]) for name, kind in zip(names, DIFFERENCES, strict=True)}
    return {**state, **folded}


def load_edges(path: Path) -> Hed | PiDiNet:
    """The network whose weights are in `path`, recognised by their keys: `.safetensors`, or `.pth` without code.

    Raises `SctoolError` if the file is damaged or contains another network.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = {key.removeprefix("module."): value for key, value in state.get("state_dict", state).items()}
        network = PiDiNet() if "init_block.weight" in state else Hed()
        network.load_state_dict(_fold(state) if isinstance(network, PiDiNet) else state)
    except Exception as error:  # torch, pickle and safetensors raise many different types for a bad file
        raise SctoolError(
            f"{path} contains neither HED (ControlNetHED.pth) nor PiDiNet (table5_pidinet.pth) as plain tensors, or is "
            f"damaged ({type(error).__name__}). To check files from the hub, run: sctool weights verify"
        ) from error
    return network.eval().requires_grad_(False)


def soft_edges(network: Hed | PiDiNet, images: Tensor) -> Tensor:
    """Edges (B, H, W), float32 in 0..1, of uint8 RGB (B, 3, H, W).

    Images are padded with their last pixels to what pooling divides, and cropped again: nothing is stretched.
    """
    height, width = images.shape[-2:]
    pixels = (images.flip(1) if network.bgr else images).float()
    right, below = -width % network.multiple, -height % network.multiple
    return network(F.pad(pixels, (0, right, 0, below), mode="replicate"))[:, :height, :width]
