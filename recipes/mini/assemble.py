"""Puts mini together as a Stable Diffusion folder, from the parts that the other scripts trained.

python recipes/mini/assemble.py init                    # fresh U-Net: the base that `sctool train` starts from
python recipes/mini/assemble.py final --run runs/NAME   # trained U-Net, all as fp16, to core/assets/mini
python recipes/mini/assemble.py card --run runs/NAME    # model card and figures, after quality.py
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "core" / "assets" / "mini"
LIMIT = 32 * 2**20  # bytes


def unet() -> UNet2DConditionModel:
    """An untrained U-Net with SD 1.5's blocks, hence its 12 skips, at a thousandth of its compute."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=6,
        out_channels=6,
        block_out_channels=(32, 64, 128, 192),
        layers_per_block=2,
        norm_num_groups=16,
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads, in spite of its name, as in SD 1.5's own config
    )


def scheduler() -> DDIMScheduler:
    """SD 1.5's noise schedule with v-prediction (Salimans & Ho 2022, arXiv 2202.00512, section 4).

    "trailing" spacing starts at the last timestep, which the network then sees as nearly pure noise
    (Lin et al. 2023, arXiv 2305.08891, section 3.3).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def trained_weights(run: Path) -> dict[str, torch.Tensor]:
    """The U-Net state dict of a run of method `full`: its tuner file, or the average of its newest resume state."""
    states = sorted(run.glob("state/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    candidates = [run / "tuner" / "tuner.safetensors"]
    candidates += [state / name for state in reversed(states) for name in ("ema.safetensors", "weights.safetensors")]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        raise SystemExit(f"{run} holds neither tuner/tuner.safetensors nor a resume state.")
    print(f"denoiser from {found}")
    weights = load_file(found)
    # A resume state names weights as the training module does, so a prefix may stand before the U-Net's own keys.
    prefix = next(key for key in weights if key.endswith("conv_in.weight")).removesuffix("conv_in.weight")
    return {key.removeprefix(prefix): value for key, value in weights.items()}


def pipeline(parts: Path, denoiser: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The pipeline of `denoiser` and the trained parts in `parts`."""
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        unet=denoiser,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def init(parts: Path) -> None:
    """Writes parts/base: fp32, with a fresh U-Net of seed 0."""
    torch.manual_seed(0)
    denoiser = unet()
    shutil.rmtree(parts / "base", ignore_errors=True)
    pipeline(parts, denoiser).save_pretrained(parts / "base")
    print(f"{parts / 'base'}: U-Net of {sum(p.numel() for p in denoiser.parameters()):,} parameters")


def final(parts: Path, run: Path, out: Path) -> None:
    """Writes the trained base and the CLIP as fp16 to `out`. Exits with a message when they exceed the limit."""
    denoiser = unet()
    denoiser.load_state_dict(trained_weights(run))
    shutil.rmtree(out, ignore_errors=True)
    pipe = pipeline(parts, denoiser)
    pipe.to(torch.float16).save_pretrained(out)
    CLIPModel.from_pretrained(parts / "clip").half().save_pretrained(out / "clip")
    size = folder_bytes(out)
    print(f"{out}: {size / 2**20:.1f} MiB")
    if size > LIMIT:
        raise SystemExit(f"{out} holds {size:,} bytes, more than {LIMIT:,}.")


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# -------------------------------------------------------------------------------------------------- model card


def figures(parts: Path, run: Path, out: Path) -> dict[str, Any]:
    """Every number of the card, from the files that the scripts wrote."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    environment = json.loads((run / "env.json").read_text()) if (run / "env.json").exists() else {}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line]
    vae, clip, quality = (json.loads((parts / f"{n}.json").read_text()) for n in ("vae", "clip", "quality"))
    return {
        "autoencoder": {"minutes": vae["history"][-1]["minutes"], "steps": vae["history"][-1]["step"]},
        "clip": clip["zero_shot_test"],
        "unet": {
            "steps": max((row.get("step", 0) for row in rows), default=0),
            "batch": config["batch"],
            "lr": config["lr"],
            "minutes": sum(row.get("seconds", 0) for row in rows) / 60,
            "parameters": sum(p.numel() for p in unet().parameters()),
            "environment": {key: environment[key] for key in ("python", "platform", "packages") if key in environment},
        },
        "quality": quality,
        "bytes": folder_bytes(out),
    }


def card(parts: Path, run: Path, out: Path, device: str) -> None:
    """Writes figures.json, sheet.png and README.md beside the weights in `out`."""
    shutil.copy(parts / "sheet.png", out / "sheet.png")
    values = figures(parts, run, out)
    (out / "figures.json").write_text(json.dumps(values, indent=1) + "\n")
    quality, clip, net = values["quality"], values["clip"], values["unet"]
    template = (Path(__file__).parent / "card.md").read_text()
    text = template.format(
        device=device,
        count=quality["count"],
        steps=quality["steps"],
        guidance=quality["guidance"],
        samples=100 * quality["class_accuracy_samples"],
        real=100 * quality["class_accuracy_real"],
        by_class=", ".join(f"{name} {100 * share:.0f} %" for name, share in quality["class_accuracy_by_class"].items()),
        psnr=quality["autoencoder_psnr_db"],
        frechet=quality["fd_mini"],
        frechet_real=quality["fd_mini_real"],
        clip_class=100 * clip["class_accuracy"],
        clip_colour=100 * clip["colour_accuracy"],
        unet_steps=net["steps"],
        unet_batch=net["batch"],
        unet_lr=net["lr"],
        unet_minutes=net["minutes"],
        unet_millions=net["parameters"] / 1e6,
        vae_steps=values["autoencoder"]["steps"],
        vae_minutes=values["autoencoder"]["minutes"],
        clip_steps=clip["step"],
        clip_minutes=clip["minutes"],
        mib=values["bytes"] / 2**20,
    )
    (out / "README.md").write_text(text)
    print(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("init", "final", "card"))
    parser.add_argument("--parts", default="work/mini", type=Path, help="folder of vae, clip, tokenizer, text_encoder")
    parser.add_argument("--run", type=Path, help="run folder of the U-Net's training (final, card)")
    parser.add_argument("--out", default=ASSETS, type=Path, help="where final and card write")
    device = "one core of a shared server (first part Intel Xeon at 2.5 GHz, second AMD EPYC)"
    parser.add_argument("--device", default=device, help="for the card")
    args = parser.parse_args()
    if args.stage != "init" and args.run is None:
        parser.error(f"{args.stage} needs --run")
    if args.stage == "init":
        init(args.parts)
    elif args.stage == "final":
        final(args.parts, args.run, args.out)
    else:
        card(args.parts, args.run, args.out, args.device)


if __name__ == "__main__":
    main()
