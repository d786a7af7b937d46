"""Assembles mini-dit as a DiT folder: mini's autoencoder, a transformer, the labels.

python recipes/mini/dit_assemble.py init                    # random transformer: what `sctool train` starts from
python recipes/mini/dit_assemble.py final --run runs/NAME   # trained transformer, all in fp16, to core/assets/mini-dit
python recipes/mini/dit_assemble.py card --run runs/NAME    # model card and figures, after dit_quality.py
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from sctool.core.backbones.families.dit import untied
from sctool.core.backbones.loading import load_backbone
from sctool.core.checkpoint import load_tuner
from sctool.core.runs import Run
from sctool.core.sites.attaching import attach

ROOT = Path(__file__).parents[2]
MINI = ROOT / "core" / "assets" / "mini"
ASSETS = ROOT / "core" / "assets" / "mini-dit"
BASE = ROOT / "work" / "mini-dit" / "base"
LIMIT = 13 * 2**20  # bytes
LABELS = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")


def transformer() -> DiTTransformer2DModel:
    """An untrained DiT of width 192 with 7 blocks on 64 tokens, which learns the variance as DiT does.

    Initialised as in DiT: linear layers Xavier-uniform, embeddings with std 0.02, and zero for every modulation and
    the output, so that the blocks start as the identity.
    """
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=6,
        out_channels=12,
        num_layers=7,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=len(LABELS),
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.view(model.inner_dim, -1))
    nn.init.zeros_(model.pos_embed.proj.bias)
    first = model.transformer_blocks[0].norm1.emb
    for layer in (first.timestep_embedder.linear_1, first.timestep_embedder.linear_2):
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.normal_(first.class_embedder.embedding_table.weight, std=0.02)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
    return model


def save(denoiser: DiTTransformer2DModel, out: Path, dtype: torch.dtype) -> None:
    """Writes a folder that diffusers' `DiTPipeline` loads, with the labels in model_index.json."""
    shutil.rmtree(out, ignore_errors=True)
    vae = AutoencoderKL.from_pretrained(MINI / "vae")
    scheduler = DDIMScheduler.from_pretrained(MINI / "scheduler")
    pipe = DiTPipeline(denoiser, vae, scheduler)
    with untied(denoiser):
        pipe.to(dtype).save_pretrained(out)
    index = out / "model_index.json"
    rows = json.loads(index.read_text()) | {"id2label": {str(number): label for number, label in enumerate(LABELS)}}
    index.write_text(json.dumps(rows, indent=2) + "\n")


def trained(run: Path) -> Any:
    """The denoiser of a finished run of method `full`."""
    backbone = load_backbone(str(BASE))
    attach(backbone.denoiser, load_tuner(Run(run).tuner, backbone))
    return backbone.denoiser


def card(run: Path, parts: Path, out: Path) -> None:
    """Writes figures.json, sheet.png and README.md next to the weights in `out`."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line]
    config, quality = Run(run).config, json.loads((parts / "dit_quality.json").read_text())
    training = {"steps": config.steps, "batch": config.batch, "lr": config.lr}
    training["minutes"] = sum(row.get("seconds", 0) for row in rows) / 60
    shutil.copy(parts / "dit_sheet.png", out / "sheet.png")
    (out / "figures.json").write_text(json.dumps({"training": training, "quality": quality}, indent=1) + "\n")
    denoiser, by_class = load_backbone(str(out)).denoiser, quality["class_accuracy_by_class"]
    with untied(denoiser):
        stored = sum(p.numel() for p in denoiser.parameters())
    text = (Path(__file__).parent / "dit_card.md").read_text()
    text = text.format(
        **training,
        mib=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2**20,
        millions=sum(p.numel() for p in denoiser.parameters()) / 1e6,
        stored=stored / 1e6,
        count=quality["count"],
        samples=100 * quality["class_accuracy_samples"],
        real=100 * quality["class_accuracy_real"],
        frechet=quality["fd_mini"],
        frechet_real=quality["fd_mini_real"],
        by_class=", ".join(f"{name} {100 * share:.0f} %" for name, share in by_class.items()),
        draw_steps=quality["steps"],
        guidance=quality["guidance"],
    )
    (out / "README.md").write_text(text)
    print(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("init", "final", "card"))
    parser.add_argument("--parts", default="work/mini", type=Path, help="folder of dit_quality.py's results (for card)")
    parser.add_argument("--run", type=Path, help="run folder (for final and card)")
    parser.add_argument("--out", default=ASSETS, type=Path, help="output folder of final and card")
    args = parser.parse_args()
    if args.stage == "init":
        torch.manual_seed(0)
        save(transformer(), BASE, torch.float32)
        print(BASE)
        return
    if args.stage == "card":
        card(args.run, args.parts, args.out)
        return
    save(trained(args.run), args.out, torch.float16)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 2**20:.1f} MiB")
    if size > LIMIT:
        raise SystemExit(f"{args.out} has {size:,} bytes, more than {LIMIT:,}.")


if __name__ == "__main__":
    main()
