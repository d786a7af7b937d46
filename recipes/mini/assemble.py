"""Assembles mini as a Stable Diffusion folder from the parts that the other scripts trained.

python recipes/mini/assemble.py init                    # random U-Net: the base that `sctool train` starts from
python recipes/mini/assemble.py final --run runs/NAME   # trained U-Net, all in fp16, to core/assets/mini
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
    """An untrained U-Net with SD 1.5's blocks, so also 12 skips, at a thousandth of its compute."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=6,
        out_channels=6,
        block_out_channels=(32, 64, 128, 192),
        layers_per_block=2,
        norm_num_groups=16,
        cross_attention_dim=128,
        attention_head_dim=4,  # despite its name the number of heads, as in SD 1.5's config
    )


def scheduler() -> DDIMScheduler:
    """SD 1.5's noise schedule with v-prediction (Salimans & Ho 2022, arXiv 2202.00512, section 4).

    "trailing" spacing starts at the last timestep, where the network's input is nearly pure noise
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
    """The U-Net state dict of a run of method `full`: its tuner file, or the averaged weights of its newest state."""
    states = sorted(run.glob("state/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    candidates = [run / "tuner" / "tuner.safetensors"]
    candidates += [state / name for state in reversed(states) for name in ("ema.safetensors", "weights.safetensors")]
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        raise SystemExit(f"{run} contains neither tuner/tuner.safetensors nor a resume state.")
    print(f"denoiser from {path}")
    weights = load_file(path)
    # A resume state has the training module's keys, so the U-Net's own keys may have a prefix.
    prefix = next(key for key in weights if key.endswith("conv_in.weight")).removesuffix("conv_in.weight")
    return {key.removeprefix(prefix): value for key, value in weights.items()}


def pipeline(parts: Path, denoiser: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The pipeline with `denoiser` and the trained parts in `parts`."""
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
    """Writes parts/base in fp32, with a random U-Net from seed 0."""
    torch.manual_seed(0)
    denoiser = unet()
    shutil.rmtree(parts / "base", ignore_errors=True)
    pipeline(parts, denoiser).save_pretrained(parts / "base")
    print(f"{parts / 'base'}: U-Net with {sum(p.numel() for p in denoiser.parameters()):,} parameters")


def final(parts: Path, run: Path, out: Path) -> None:
    """Writes the trained base and the CLIP to `out` in fp16. Exits with a message if they exceed the size limit."""
    denoiser = unet()
    denoiser.load_state_dict(trained_weights(run))
    shutil.rmtree(out, ignore_errors=True)
    pipe = pipeline(parts, denoiser)
    pipe.to(torch.float16).save_pretrained(out)
    CLIPModel.from_pretrained(parts / "clip").half().save_pretrained(out / "clip")
    size = folder_bytes(out)
    print(f"{out}: {size / 2**20:.1f} MiB")
    if size > LIMIT:
        raise SystemExit(f"{out} has {size:,} bytes, more than {LIMIT:,}.")


def folder_bytes(folder: Path) -> int:
    """The total size in bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# -------------------------------------------------------------------------------------------------- model card


def figures(parts: Path, run: Path, out: Path) -> dict[str, Any]:
    """All numbers of the model card, from the files that the scripts wrote."""
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
    """Writes figures.json, sheet.png and README.md next to the weights in `out`."""
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
    parser.add_argument("--run", type=Path, help="run folder of the U-Net (for final and card)")
    parser.add_argument("--out", default=ASSETS, type=Path, help="output folder of final and card")
    device = "one core of a shared server (first part Intel Xeon at 2.5 GHz, second AMD EPYC)"
    parser.add_argument("--device", default=device, help="hardware named in the card")
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
