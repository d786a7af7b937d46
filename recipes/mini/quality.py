"""Measures mini: class accuracy of samples, their Fréchet distance to photographs, and the autoencoder's PSNR.

    python recipes/mini/quality.py DATA core/assets/mini                      # the finished base
    python recipes/mini/quality.py DATA work/mini/base --run runs/NAME --count 100   # a U-Net still in training

Samples with an unmodified diffusers pipeline. Writes quality.json and the contact sheet sheet.png to --parts.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections import Counter
from pathlib import Path

import clip
import numpy as np
import torch
from assemble import trained_weights
from classifier import CLASSES, accuracy, classify, load
from common import Photo, load_photos, square
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageDraw
from transformers import CLIPModel

SHEET = (8, 4)  # columns, rows
SHEET_BYTES = 400_000


def load_pipeline(base: Path, run: Path | None) -> StableDiffusionPipeline:
    """The pipeline of the base in fp32, with the denoiser of `run` if given."""
    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    if run:
        pipe.unet.load_state_dict(trained_weights(run))
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


def sample(pipe: StableDiffusionPipeline, prompts: list[str], steps: int, guidance: float) -> list[np.ndarray]:
    """One uint8 RGB image per prompt; image i has seed i."""
    images = []
    for start in range(0, len(prompts), 50):
        batch = prompts[start : start + 50]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        result = pipe(batch, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np")
        images += list((result.images * 255).round().astype(np.uint8))
    return images


@torch.no_grad()
def features(model: CLIPModel, images: list[np.ndarray]) -> np.ndarray:
    """Normalised image features of mini's CLIP, float64 (N, 128)."""
    batches = [clip.to_tensor(images[i : i + 64]) for i in range(0, len(images), 64)]
    return torch.cat([clip.embed_images(model, batch) for batch in batches]).double().numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance between two feature sets (Heusel et al. 2017, arXiv 1706.08500, eq. 6)."""
    s, t = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(s)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # The trace of (S T)^1/2 is the sum of the square roots of the eigenvalues of S^1/2 T S^1/2.
    cross = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * cross)


@torch.no_grad()
def autoencoder_psnr(vae: AutoencoderKL, crops: list[np.ndarray]) -> float:
    """Mean over images of the PSNR, 10 log10(255^2 / MSE) in dB, with latent means."""
    values = []
    for start in range(0, len(crops), 64):
        x = torch.from_numpy(np.stack(crops[start : start + 64])).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values += (-10 * torch.log10(((y - x) / 2).square().mean((1, 2, 3)))).tolist()
    return float(np.mean(values))


def sheet_prompts(photos: list[Photo]) -> list[str]:
    """32 captions that name a colour: three or four per class, those most frequent in `photos` first."""
    named = [p for p in photos if clip.colour(p.caption)]
    ranked = [Counter(p.caption for p in named if p.label == label).most_common() for label in CLASSES]
    rows = [[caption for caption, _ in counts] for counts in ranked]
    return [row[i] for i in range(max(map(len, rows))) for row in rows if i < len(row)][: SHEET[0] * SHEET[1]]


def contact_sheet(images: list[np.ndarray], prompts: list[str]) -> bytes:
    """A PNG of at most `SHEET_BYTES`: the images at twice their size, each below the garment of its prompt."""
    tile, strip = 2 * images[0].shape[0], 16
    sheet = Image.new("RGB", (SHEET[0] * tile, SHEET[1] * (tile + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = i % SHEET[0] * tile, i // SHEET[0] * (tile + strip)
        sheet.paste(Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST), (x, y + strip))
        words = prompt.removeprefix("a photo of ").removeprefix("a ").removeprefix("an ").replace("pair of ", "")
        draw.text((x + 3, y + 2), words, fill="black")
    for version in (sheet, sheet.quantize(256), sheet.quantize(64)):
        buffer = io.BytesIO()
        version.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= SHEET_BYTES:
            break
    return buffer.getvalue()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("base", type=Path, help="Stable Diffusion folder")
    parser.add_argument("--run", type=Path, help="use the denoiser of this run of `sctool train --method full`")
    parser.add_argument("--parts", default="work/mini", type=Path, help="folder of clip, classifier and the results")
    parser.add_argument("--count", default=500, type=int)
    parser.add_argument("--steps", default=30, type=int)
    parser.add_argument("--guidance", default=[3.0], type=float, nargs="+", help="if several, the best one is kept")
    args = parser.parse_args()
    photos = load_photos(args.data)
    test = [p for p in photos if p.split == "test"]
    real = [square(p.pixels, 64) for p in test]
    rng = np.random.default_rng(0)
    chosen = [test[i] for i in rng.choice(len(test), args.count, replace=args.count > len(test))]
    judge, eye = load(args.parts), CLIPModel.from_pretrained(args.parts / "clip").eval()
    pipe = load_pipeline(args.base, args.run)
    seen = features(eye, real)
    other = [square(p.pixels, 64) for p in photos if p.split == "validation"]
    best: dict = {}
    for guidance in args.guidance:
        start = time.time()
        images = sample(pipe, [p.caption for p in chosen], args.steps, guidance)
        names = classify(judge, images)
        hits = {c: [n == c for n, p in zip(names, chosen, strict=True) if p.label == c] for c in CLASSES}
        figures = {
            "count": args.count,
            "steps": args.steps,
            "guidance": guidance,
            "class_accuracy_samples": float(np.mean([n == p.label for n, p in zip(names, chosen, strict=True)])),
            "class_accuracy_real": accuracy(judge, real, [p.label for p in test]),
            "class_accuracy_by_class": {c: round(float(np.mean(h)), 3) for c, h in hits.items() if h},
            "fd_mini": frechet(features(eye, images), seen),
            "fd_mini_real": frechet(features(eye, other), seen),
            "fd_mini_note": f"unit CLIP features of mini; {args.count} samples against {len(real)} test photographs; "
            f"fd_mini_real: {len(other)} validation photographs against them",
            "autoencoder_psnr_db": autoencoder_psnr(pipe.vae, real),
            "seconds": time.time() - start,
        }
        print(json.dumps(figures), flush=True)
        if figures["class_accuracy_samples"] > best.get("class_accuracy_samples", -1):
            best = figures
    prompts = sheet_prompts(test)
    (args.parts / "quality.json").write_text(json.dumps(best, indent=1))
    (args.parts / "sheet.png").write_bytes(contact_sheet(sample(pipe, prompts, args.steps, best["guidance"]), prompts))


if __name__ == "__main__":
    main()
