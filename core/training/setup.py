"""What a training needs before its first step: base, data, tuners, optimizer, and the state to resume from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from ..backbones.loading import Backbone
from ..checkpoint import load_tuner, read_meta, task_files
from ..config import MemoryLevel, TrainConfig
from ..data.prepared import PreparedSet, prepare
from ..data.prompts import Prompt
from ..data.records import Source
from ..data.streaming.folder import PreparedFolder, Rows
from ..data.streaming.serving import StreamedSet
from ..devices import torch_dtype
from ..errors import SctoolError, UsageError
from ..files import write_json
from ..progress import Progress
from ..runs import Run
from ..sites.attaching import TunedBackbone
from ..tasks import task_configs
from ..tuners import check_routing, method_config, tuner_class, with_learning_rate
from ..tuners.base import Tuner
from .lanes import Data, Lane, TaskSet
from .memory import Part, chosen_level, estimate
from .model import build_model, compile_blocks
from .objective import DiffusionObjective
from .recipe import Recipe
from .splits import split_records
from .state import load_state
from .training import Training, whole

Say = Callable[[str], None]


def prepare_data(
    config: TrainConfig, source: Source, held_out: Source | None, backbone: Backbone, progress: Progress
) -> Data:
    """Encodes what the cache lacks; the training set may turn out to be empty."""
    size = config.size or backbone.resolution
    backbone.check_size(size)
    training, validation = split_records(source, held_out, config)

    def prepared(records: Sequence[Any], flip: bool) -> PreparedSet | StreamedSet:
        if isinstance(records, Rows):
            return stream(records, backbone, config, flip)
        return prepare(
            records, backbone, size=size, conds=config.conditions, flip=flip, device=backbone.device,
            prompt=backbone.family.prompt_rule(config.trigger, config.caption), progress=progress.note,
        )  # fmt: skip

    return Data(prepared(training, config.flip), prepared(validation, False) if validation else None)


def stream(rows: Rows, backbone: Backbone, config: TrainConfig, flip: bool) -> StreamedSet:
    """Rows of a prepared folder as a set. Raises `UsageError` when they were made with other encoders."""
    rows.folder.check_base(backbone.id, backbone.vae_hash, (backbone.conditioner_hash,), backbone.family.by_class)
    prompts = ["", *rows.folder.manifest.labels]
    encoded = backbone.encode_prompts(prompts)
    table = {prompt: {name: values[i].cpu() for name, values in encoded.items()} for i, prompt in enumerate(prompts)}
    prompt = backbone.family.prompt_rule(config.trigger, config.caption)
    served = rows.mirrored() if flip else rows
    return StreamedSet(served, config.conditions, prompt, table[""], table if backbone.family.by_class else None)


def init_file(init: str, task: str | None) -> str | Path:
    """What a task goes on from: the tuner of its name where `init` is a run of several tasks, else `init` itself."""
    return task_files(init).get(task or "", init)


def added_classes(
    config: TrainConfig, source: Source, held_out: Source | None, backbone: Backbone, task: str | None = None
) -> tuple[str, ...]:
    """The classes of the sets that the base does not know, which the tuner adds; those of `init`, where it is given.

    Raises `UsageError` when the data has classes that `init` does not have.
    """
    family = backbone.family
    rule = family.prompt_rule(config.trigger, config.caption)
    prompts = {prompt for part in (source, held_out) if part is not None for prompt in prompts_of(part, rule)}
    classes = family.added(backbone.pipe, prompts)
    if not config.init:
        return classes
    theirs = tuple(read_meta(init_file(config.init, task)).get("classes", ()))
    if missing := sorted(set(classes) - set(theirs)):
        raise UsageError(f"init={config.init} has no class {', '.join(missing)}, which the data has; leave init out.")
    return theirs


def prompts_of(source: Source, rule: Prompt) -> Iterable[str]:
    """What the images of a set are conditioned on; of a prepared folder its labels, without reading its records."""
    return source.manifest.labels if isinstance(source, PreparedFolder) else (rule(record) for record in source)


def token_count(model: TunedBackbone, latent: tuple[int, ...]) -> int:
    """How many tokens the denoiser makes of a latent (C, h, w); 0 where it makes none."""
    return latent[1] * latent[2] // patch_side(model.denoiser) ** 2 if model.tokens else 0


def patch_side(denoiser: nn.Module) -> int:
    """The side of a transformer's token in the latent; 1 for other denoisers."""
    config: Any = denoiser.config
    return config.get("patch_size") or 1


def build_tuner(config: TrainConfig, backbone: Backbone, task: str | None = None) -> Tuner:
    """The untrained tuner of `config`, or the one in `config.init` to go on from; of `task`, where that has several.

    A run that names no settings of the method takes those of `init`. Raises `UsageError` when the two differ.
    """
    settings = method_config(config.method, config.tuner)
    if not config.init:
        torch.manual_seed(config.seed)
        tuner = tuner_class(config.method).build(
            settings, backbone.denoiser, config.conditions, backbone.vae_scale, backbone.classes
        )
        tuner.use(backbone)
        return tuner
    tuner = load_tuner(init_file(config.init, task), backbone)
    same = tuner.config == settings or not config.tuner
    if tuner.method != config.method or tuple(tuner.conditions) != config.conditions or not same:
        raise UsageError(
            f"init={config.init} holds {tuner.method} with conditions {list(tuner.conditions)} and {tuner.config}; "
            f"this run asks for {config.method} with {list(config.conditions)} and {settings}."
        )
    return tuner


def open_lanes(
    config: TrainConfig, run: Run, sets: Mapping[str | None, TaskSet], backbone: Backbone, accelerator: Accelerator,
    progress: Progress,
) -> list[Lane]:  # fmt: skip
    """A lane for each task, its data prepared and its tuner as a run of its own would start with it.

    Raises `SctoolError` for a task without an image.
    """
    check_routing(config)
    configs = task_configs(config)
    bases, data = {}, {}
    for task, own in configs.items():
        part = sets[task]
        bases[task] = backbone.with_classes(added_classes(own, part.source, part.held_out, backbone, task))
        with accelerator.main_process_first():
            data[task] = prepare_data(own, part.source, part.held_out, bases[task], progress)
        if not len(data[task].train):  # all processes find the same
            raise SctoolError(f"--data {own.data} has no image to train on; its faults are listed above.")
        refuse_changed_data(Run(run.path, task), own, data[task], accelerator.is_main_process)
    backbone.free_encoders()
    return [
        Lane(task, own, Run(run.path, task), bases[task], data[task], build_tuner(own, bases[task], task), sets[task])
        for task, own in configs.items()
    ]


def refuse_changed_data(run: Run, config: TrainConfig, data: Data, main: bool) -> None:
    """Notes in the run which version of a prepared set it trains on, in the `main` process.

    Raises `SctoolError` when a run that is resumed began with another version: it would not be its continuation.
    """
    if not isinstance(data.train, StreamedSet):
        return
    path, version = run.path / "-".join(filter(None, (run.task, "data.json"))), data.train.version
    if not run.states():
        if main:
            write_json(path, {"data": config.data, "version": version})
    elif path.is_file() and json.loads(path.read_text())["version"] != version:
        raise SctoolError(
            f"--data {config.data} was prepared anew since {run.path} began, so that resuming would not continue it. "
            "Train under another --name, or restore the prepared set."
        )


def memory_level(
    config: TrainConfig, lanes: Sequence[Lane], precision: str, processes: int, besides: int, say: Say
) -> MemoryLevel:
    """The level of memory of the config, or the one that fits its card. Raises `UsageError` where none does."""
    parts = {lane.name: Part(lane.backbone, lane.tuner, lane.config.conditions) for lane in lanes}
    size, width = config.size or lanes[0].backbone.resolution, torch.finfo(torch_dtype(precision)).bits // 8
    level, found = chosen_level(
        config.memory, lambda level: estimate(config, parts, size, level, width, processes), besides
    )
    if found is not None:
        say(f"{config.memory} of memory: training with {found}")
    return level


def set_up(
    config: TrainConfig, run: Run, backbone: Backbone, lanes: list[Lane], accelerator: Accelerator, precision: str,
    recipe: Recipe | None = None, say: Say = lambda line: None,
) -> Training:  # fmt: skip
    """Attaches the tuners, makes optimizer and objective, and restores the newest state.

    `say` is told the level of memory where it is chosen here.
    """
    recipe = recipe or Recipe()
    device, config = accelerator.device, with_learning_rate(config)
    lr = config.lr or 0.0
    tuners = [lane.tuner for lane in lanes]
    autocast = any(tuner.needs_autocast for tuner in tuners) or precision == "fp16"  # fp32 master weights need it
    level = memory_level(config, lanes, precision, accelerator.num_processes, recipe.besides(precision), say)
    model = build_model(backbone.denoiser, *tuners, tasks=[lane.name for lane in lanes], level=level).to(
        device, memory_format=torch.channels_last
    )
    parameters = [parameter for lane in lanes for parameter in lane.parameters]
    optimizer = torch.optim.AdamW(parameters, lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    rates = get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
    ema = EMAModel(parameters, decay=config.ema) if config.ema else None
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    start, recent = load_state(run, whole(lanes), optimizer, ema, scaler)
    if config.compile:
        compile_blocks(backbone.denoiser)
    noising = backbone.noising()
    ordinary = DiffusionObjective(
        backbone.family,
        noising,
        lanes[0].data.train.null_rows,
        config.size or backbone.resolution,
        device,
        dtype=torch.float32 if autocast else torch_dtype(precision),
        autocast=torch_dtype(precision) if autocast and precision != "fp32" else None,
        snr_gamma=config.snr_gamma,
        patch=patch_side(backbone.denoiser),
    )
    objective, net, factor = recipe.objective(ordinary, model), accelerator.prepare_model(model), rates.lr_lambdas[0]
    return Training(
        config, run, accelerator, backbone, lanes, model, net, objective, noising, parameters, optimizer,
        lambda step: lr * factor(step), ema, scaler, precision, start, recent,
        token_count(model, lanes[0].data.latent_shape),
    )  # fmt: skip
