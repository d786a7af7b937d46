"""Shared by the scripts of the recipe: reading and cropping the clothing photographs."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Photo:
    """One photograph: uint8 RGB (H, W, 3), its caption, class name and split (train, validation, test)."""

    pixels: np.ndarray
    caption: str
    label: str
    split: str


def load_photos(folder: str | Path) -> list[Photo]:
    """Reads every KEY.jpg and KEY.json of the webdataset shards in `folder`."""
    photos = []
    for shard in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        for name in sorted(n for n in members if n.endswith(".json")):
            row = json.loads(members[name])
            pixels = np.asarray(Image.open(io.BytesIO(members[name[:-5] + ".jpg"])).convert("RGB"))
            photos.append(Photo(pixels, row["caption"], row["class"], row["split"]))
    return photos


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side to `size` (area average) and crops the centre: (size, size, 3)."""
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    height, width = max(size, round(height * scale)), max(size, round(width * scale))
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def random_square(pixels: np.ndarray, size: int, least: float, rng: np.random.Generator) -> np.ndarray:
    """A square crop of `least` to 1 times the shorter side, resized to (size, size, 3) and flipped half of the time.

    It stays near the centre of the image, because garments are in the middle of tall images.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    crop = round(side * rng.uniform(least, 1.0))
    slack = (side - crop) // 2 + side // 12
    top = np.clip((height - crop) // 2 + rng.integers(-slack, slack + 1), 0, height - crop)
    left = np.clip((width - crop) // 2 + rng.integers(-slack, slack + 1), 0, width - crop)
    image = cv2.resize(pixels[top : top + crop, left : left + crop], (size, size), interpolation=cv2.INTER_AREA)
    return image[:, ::-1] if rng.random() < 0.5 else image
