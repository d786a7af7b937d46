"""ControlNets and T2I-Adapters in diffusers' format: read as tuners, and written so that its pipelines run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetXSAdapter,
    DDIMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionControlNetXSPipeline,
    T2IAdapter,
)
from PIL import Image

from sctool.core.backbones.loading import Backbone, load_backbone
from sctool.core.checkpoint import load_tuner, read_meta
from sctool.core.config import SampleConfig, TrainConfig
from sctool.core.errors import SctoolError, UsageError
from sctool.core.published import condition_in
from sctool.core.runs import open_run
from sctool.core.sampling import Request, sample_images
from sctool.core.sites.attaching import tuned
from sctool.core.tuners import method_config, tuner_class

MODELS: dict[str, Any] = {
    "controlnet": ControlNetModel, "t2i-adapter": T2IAdapter, "controlnet-xs": ControlNetXSAdapter,
}  # fmt: skip
PIPELINES: dict[str, Any] = {
    "controlnet": StableDiffusionControlNetPipeline, "t2i-adapter": StableDiffusionAdapterPipeline,
    "controlnet-xs": StableDiffusionControlNetXSPipeline,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Backbone:
    return load_backbone(str(tiny_base))


def saved(method: str, base: Backbone, folder: Path, scale: float = 0.2) -> Path:
    """A diffusers folder with random weights."""
    torch.manual_seed(0)
    tuner = tuner_class(method).build(method_config(method, {}), base.denoiser, ("canny",), base.vae_scale)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    tuner.in_diffusers()["canny"].save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", MODELS)
def test_a_pipeline_of_diffusers_draws_what_the_tuner_draws(method: str, base: Backbone, tmp_path: Path) -> None:
    folder = saved(method, base, tmp_path / f"my-{method}-canny")
    hint = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    config = SampleConfig(steps=3, guidance=3.0)
    request = Request("a photo", 5, {"canny": hint})
    with tuned(base.denoiser, load_tuner(folder, base)):
        [(_, ours)] = list(sample_images(base, [request], config))
    [(_, plain)] = list(sample_images(base, [Request("a photo", 5)], config))
    parts = {name: part for name, part in base.pipe.components.items() if name not in ("image_encoder",)}
    model = MODELS[method].from_pretrained(folder)
    name = "adapter" if method == "t2i-adapter" else "controlnet"
    pipe = PIPELINES[method](**{**parts, name: model}, requires_safety_checker=False)
    for module in pipe.unet.modules():  # the pipeline of ControlNet-XS gives the base's norms another epsilon
        if method == "controlnet-xs" and isinstance(module, torch.nn.GroupNorm) and module.eps == 1e-6:
            module.eps = 1e-5
    pipe.scheduler = DDIMScheduler.from_config(base.pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    drawn = pipe(
        "a photo", image=Image.fromarray(hint), latents=latents, num_inference_steps=3, guidance_scale=3.0,
        output_type="np", height=32, width=32,
    ).images[0]  # fmt: skip
    theirs = (drawn * 255).round()
    assert np.abs(theirs - ours).max() <= 1
    assert np.abs(plain.astype(int) - ours).max() > 3


@pytest.mark.parametrize("method", MODELS)
def test_what_was_trained_here_is_written_in_diffusers_format(
    method: str, tiny_base: Path, edges: Path, tmp_path: Path, base: Backbone
) -> None:
    from sctool.annotators.training_sets import open_training_sets
    from sctool.core.training.train import train

    config = TrainConfig(
        base=str(tiny_base), data=str(edges), method=method, cond=("canny",), steps=2, batch=2, lr=1e-3,
        validate_every=0, sample_every=0,
    )  # fmt: skip
    run = open_run(tmp_path, "run", config)
    source, held_out, made = open_training_sets(config, 32, quiet=True)
    train(config, run, source, held_out=held_out, map_meta=made, quiet=True)
    own, theirs = load_tuner(run.tuner, base), MODELS[method].from_pretrained(run.path / "diffusers" / "canny")
    ours = own.in_diffusers()["canny"].state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.state_dict().items())


def test_the_folder_s_name_says_the_condition() -> None:
    named = {
        "sd-controlnet-canny": "canny", "control_v11p_sd15_openpose": "pose", "t2iadapter_depth_sd15v2": "depth",
        "control_v11p_sd15_softedge": "hed", "control_v11e_sd15_ip2p_lineart": "lineart",
    }  # fmt: skip
    for name, condition in named.items():
        assert condition_in(Path(name)) == condition
    with pytest.raises(UsageError, match="Rename the folder"):
        condition_in(Path("my-net"))


def test_wrong_adapters_are_refused(base: Backbone, tmp_path: Path) -> None:
    folder = saved("controlnet", base, tmp_path / "net-canny")
    assert read_meta(folder)["conditions"] == ["canny"]
    with pytest.raises(SctoolError, match="does not fit"):
        load_tuner(folder, load_backbone("mini"))
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UsageError, match="Re-save it with safetensors"):
        load_tuner(folder, base)


def test_sampling_with_one_asks_for_the_base(
    base: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sctool.cli import run as sctool

    folder = saved("t2i-adapter", base, tmp_path / "adapter-canny")
    words = ["sample", "a photo", "--tuner", str(folder), "--steps", "2", "--out", str(tmp_path / "out")]
    assert sctool(words) == 2
    assert "give --base" in capsys.readouterr().err
    assert sctool([*words, "--base", base.id]) == 0
