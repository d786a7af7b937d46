"""Trains the classifier that measures mini's samples: a small ResNet on real training photographs at 64 px.

    python recipes/mini/classifier.py DATA --out work/mini [--epochs 26]

It never sees a sample. Its accuracy on real test photographs is reported beside its accuracy on samples.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import load_photos, random_square, square
from safetensors.torch import load_file, save_file
from torch import nn

SIZE = 64
CLASSES = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")


class Block(nn.Module):
    """A residual block (He et al. 2016, arXiv 1512.03385, figure 2) that halves the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, h, w) to (B, outputs, h/2, w/2)."""
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.short(F.avg_pool2d(x, 2))).relu()


class Classifier(nn.Sequential):
    """RGB images in -1..1 (B, 3, 64, 64) to logits over `CLASSES` (B, 10)."""

    def __init__(self) -> None:
        stem = [nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        blocks = [Block(32, 64), Block(64, 128), Block(128, 256)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, len(CLASSES))]
        super().__init__(*stem, *blocks, *head)


def to_tensor(crops: list[np.ndarray]) -> torch.Tensor:
    """uint8 HWC in 0..255 to float NCHW in -1..1."""
    batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def augment(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A crop of 70 to 100 % of the shorter side near the centre, a flip, brightness and contrast, an erased box."""
    image = random_square(photo, SIZE, 0.7, rng)
    gain, lift = rng.uniform(0.8, 1.2), rng.uniform(-20, 20)
    image = np.clip(image.astype(np.float32) * gain + lift, 0, 255).astype(np.uint8)
    if rng.random() < 0.25:
        y, x, h, w = *rng.integers(0, 52, size=2), *rng.integers(8, 24, size=2)
        image[y : y + h, x : x + w] = rng.integers(0, 256, size=3)
    return image


@torch.no_grad()
def classify(model: Classifier, crops: list[np.ndarray]) -> list[str]:
    """The class of each uint8 image (64, 64, 3), from the summed logits of the image and its mirror image."""
    model.eval()
    names = []
    for start in range(0, len(crops), 64):
        x = to_tensor(crops[start : start + 64])
        names += [CLASSES[i] for i in (model(x) + model(x.flip(-1))).argmax(-1).tolist()]
    return names


def accuracy(model: Classifier, crops: list[np.ndarray], labels: list[str]) -> float:
    """Share of images whose predicted class is their label."""
    return float(np.mean([a == b for a, b in zip(classify(model, crops), labels, strict=True)]))


def load(parts: Path) -> Classifier:
    """The trained classifier in `parts`."""
    model = Classifier()
    model.load_state_dict(load_file(parts / "classifier.safetensors"))
    return model.eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--out", default="work/mini", type=Path)
    parser.add_argument("--epochs", default=26, type=int)
    parser.add_argument("--batch", default=64, type=int)
    parser.add_argument("--lr", default=2e-3, type=float)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    photos = load_photos(args.data)
    train, test = ([p for p in photos if p.split == split] for split in ("train", "test"))
    crops, labels = [square(p.pixels, SIZE) for p in test], [p.label for p in test]
    model = Classifier().to(memory_format=torch.channels_last)
    steps = args.epochs * (len(train) // args.batch)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05, fused=True)
    start, order = time.time(), []
    for step in range(steps):
        for group in optimizer.param_groups:  # 100 warm-up steps, then a cosine to zero
            group["lr"] = args.lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        if len(order) < args.batch:
            order = rng.permutation(len(train)).tolist()
        chosen, order = order[: args.batch], order[args.batch :]
        x = to_tensor([augment(train[i].pixels, rng) for i in chosen])
        y = torch.tensor([CLASSES.index(train[i].label) for i in chosen])
        loss = F.cross_entropy(model.train()(x), y, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            figures = {"step": step + 1, "loss": loss.item(), "test_accuracy": accuracy(model, crops, labels)}
            figures["minutes"] = (time.time() - start) / 60
            print(json.dumps(figures), flush=True)
            weights = {name: value.contiguous() for name, value in model.state_dict().items()}
            save_file(weights, args.out / "classifier.safetensors")
            (args.out / "classifier.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
