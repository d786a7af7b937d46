"""The methods, by name. Importable without torch: a row loads its code when asked.

A new method is one file here, one row in `TUNERS` and one config class in `configs.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from ..config import TrainConfig
from ..errors import UsageError, unknown
from ..resolving import Config, build
from .configs import (
    BitFitConfig,
    ControlLoRAConfig,
    ControlNetConfig,
    ControlNetXSConfig,
    DiffFitConfig,
    DiffScalerConfig,
    DoRAConfig,
    ELRConfig,
    FullConfig,
    LoKrConfig,
    LoRAConfig,
    SCEditConfig,
    T2IAdapterConfig,
    UniControlNetConfig,
)

if TYPE_CHECKING:
    from .base import Tuner


@dataclass(frozen=True)
class Variant:
    """A method with settings as its paper counts it; `conditions` is how many condition maps it is controlled by."""

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    conditions: int = 0


@dataclass(frozen=True)
class Method:
    """A method: its settings, where its class is, what it does, who proposed it, and its variants in the paper."""

    config: type[Config]
    module: str
    cls: str
    summary: str
    paper: str
    control: Literal["none", "optional", "required"]
    """Whether it is controlled by condition maps."""
    lr: float
    """The learning rate when none is given."""
    lr_source: str
    """Where that learning rate comes from."""
    variants: tuple[Variant, ...]

    def load(self) -> type[Tuner]:
        """The tuner class; imports torch."""
        return getattr(import_module(self.module, __package__), self.cls)


SCEDIT_VARIANTS = (
    Variant("SC-Tuner"),
    Variant("SC-Tuner, ratio 1/5", {"ratio": 0.2}),
    Variant("SC-Tuner, ratio 1/10", {"ratio": 0.1}),
    Variant("SC-Tuner, skips 0,11", {"skips": [0, 11]}),
    Variant("SC-Tuner, skips 0,3,6,9,11", {"skips": [0, 3, 6, 9, 11]}),
    Variant("SC-Tuner, conv", {"operator": "conv"}),
    Variant("SC-Tuner, ResPrefix", {"operator": "resprefix"}),
    Variant("CSC-Tuner, kernel 1", {"kernel": 1}, 1),
    Variant("CSC-Tuner, kernel 3", {"kernel": 3}, 1),
    Variant("CSC-Tuner, skips 0,3,4,6,7,9,11", {"skips": [0, 3, 4, 6, 7, 9, 11]}, 1),
    Variant("CSC-Tuner, dual conv", {"dual": True}, 1),
    Variant("CSC-Tuner, zero heads", {"cascade": "zero-heads"}, 1),
    Variant("CSC-Tuner, 2 conditions", {}, 2),
)
"""The settings of SCEdit's tables 1, 2, 5 and 6, and our heads."""

OF_TRANSFORMERS = ["blocks", "final_norm"]

DIFFSCALER_VARIANTS = (
    Variant("DiffScaler"),
    Variant("DiffScaler, q, k, v separate", {"layers": OF_TRANSFORMERS, "qkv": "separate"}),
    *(
        Variant(
            f"DiffScaler, low-rank only, d = {dim}",
            {"layers": OF_TRANSFORMERS, "dim": dim, "scale": False, "shift": "none", "gate": False},
        )
        for dim in (64, 1, 4, 16)
    ),
    Variant("DiffScaler, scale only, blocks", {"layers": ["blocks"], "dim": 0, "shift": "none"}),
    Variant("DiffScaler, shift only, blocks", {"layers": ["blocks"], "dim": 0, "scale": False}),
    Variant("DiffScaler, whole denoiser", {"layers": ["whole"]}),
    Variant("DiffScaler, branch biases", {"branch_bias": True, "shift": "biased"}),
    Variant("DiffScaler, 1 condition", {}, 1),
    Variant("DiffScaler, 1 condition by its latent", {"hint": "vae"}, 1),
)
"""DiffScaler's tables 1 and 3 on a transformer, table 2 on a U-Net, and what the paper leaves open."""


def low_rank(name: str) -> tuple[Variant, ...]:
    """The default, and DiffScaler's rank on the attention and on the layers that DiffScaler adapts."""
    return (
        Variant(name),
        Variant(f"{name}, rank 64", {"rank": 64}),
        Variant(f"{name}, rank 64, DiffScaler's layers", {"rank": 64, "layers": None}),
    )


LOCAL_CONDITIONS = 7
"""Uni-ControlNet's: canny, mlsd, hed, sketch, openpose, midas, seg."""
ELR_RATIO = 0.4225
"""The share of weights that ELR-Diffusion keeps: "up to 58 %" less."""

TUNERS: dict[str, Method] = {
    "full": Method(
        FullConfig, ".full", "Full", "trains every weight of the denoiser", "baseline", "none",
        1e-4, "DiT's own (Peebles & Xie 2023, section 4)",
        (Variant("full fine-tuning"),),
    ),
    "scedit": Method(
        SCEditConfig, ".scedit", "SCEdit",
        "edits the skip connections: SC-Tuner without conditions, CSC-Tuner with them",
        "Jiang et al. 2023, arXiv 2312.11392", "optional",
        1e-4, "twice the paper's 5e-5, for single GPUs and short runs", SCEDIT_VARIANTS,
    ),
    "diffscaler": Method(
        DiffScalerConfig, ".diffscaler", "DiffScaler",
        "scales and shifts the layers' outputs and adds a low-rank branch to each",
        "Nair et al. 2024, arXiv 2404.09976", "optional",
        1e-3, "the paper, section 4.2", DIFFSCALER_VARIANTS,
    ),
    "bitfit": Method(
        BitFitConfig, ".bitfit", "BitFit", "trains the biases", "Ben Zaken et al. 2022, arXiv 2106.10199", "none",
        1e-3, "DiffFit-pytorch's, which also trains BitFit",
        (Variant("BitFit"), Variant("BitFit, DiT blocks only", {"layers": ["blocks"]})),
    ),
    "difffit": Method(
        DiffFitConfig, ".difffit", "DiffFit", "trains biases, norms and scale factors of the blocks' outputs",
        "Xie et al. 2023, arXiv 2304.06648", "none",
        1e-3, "DiffFit-pytorch's: ten times pre-training's 1e-4, as the paper advises", (Variant("DiffFit"),),
    ),
    "lora": Method(
        LoRAConfig, ".peft_layers", "LoRA", "adds low-rank updates to layers, with peft's layers",
        "Hu et al. 2021, arXiv 2106.09685", "none",
        1e-4, "diffusers' train_text_to_image_lora.py", low_rank("LoRA"),
    ),
    "dora": Method(
        DoRAConfig, ".peft_layers", "DoRA", "LoRA with trained magnitudes of the layers' rows, with peft's layers",
        "Liu et al. 2024, arXiv 2402.09353", "none",
        1e-4, "LoRA's", low_rank("DoRA"),
    ),
    "lokr": Method(
        LoKrConfig, ".peft_layers", "LoKr", "adds Kronecker products to layers, with peft's layers",
        "Yeh et al. 2023 (LyCORIS), arXiv 2309.14859", "none",
        2e-4, "LyCORIS' example lokr_config.toml",
        (Variant("LoKr"), Variant("LoKr, factor 8", {"decompose_factor": 8})),
    ),
    "controlnet": Method(
        ControlNetConfig, ".controlnet", "ControlNet", "trains a copy of the encoder, with diffusers' model",
        "Zhang et al. 2023, arXiv 2302.05543", "required",
        1e-5, "the paper, appendix; diffusers' README of train_controlnet.py", (Variant("ControlNet", {}, 1),),
    ),
    "t2i-adapter": Method(
        T2IAdapterConfig, ".t2i_adapter", "T2I", "adds features of the map in the encoder, with diffusers' model",
        "Mou et al. 2023, arXiv 2302.08453", "required",
        1e-5, "the paper, section 4.1; diffusers' README of train_t2i_adapter_sdxl.py",
        (Variant("T2I-Adapter", {}, 1),),
    ),
    "controlnet-xs": Method(
        ControlNetXSConfig, ".controlnet_xs", "ControlNetXS",
        "trains a small encoder that talks to the base's, with diffusers' adapter",
        "Zavadski et al. 2023, arXiv 2312.06573", "required",
        1e-5, "ControlNet's; the authors' is not known", (Variant("ControlNet-XS", {}, 1),),
    ),
    "uni-controlnet": Method(
        UniControlNetConfig, ".unicontrolnet", "UniControlNet",
        "trains a copy of the encoder that sees all maps at once: the local adapter",
        "Zhao et al. 2023, arXiv 2305.16322", "required",
        1e-5, "the authors' train.py",
        (Variant("Uni-ControlNet", {}, 1), Variant("Uni-ControlNet, 7 conditions", {}, LOCAL_CONDITIONS)),
    ),
    "elr": Method(
        ELRConfig, ".elr", "ELR",
        "updates a frozen copy of the encoder by Kronecker products of low rank: stage II",
        "ELR-Diffusion, anonymous submission 2023", "required",
        1e-5, "Uni-ControlNet's; the paper prints 10^5", (
            Variant("ELR stage II", {}, 1),
            Variant("ELR stage II, 7 conditions", {}, LOCAL_CONDITIONS),
            Variant("ELR stage II, 7 conditions, low-rank injection", {"ratio": ELR_RATIO}, LOCAL_CONDITIONS),
        ),
    ),
    "controllora": Method(
        ControlLoRAConfig, ".controllora", "ControlLoRA",
        "LoRA on attention, with an encoded map added to what the queries' reads",
        "Wu 2023, github.com/HighCWu/ControlLoRA", "required",
        1e-4, "the author's tasks/train_canny.py",
        (Variant("ControlLoRA", {}, 1), Variant("ControlLoRA, rank 64", {"rank": 64}, 1)),
    ),
}  # fmt: skip


def find_method(name: str) -> Method:
    """The row of that name. Raises `UsageError` naming the nearest method for an unknown one."""
    if name not in TUNERS:
        raise unknown("method", name, TUNERS)
    return TUNERS[name]


def tuner_class(name: str) -> type[Tuner]:
    """The class of method `name`. Raises `UsageError` naming the nearest method for an unknown one."""
    return find_method(name).load()


def with_learning_rate(config: TrainConfig) -> TrainConfig:
    """The config with its method's learning rate where it gives none. Raises `UsageError` for an unknown method."""
    return config if config.lr is not None else config.model_copy(update={"lr": find_method(config.method).lr})


def method_config(name: str, values: Mapping[str, Any]) -> Config:
    """The settings of method `name`, validated. Raises `UsageError` for an unknown method or key, or a wrong value."""
    return build(find_method(name).config, values, f"{name} ")


def check_routing(config: TrainConfig) -> None:
    """Raises `UsageError` for tasks with a method that cannot tell the samples of a batch apart. Imports torch then."""
    if config.tasks and not tuner_class(config.method).routes:
        raise UsageError(
            f"--tasks: method {config.method} changes the denoiser for a whole batch, which tasks cannot share. "
            "Train each in a run of its own."
        )
