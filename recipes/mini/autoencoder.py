"""Trains mini's autoencoder (64 px to 16x16x6 latents) and measures it on held-out photographs.

    python recipes/mini/autoencoder.py DATA --out work/mini [--steps 3000]

L1 reconstruction loss and a small KL term, as in Rombach et al. 2022 (arXiv 2112.10752, section 3.1) but without
the adversarial loss, which a network of this size does not need. The scaling factor of its section G (unit
variance) is measured on the training set and stored as `scaling_factor`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from common import load_photos, square
from diffusers import AutoencoderKL

SIZE = 64
CHANNELS = (16, 32, 64)  # two downsamplings: 64 px to 16 latent pixels
LATENT_CHANNELS = 6
KL_WEIGHT = 1e-6


def build() -> AutoencoderKL:
    """The untrained autoencoder: downsampling factor 4, 6 latent channels, no attention."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(CHANNELS),
        up_block_types=["UpDecoderBlock2D"] * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def augment(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random scale (shorter side 64 to 128 px), random 64 px crop, random horizontal flip."""
    scale = rng.uniform(SIZE, 128) / min(photo.shape[:2])
    height, width = (max(SIZE, round(side * scale)) for side in photo.shape[:2])
    photo = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)
    top, left = rng.integers(height - SIZE + 1), rng.integers(width - SIZE + 1)
    crop = photo[top : top + SIZE, left : left + SIZE]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def to_tensor(crops: list[np.ndarray]) -> torch.Tensor:
    """uint8 HWC in 0..255 to float NCHW in -1..1."""
    batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float()
    return (batch / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def psnr(model: AutoencoderKL, crops: list[np.ndarray]) -> float:
    """Mean over images of the PSNR, 10 log10(255^2 / MSE) in dB, with latent means."""
    values = []
    for start in range(0, len(crops), 64):
        x = to_tensor(crops[start : start + 64])
        y = model.decode(model.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values += (-10 * torch.log10(((y - x) / 2).square().mean((1, 2, 3)))).tolist()
    return float(np.mean(values))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--out", default="work/mini", type=Path)
    parser.add_argument("--steps", default=3000, type=int)
    parser.add_argument("--batch", default=16, type=int)
    parser.add_argument("--lr", default=2e-3, type=float)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    photos = load_photos(args.data)
    train = [p.pixels for p in photos if p.split == "train"]
    held_out = [square(p.pixels, SIZE) for p in photos if p.split == "test"]
    model = build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0, fused=True)
    start, history = time.time(), []
    for step in range(args.steps):
        for group in optimizer.param_groups:  # 100 warm-up steps, then a cosine to zero
            group["lr"] = args.lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        x = to_tensor([augment(train[i], rng) for i in rng.integers(len(train), size=args.batch)])
        latent = model.encode(x).latent_dist
        y = model.decode(latent.sample()).sample
        loss = (y - x).abs().mean() + KL_WEIGHT * latent.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            minutes = (time.time() - start) / 60
            history.append({"step": step + 1, "l1": loss.item(), "psnr": psnr(model, held_out), "minutes": minutes})
            print(json.dumps(history[-1]), flush=True)
            save(model, args.out, train, history)


@torch.no_grad()
def save(model: AutoencoderKL, out: Path, train: list[np.ndarray], history: list[dict]) -> None:
    """Measures the latents' scaling factor on training photographs and writes the model and its figures."""
    crops = [square(photo, SIZE) for photo in train[:512]]
    latents = torch.cat([model.encode(to_tensor(crops[i : i + 64])).latent_dist.mode() for i in range(0, 512, 64)])
    model.register_to_config(scaling_factor=1 / latents.std().item())
    model.save_pretrained(out / "vae")
    (out / "vae.json").write_text(json.dumps({"held_out_psnr_db": history[-1]["psnr"], "history": history}, indent=1))


if __name__ == "__main__":
    main()
