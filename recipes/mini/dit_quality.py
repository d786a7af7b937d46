"""Measures mini-dit: class accuracy of samples, their Fréchet distance to photographs; writes a contact sheet.

    python recipes/mini/dit_quality.py DATA core/assets/mini-dit                    # the finished base
    python recipes/mini/dit_quality.py DATA work/mini-dit/base --run runs/NAME --count 100      # still in training

Every class is drawn equally often; image i has seed i. Writes dit_quality.json and dit_sheet.png to --parts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classifier import CLASSES, accuracy, classify, load
from common import load_photos, square
from quality import contact_sheet, features, frechet
from safetensors.torch import load_file
from transformers import CLIPModel

from sctool.core.backbones.loading import Backbone, load_backbone
from sctool.core.config import SampleConfig
from sctool.core.runs import Run
from sctool.core.sampling import Request, sample_images

MINI = Path(__file__).parents[2] / "core" / "assets" / "mini"
COLUMNS = 8


def load_base(base: Path, run: Path | None) -> Backbone:
    """The base, with the newest averaged weights of a run of method `full` if one is given."""
    backbone = load_backbone(str(base))
    if run:
        state = Run(run).states()[-1]
        print(f"weights of {state}")
        backbone.denoiser.load_state_dict(load_file(state / "ema.safetensors"), strict=False)
    return backbone


def draw(backbone: Backbone, classes: list[str], config: SampleConfig) -> list[np.ndarray]:
    """One uint8 RGB image per class name; image i has seed i."""
    requests = [Request(label, seed) for seed, label in enumerate(classes)]
    return [image for _, image in sample_images(backbone, requests, config)]


def figures(images: list[np.ndarray], drawn: list[str], judge: Any, eye: CLIPModel, real: Any) -> dict[str, Any]:
    """Class accuracy, overall and by class, and the distance to the test photographs."""
    names = classify(judge, images)
    hits = {c: [n == c for n, d in zip(names, drawn, strict=True) if d == c] for c in CLASSES}
    return {
        "class_accuracy_samples": float(np.mean([n == d for n, d in zip(names, drawn, strict=True)])),
        "class_accuracy_by_class": {c: round(float(np.mean(h)), 3) for c, h in hits.items() if h},
        "fd_mini": frechet(features(eye, images), real),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("base", type=Path, help="DiT folder")
    parser.add_argument("--run", type=Path, help="use the newest averaged weights of this run")
    parser.add_argument("--parts", default="work/mini", type=Path, help="folder of the classifier and the results")
    parser.add_argument("--count", default=500, type=int)
    parser.add_argument("--steps", default=50, type=int)
    parser.add_argument("--guidance", default=[3.0], type=float, nargs="+", help="if several, the best one is kept")
    args = parser.parse_args()
    photos = load_photos(args.data)
    test, other = ([square(p.pixels, 64) for p in photos if p.split == split] for split in ("test", "validation"))
    judge, eye = load(args.parts), CLIPModel.from_pretrained(MINI / "clip", dtype=torch.float32).eval()
    real = features(eye, test)
    backbone, drawn = load_base(args.base, args.run), [CLASSES[i % len(CLASSES)] for i in range(args.count)]
    best: dict[str, Any] = {}
    for guidance in args.guidance:
        images = draw(backbone, drawn, SampleConfig(steps=args.steps, guidance=guidance, batch=50))
        found = {"count": args.count, "steps": args.steps, "guidance": guidance}
        found |= figures(images, drawn, judge, eye, real)
        print(json.dumps(found), flush=True)
        if found["class_accuracy_samples"] > best.get("class_accuracy_samples", -1):
            best, shown = found, images[: 4 * COLUMNS]
    best["class_accuracy_real"] = accuracy(judge, test, [p.label for p in photos if p.split == "test"])
    best["fd_mini_real"] = frechet(features(eye, other), real)
    (args.parts / "dit_quality.json").write_text(json.dumps(best, indent=1))
    (args.parts / "dit_sheet.png").write_bytes(contact_sheet(shown, drawn[: 4 * COLUMNS]))


if __name__ == "__main__":
    main()
