"""Every setting of a run, as frozen, typed values, a class for each verb. Imports no torch.

A method's own settings are one class in `core/tuners/configs.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from .data.conditions import parse_conditions
from .data.prompts import check_template
from .errors import UsageError
from .resolving import Config, build

MemoryLevel = Literal["plain", "normal", "low", "lower", "minimum"]
LEVELS: tuple[MemoryLevel, ...] = get_args(MemoryLevel)
"""The levels of memory, from the most to the least; see `core/lean/levels.py`."""

# --------------------------------------------------------------------------------------------------- training


class TaskConfig(Config):
    """One of several tasks that are trained together. What it gives replaces the run's own value."""

    name: str = Field(pattern="^[a-z0-9_-]+$", description="the task's name: a-z, 0-9, _ and -")
    data: str | None = Field(None, description="its data; the run's own when not given")
    val_data: str | None = Field(None, description="its held-out set")
    maps: str | None = Field(None, description="folder of its condition maps")
    cond: tuple[str, ...] | None = Field(None, description="its conditions")
    trigger: str | None = Field(None, description="word placed before its captions")
    caption: str | None = Field(None, description="template of its captions that are made from class labels")
    tuner: dict[str, Any] | None = Field(None, description="the method's own settings, added to the run's")

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, value: str) -> str:
        if value in RESERVED:
            raise UsageError(f"a task cannot be called '{value}': a run has files of that name.")
        return value

    @field_validator("cond")
    @classmethod
    def _one_condition_each(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else tuple(map(str, parse_conditions(value)))

    @field_validator("caption")
    @classmethod
    def _label_alone(cls, value: str | None) -> str | None:
        return None if value is None else check_template(value)


RESERVED = ("tuner", "preview", "base", "tuned")
"""Names of files and folders in a run."""


SIZES = ("ratio", "budget", "ranks", "prune")
"""The settings that decide a student's size."""
SHARE = 0.4225
"""A student's parameters as a share of the base's, where nothing else decides: as many as the paper's ratio keeps."""


class StudentConfig(Config):
    """What a student of a base is, before it is trained. One of ratio, budget, ranks and prune decides its size."""

    ratio: float | None = Field(
        None, description="share of the weights of every layer that is kept, as two thin layers; the paper's is 0.4225"
    )
    budget: float | None = Field(
        None,
        gt=0,
        description="the student's parameters, or their share of the base's; ranks go by shares of the layers' energy; "
        f"{SHARE} where nothing else decides the size",
    )
    ranks: dict[str, int] | None = Field(None, description="ranks by layer name or regular expression")
    prune: Literal["base", "small", "tiny"] | None = Field(
        None, description="remove blocks instead, as BK-SDM's student of this size"
    )
    form: Literal["flat", "spatial"] = Field(
        "flat", description="convolutions as k x k and 1 x 1, or as k x 1 and 1 x k"
    )
    start: Literal["whitened", "balanced", "paper"] | None = Field(
        None, description="SVD of weights times measured inputs (the default); or of the weights alone, their singular "
        "values on both factors, or on the second"
    )  # fmt: skip
    untouched: tuple[str, ...] = Field((), description="beginnings of the names of layers that stay as they are")

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, values: Any) -> Any:
        named = [key for key in SIZES if values.get(key) is not None]
        if len(named) > 1:
            raise UsageError(f"{' and '.join(named)} each decide the student's size; give one of them.")
        values = values if named else {**values, "budget": SHARE}
        low_rank = values.get("prune") is None and values.get("start") is None
        return {**values, "start": "whitened"} if low_rank else values

    @model_validator(mode="after")
    def _of_low_rank_layers(self) -> StudentConfig:
        if self.prune and (ignored := [key for key in ("form", "start", "untouched") if key in self._changed()]):
            raise UsageError(f"{' and '.join(ignored)} are about low-rank layers, which prune={self.prune} has not.")
        return self

    def _changed(self) -> set[str]:
        """The settings that are not at their defaults: a run's saved config names them all."""
        return {key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default}


class DistillConfig(StudentConfig):
    """How a student learns from its teacher. The three losses are added with these weights."""

    output: float = Field(1.0, ge=0, description="weight of the difference to the teacher's output")
    weighting: Literal["native", "epsilon", "truncated_snr", "snr_plus_one", "min_snr"] = Field(
        "native", description="weights of that difference over the noise schedule"
    )
    gamma: float = Field(5.0, gt=0, description="gamma of min_snr")
    feature: float = Field(1.0, ge=0, description="weight of the relative differences of the blocks' outputs")
    task: float = Field(0.0, ge=0, description="weight of the ordinary training loss")
    cache: int = Field(0, ge=0, description="teacher outputs kept on disk per image, drawn once; 0 for none")

    @model_validator(mode="after")
    def _something_to_learn(self) -> DistillConfig:
        if not (self.output or self.feature or self.task):
            raise UsageError("output, feature and task are all 0, so that the student has nothing to learn.")
        if self.cache and self.feature:
            raise UsageError("the cache holds the teacher's outputs and not its blocks'; give feature=0 with cache.")
        return self


class TrainConfig(Config):
    """Everything that decides a training run's result."""

    former = frozenset({"checkpointing"})

    method: str = Field("scedit", description="what to train; see `sctool methods`")
    tuner: dict[str, Any] = Field(default_factory=dict, description="the method's own settings")
    cond: tuple[str, ...] = Field((), description="conditions to control by, e.g. canny or canny:low=50,color")
    base: str = Field("mini", description="'mini', a diffusers-format folder, or a hub id")
    init: str | None = Field(None, description="tuner file or run to continue from")
    tasks: tuple[TaskConfig, ...] = Field((), description="tasks that are trained together, a tuner each")
    distill: DistillConfig | None = Field(None, description="the student of `sctool distill`; the base is its teacher")

    data: str = Field("photos", description="'photos', an image folder, webdataset shards, or a prompt.json")
    maps: str | None = Field(None, description="folder of condition maps that are not in the data set")
    val_data: str | None = Field(
        None, description="held-out set; images marked validation or test, or a random tenth when not given"
    )
    val_count: int = Field(64, ge=0, description="held-out images used for validation during training")
    size: int | None = Field(None, ge=8, description="training resolution in pixels; the base's own when not given")
    flip: bool = Field(False, description="also train on mirrored images; both are cached")
    trigger: str = Field("", description="word placed before every caption, e.g. <sce> for few-shot styles")
    caption: str = Field(
        "a photo of a {label}", description="template of the caption for images that have a class label but no caption"
    )

    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch: int = Field(8, ge=1, description="images per batch, over all processes")
    accumulate: int = Field(1, ge=1, description="batches accumulated per optimizer step")
    lr: float | None = Field(None, gt=0, description="learning rate; the method's own when not given")
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = Field(
        "constant", description="learning rate schedule"
    )
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's betas")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient norm above which gradients are clipped; 0 for none")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto, fp32, bf16 or fp16 for the frozen base; tuners stay in fp32"
    )
    memory: str = Field(
        "normal", description="plain, normal, low, lower or minimum: the less, the more is computed again in backward; "
        "or a card's memory, e.g. 24GB, for the first of these but plain that fits it"
    )  # fmt: skip
    compile: bool = Field(False, description="torch.compile the denoiser's repeated blocks")
    snr_gamma: float | None = Field(None, gt=0, description="min-SNR loss weighting (arXiv 2303.09556), usually 5")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of captions replaced by the empty prompt")
    mask: float = Field(
        0.0, ge=0, lt=1, description="share of tokens left out of each training step (transformers only)"
    )
    mask_anneal: float = Field(
        0.2, ge=0, le=1, description="share of the steps, at the end, over which mask falls to 0"
    )
    hint_dropout: float = Field(0.0, ge=0, le=1, description="share of hints replaced by black, each by itself")
    hint_keep_all: float = Field(0.0, ge=0, le=1, description="share of images that keep all hints all the same")
    hint_drop_all: float = Field(0.0, ge=0, le=1, description="share of images that lose all hints together")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the weights' moving average; 0 for none")
    seed: int = Field(0, description="seed of everything random")

    save_every: int = Field(500, ge=1, description="steps between resume states")
    keep: int = Field(2, ge=1, description="number of resume states kept")
    validate_every: int = Field(500, ge=0, description="steps between held-out losses and adherence; 0 for none")
    sample_every: int = Field(500, ge=0, description="steps between preview grids; 0 for none")
    preview_steps: int = Field(20, ge=1, description="sampling steps of previews and adherence")
    guidance: float | None = Field(
        None, ge=0, description="classifier-free guidance of previews and adherence; the base's usual when not given"
    )

    @model_validator(mode="before")
    @classmethod
    def _checkpointing(cls, values: Any) -> Any:
        """Runs from before `memory` have `checkpointing`, which is memory=minimum, in their settings."""
        if not isinstance(values, Mapping) or "checkpointing" not in values:
            return values
        rest = {key: value for key, value in values.items() if key != "checkpointing"}
        return {"memory": "minimum", **rest} if values["checkpointing"] is True else rest

    @field_validator("memory")
    @classmethod
    def _level_or_size(cls, value: str) -> str:
        if value not in LEVELS and card_bytes(value) is None:
            raise UsageError(f"memory={value}: write {', '.join(LEVELS)}, or a card's memory as 24GB.")
        return value

    @field_validator("hint_drop_all")
    @classmethod
    def _shares_of_one(cls, value: float, info: ValidationInfo) -> float:
        if value + info.data.get("hint_keep_all", 0) > 1:
            raise UsageError("hint_keep_all and hint_drop_all are shares of the same images; lower one to sum to 1.")
        return value

    @field_validator("cond")
    @classmethod
    def _one_condition_each(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(str, parse_conditions(value)))

    @field_validator("caption")
    @classmethod
    def _label_alone(cls, value: str) -> str:
        return check_template(value)

    @field_validator("tasks", mode="before")
    @classmethod
    def _tasks(cls, rows: Any) -> Any:
        if not isinstance(rows, list | tuple):
            return rows
        return tuple(_task(row, f"task {number}: ") for number, row in enumerate(rows, 1))

    @field_validator("tasks")
    @classmethod
    def _different_names(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        names = [task.name for task in tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"two tasks are called '{twice[0]}'; give each a name of its own.")
        return tasks

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names of the conditions, without annotator settings."""
        return tuple(spec.name for spec in parse_conditions(self.cond))


def card_bytes(memory: str) -> int | None:
    """The bytes of a card's memory, written as 24GB (1e9 bytes each); None for anything else, as a level."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?GB", memory, re.IGNORECASE)
    return int(float(match[1]) * 1e9) or None if match else None


def _task(row: Any, where: str) -> TaskConfig:
    """One row of `tasks`. Raises `UsageError` for a row without a name, and for wrong keys or values."""
    if isinstance(row, TaskConfig):
        return row
    if not isinstance(row, Mapping) or not isinstance(row.get("name"), str):
        raise UsageError(f"{where}{row!r} is no task: write {{name: NAME, data: FOLDER, ...}}.")
    return build(TaskConfig, row, where)


# --------------------------------------------------------------------------------------------------- sampling


class SampleConfig(Config):
    """How images are sampled; with the tuners and the base this reproduces an image."""

    scheduler: Literal["ddim", "dpm++", "unipc"] = Field("ddim", description="sampler")
    steps: int = Field(50, ge=1, le=1000, description="sampling steps")
    guidance: float | None = Field(
        None, ge=0, description="classifier-free guidance, 1 for none; when not given 7.5, and 4 for DiT"
    )
    key_steps: tuple[int, ...] = Field(
        (), description="steps at which the encoder runs, from 0; the others reuse its features. All when not given"
    )
    rescale: float = Field(0.0, ge=0, le=1, description="guidance rescale (arXiv 2305.08891)")
    negative: str = Field("", description="negative prompt")
    size: int | None = Field(None, ge=8, description="image side in pixels; the base's own when not given")
    batch: int = Field(8, ge=1, description="images per batch; changes images by rounding only")

    @field_validator("key_steps")
    @classmethod
    def _steps_there_are(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        steps = info.data.get("steps", 0)
        for key in value:
            if not 0 <= key < steps:
                raise UsageError(f"key step {key} of {steps} steps: they are counted from 0 to {steps - 1}.")
        return tuple(sorted({0, *value})) if value else ()


# -------------------------------------------------------------------------------------- annotating and preparing


class AnnotateConfig(Config):
    """Everything that decides what `sctool annotate` writes, and how it goes about it."""

    src: str = Field(description="'photos', an image folder, shards, prompt.json, one image, or '-' for paths on stdin")
    cond: tuple[str, ...] = Field(("canny",), description="conditions, e.g. canny:low=50,high=150,color")
    out: str | None = Field(None, description="folder to write; annotated/NAME when not given")
    size: str = Field("none", description="none, short:N (shorter side), crop:N or crop:BASE (as the trainer crops)")
    layout: Literal["merged", "maps"] = Field("merged", description="merged: a complete data set; maps: only the maps")
    render: bool = Field(False, description="store maps as full-size RGB hints instead of their smallest form")
    seed: int = Field(0, description="seed of masks and random thresholds, together with each image's key")
    limit: int | None = Field(None, ge=1, description="only the first N images")
    jobs: int | None = Field(None, ge=1, description="worker processes; all cores when not given")
    ray: str | None = Field(None, description="run on a Ray cluster: its address, auto, or local")
    shards: str | None = Field(None, description="K/N: the K-th of N array jobs that write one set together")
    strict: bool = Field(False, description="fail at the end if any image could not be read")

    @field_validator("cond")
    @classmethod
    def _one_condition_each(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(str, parse_conditions(value)))


class PrepareConfig(Config):
    """Everything that decides what `sctool prepare` writes, and how it goes about it."""

    src: str = Field(description="'photos', an image folder, shards, or prompt.json")
    base: str = Field("mini", description="'mini', a diffusers-format folder, or a hub id; its encoders are used")
    cond: tuple[str, ...] = Field((), description="conditions; maps that the data lack are made, e.g. canny:low=50")
    out: str | None = Field(None, description="folder to write; prepared/NAME when not given")
    maps: str | None = Field(None, description="folder of condition maps that are not in the data set")
    size: int | None = Field(None, ge=8, description="training resolution in pixels; the base's own when not given")
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="precision of stored latents and text rows")
    flip: bool = Field(False, description="also prepare mirrored images")
    trigger: str = Field("", description="word placed before every caption, e.g. <sce> for few-shot styles")
    caption: str = Field(
        "a photo of a {label}", description="template of the caption for images that have a class label but no caption"
    )
    seed: int = Field(0, description="seed of masks and random thresholds, together with each image's key")
    batch: int = Field(16, ge=1, description="images per pass of the autoencoder; changes latents by rounding only")
    limit: int | None = Field(None, ge=1, description="only the first N images")
    jobs: int | None = Field(None, ge=1, description="worker processes; all cores, or two a GPU, when not given")
    ray: str | None = Field(None, description="run on a Ray cluster: its address, auto, or local")
    shards: str | None = Field(None, description="K/N: the K-th of N array jobs that write one set together")
    strict: bool = Field(False, description="fail at the end if any image could not be read")

    @field_validator("cond")
    @classmethod
    def _one_condition_each(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(str, parse_conditions(value)))

    @field_validator("caption")
    @classmethod
    def _label_alone(cls, value: str) -> str:
        return check_template(value)
