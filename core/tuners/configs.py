"""The settings of each method, one class each. Imports no torch; `TUNERS` in `__init__.py` ties a class to its code."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..resolving import Config


class SCEditConfig(Config):
    """SCEdit (Jiang et al. 2023, arXiv 2312.11392): SC-Tuner without conditions, CSC-Tuner with them."""

    operator: Literal["linear", "conv", "resprefix"] = Field("linear", description="tuner operation (paper Tab. 5)")
    ratio: float = Field(1.0, gt=0, le=4, description="bottleneck width over skip width: r = int(C * ratio)")
    skips: tuple[int, ...] | None = Field(None, description="edited skips in encoder order; all when not given")
    kernel: Literal[1, 3] = Field(1, description="kernel of the cascade's dense convolutions (CSC only)")
    dual: bool = Field(
        False, description="dense convolution as conv3x3 to a fifth of the width, then conv1x1 (CSC only)"
    )
    cascade: Literal["zero-chain", "zero-heads"] = Field(
        "zero-chain", description="what is initialised to zero: the chain (paper), or a 1x1 head per level (CSC only)"
    )
    hint_channels: int | None = Field(None, description="width of the hint (CSC only); 256 (SDXL: 320) when not given")
    weights: dict[str, float] = Field(default_factory=dict, description="weight of each condition (alpha in eq. 7)")
    normalize: bool = Field(True, description="scale the condition weights to a sum of 1, as in eq. 7 (CSC only)")
    gains: dict[str, float] = Field(
        default_factory=dict, description="fixed strength of each condition, 1 when not given (CSC only)"
    )
    ranks: dict[int, int] | None = Field(
        None, description="bottleneck widths of an SC-Tuner by skip, instead of ratio; with conditions, beside them"
    )


class DiffScalerConfig(Config):
    """DiffScaler (Nair et al. 2024, arXiv 2404.09976): y = (1 + a) W x + s W_up relu(W_down x) + b_hat + b."""

    layers: tuple[str, ...] | None = Field(
        None, description="parts of the base, e.g. blocks, down_blocks, whole, or regular expressions over layer names"
    )
    dim: int | None = Field(None, ge=0, description="width d of the branch; 0 for none, 64 (U-Nets: 32) when not given")
    dims: dict[str, int] = Field(default_factory=dict, description="d of single branches, by layer, instead of dim")
    qkv: Literal["grouped", "separate"] = Field(
        "grouped", description="whether a transformer's q, k and v share W_down and s, as one fused layer"
    )
    scale: bool = Field(True, description="the scale a of a layer's outputs")
    shift: Literal["all", "biased", "none"] = Field(
        "all", description="the shift b: of all layers, of those with a bias, or of none"
    )
    gate: bool = Field(True, description="the scalar s, which starts at 0; without it W_up starts at 0")
    branch_bias: bool = Field(False, description="biases in W_down and W_up")
    hint: Literal["unshuffle", "vae"] = Field(
        "unshuffle", description="what a condition map becomes beside the latents: its pixels, or its own latent"
    )


class FullConfig(Config):
    """Full fine-tuning: every weight of the denoiser is trained."""


class BitFitConfig(Config):
    """BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): the biases are trained."""

    layers: tuple[str, ...] | None = Field(
        None, description="linear and convolutional layers by part or regular expression; all biases when not given"
    )


class DiffFitConfig(Config):
    """DiffFit (Xie et al. 2023, arXiv 2304.06648): biases, norm weights and new scale factors are trained."""


ADAPTED = "adapted layers, by part or regular expression; null: those that DiffScaler adapts"


class LoRAConfig(Config):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) with peft's layers."""

    rank: int = Field(8, ge=1, description="rank of the update (peft: r)")
    alpha: float | None = Field(None, gt=0, description="the update is multiplied by alpha / rank; rank when not given")
    layers: tuple[str, ...] | None = Field(("attention",), description=ADAPTED)
    ranks: dict[str, int] = Field(default_factory=dict, description="rank of single layers, instead of rank")
    alphas: dict[str, float] = Field(default_factory=dict, description="alpha of single layers, instead of alpha")


class DoRAConfig(LoRAConfig):
    """DoRA (Liu et al. 2024, arXiv 2402.09353) with peft's layers."""


class LoKrConfig(Config):
    """LoKr (LyCORIS, Yeh et al. 2023, arXiv 2309.14859) with peft's layers."""

    rank: int = Field(8, ge=1, description="rank of the second Kronecker factor, if smaller than half its width")
    alpha: float | None = Field(None, gt=0, description="the update is multiplied by alpha / rank; rank when not given")
    decompose_both: bool = Field(False, description="the first Kronecker factor has that rank too")
    decompose_factor: int = Field(
        -1, ge=-1, description="size of the first Kronecker factor; -1: near the square root of the width"
    )
    layers: tuple[str, ...] | None = Field(("attention",), description=ADAPTED)


class ControlNetConfig(Config):
    """ControlNet (Zhang et al. 2023, arXiv 2302.05543) as diffusers has it."""


class T2IAdapterConfig(Config):
    """T2I-Adapter (Mou et al. 2023, arXiv 2302.08453) as diffusers has it."""

    blocks: int = Field(2, ge=1, description="residual blocks per level")
    channels: Literal[1, 3] = Field(3, description="channels of the map: 3 for RGB, 1 for the mean of the three")
    start: Literal["zero", "random"] = Field(
        "zero", description="zero: training starts at the base; random: as published"
    )


class UniControlNetConfig(Config):
    """Uni-ControlNet's local adapter (Zhao et al. 2023, arXiv 2305.16322): one copied encoder for all maps."""

    fdn_start: Literal["pretrained", "default"] = Field(
        "pretrained", description="start of the norms that maps modulate: as the base's norms, or as published"
    )
    features: Literal["zero", "alive"] = Field(
        "zero", description="start of the maps' features: behind zero convolutions, as published, or with the variance "
        "kept, so that the copy is shown the maps from the first step on (not in the papers)"
    )  # fmt: skip
    width: float | None = Field(
        None, gt=0, le=4,
        description="widths of the maps' features over the published ones; 1, or less for bases narrower than SD, when "
        "not given",
    )  # fmt: skip
    ratio: float | None = Field(
        None, gt=0, lt=1,
        description="share of weights that low rank keeps in all convolutions outside the copy, e.g. 0.4225; full rank "
        "when not given",
    )  # fmt: skip


class ELRConfig(UniControlNetConfig):
    """ELR-Diffusion, stage II: Uni-ControlNet's adapter with the copy frozen and Kronecker updates of its layers."""

    n: int = Field(4, ge=1, le=64, description="terms of a layer's update, and the side of their first factors")
    rank: int = Field(8, ge=1, description="rank of each term's second factor")


class ControlLoRAConfig(Config):
    """ControlLoRA (Wu 2023, HighCWu/ControlLoRA, version 1): LoRA on attention, with encoded maps in the queries'."""

    rank: int = Field(4, ge=1, description="rank of the updates, and of those that the maps go through")
    weights: dict[str, float] = Field(default_factory=dict, description="weight of each condition")
    normalize: bool = Field(True, description="scale the condition weights to a sum of 1")


class ControlNetXSConfig(Config):
    """ControlNet-XS (Zavadski et al. 2023, arXiv 2312.06573) as diffusers has it."""

    ratio: float = Field(0.2, gt=0, le=1, description="width of its encoder over the base's")
    heads: tuple[int, ...] | None = Field(
        None, description="attention heads per level; the base's times ratio when not given"
    )
    time_embedding: bool = Field(True, description="a time embedding of its own, which starts as the base's")
    time_mix: float = Field(
        1.0, ge=0, le=1, description="m, its own time embedding's share being m^0.3; the base's has the rest"
    )
