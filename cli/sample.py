"""`sctool sample`: prompts and hints in, a folder of images and all that is needed to make them again out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import UsageError, unknown
from ..core.fast import FAST_HELP, with_fast
from .options import help_of
from .prompts import read_hints, read_requests, read_rows

if TYPE_CHECKING:
    from ..core.chosen import Chosen
    from ..core.sampling import Request


def sample(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Prompts to sample.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help='Text file, one prompt per line; or .jsonl with "prompt", "seed", "hints" and "task".'
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="LABEL_OR_ID", help="A class of a class-conditional base; repeatable."),
    ] = None,
    tuner: Annotated[
        list[str] | None,
        typer.Option(help="Run, tuner file, or FILE:SCALE; repeatable. \\[default: the latest run]"),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task of a run that has several; repeatable, or a,b. An ordinary run's task is its name."),
    ] = None,
    no_tuner: Annotated[bool, typer.Option("--no-tuner", help="Sample the base alone.")] = False,
    base: Annotated[str | None, typer.Option(help="Base to sample with. \\[default: the tuner's]")] = None,
    hint: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE[:WEIGHT]", help="A condition map, e.g. canny=edges.png:0.7.")
    ] = None,
    photo: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE[:WEIGHT]", help="A photograph to extract the map from, e.g. canny=chair.jpg."),
    ] = None,
    no_normalize: Annotated[
        bool, typer.Option("--no-normalize", help="Use the condition weights as given, not scaled to a sum of 1.")
    ] = False,
    compose: Annotated[
        str | None,
        typer.Option(help="How tuners act together: sum, or routed, the strongest at each place. \\[default: sum]"),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Images per prompt, or held-out images to draw.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; each further image adds 1.")] = 0,
    scheduler: Annotated[str | None, typer.Option(help=help_of("SampleConfig", "scheduler"))] = None,
    steps: Annotated[int | None, typer.Option(help=help_of("SampleConfig", "steps"))] = None,
    fast: Annotated[bool, typer.Option("--fast", help=FAST_HELP)] = False,
    key_steps: Annotated[
        str | None, typer.Option(metavar="LIST", help=help_of("SampleConfig", "key_steps") + " Implied by --fast.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help=help_of("SampleConfig", "guidance"))] = None,
    negative: Annotated[str | None, typer.Option(help=help_of("SampleConfig", "negative"))] = None,
    size: Annotated[int | None, typer.Option(help=help_of("SampleConfig", "size"))] = None,
    batch: Annotated[int | None, typer.Option(help=help_of("SampleConfig", "batch"))] = None,
    rescale: Annotated[float | None, typer.Option(help=help_of("SampleConfig", "rescale"))] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. \\[default: samples, or in the run]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Load a tuner made for another base.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Sample images with unmodified diffusers pipelines.

    Without a prompt, the held-out captions and hints of the latest run are sampled by the base and by the tuned model.
    With several tasks each prompt is drawn once for each, all in one batch.

    Examples:

      sctool sample                                           held-out images of the latest run

      sctool sample --tuner runs/canny --base runs/small/student    the same with a student of the run's base

      sctool sample "a photo of a black hat" --hint canny=edges.png --count 4

      sctool sample "a chair" --tuner runs/canny --tuner runs/color --hint canny=e.png:0.7 --hint color=c.png:0.3

      sctool sample "a hat" --tuner edges --tuner colors --hint canny=e.png --photo color=c.jpg --compose routed

      sctool sample "a coat" --tuner runs/multi --task edges,depth --hint canny=e.png --hint depth=d.png

      sctool sample --class hat --class 7 --tuner runs/hats --count 4

      sctool sample --prompts prompts.txt --scheduler dpm++ --steps 20 --out images

      sctool sample "a chair" --tuner runs/canny --hint canny=edges.png --fast
    """
    from ..core.chosen import choose, split_scale

    tasks = list(dict.fromkeys(name.strip() for text in task or [] for name in text.split(",") if name.strip()))
    if no_tuner and (tuner or task):
        raise UsageError(f"--{'tuner' if tuner else 'task'} and --no-tuner exclude each other.")
    flags: dict[str, Any] = {
        "scheduler": scheduler, "steps": steps, "guidance": guidance, "negative": negative, "size": size,
        "batch": batch, "rescale": rescale, "key_steps": key_steps,
    }  # fmt: skip
    flags = with_fast(flags) if fast else flags
    tuners = [split_scale(text) for text in tuner or []]
    if prompts or prompts_file or classes:
        rows = read_rows([*(prompts or []), *(classes or [])], prompts_file)
        tasks = tasks or list(dict.fromkeys(row["task"] for row in rows if row.get("task")))
        chosen = [] if no_tuner else choose(tuners or [(str(find_latest()), 1.0)], tasks)
        check_compose(compose, chosen)
        drawer = Sampler(chosen, base, flags, by_class=bool(classes), force=force, offline=offline, quiet=quiet)
        hints, weights = drawer.hints(hint or [], photo or [])
        if compose == "routed" and not no_normalize:
            check_shares(weights, chosen)
        requests = drawer.requests(rows, prompts_file, count or 1, seed, hints)
        normalize = False if no_normalize else None
        sheets = [drawer.write(requests, out or Path("samples"), weights, normalize, compose)]
    else:
        if hint or photo:
            raise UsageError("a hint needs a prompt to go with it: sctool sample PROMPT --hint NAME=FILE.")
        if len(tuners) > 1:
            raise UsageError("the held-out images of one run are drawn at a time; give a prompt, or a single --tuner.")
        if compose:
            raise UsageError("--compose is for several tuners, and held-out images are drawn by one; give a prompt.")
        sheets = sample_held_out(
            tuners[0] if tuners else (None, 1.0), flags, tasks=tasks, count=count or 8, seed=seed, base_alone=no_tuner,
            base=base, force=force, normalize=False if no_normalize else None, out=out, offline=offline, quiet=quiet,
        )  # fmt: skip
    print(json.dumps({"sheets": list(map(str, sheets))}) if as_json else "\n".join(map(str, sheets)))


def check_compose(rule: str | None, chosen: list[Chosen]) -> None:
    """Raises `UsageError` for a rule of composition that is not there, or with which one of the tuners cannot act."""
    if rule is None:
        return
    from ..core.sites.attaching import check_composable
    from ..core.sites.composing import DEFAULT, check_rule
    from ..core.tuners import tuner_class

    if not chosen:
        raise UsageError("--compose says how tuners act together; leave it out with --no-tuner.")
    if check_rule(rule) != DEFAULT:
        check_composable([tuner_class(one.meta["method"]) for one in chosen])


def check_shares(weights: dict[str, float], chosen: list[Chosen]) -> None:
    """Raises `UsageError` for a weight that would do nothing: that of a tuner's only condition, 1 when routed."""
    for one in chosen:
        names = one.meta.get("conditions", ())
        if len(names) == 1 and names[0] in weights and one.meta.get("config", {}).get("normalize", True):
            raise UsageError(
                f"with --compose routed the weight of {names[0]} is a share within {one.name}, which has no other "
                "condition. Give that tuner a scale, --tuner FILE:SCALE, or pass --no-normalize."
            )


def find_latest() -> Path:
    """The folder of the latest run. Raises `UsageError` where there is none."""
    from ..core.runs import find_run

    return find_run(None).path


def sample_held_out(
    tuner: tuple[str | None, float], flags: dict[str, Any], *, tasks: list[str], count: int, seed: int,
    base_alone: bool, base: str | None, force: bool, normalize: bool | None, out: Path | None, offline: bool,
    quiet: bool,
) -> list[Path]:  # fmt: skip
    """Samples the held-out captions and hints of a run, or of its tasks (all when none are named).

    Those of another `base` are kept apart from the run's own, by which it is evaluated. Returns the contact sheets.
    """
    from ..core.config import SampleConfig
    from ..core.resolving import resolve_config
    from ..core.runs import find_run
    from ..eval.heldout import sample_heldout

    name, scale = tuner
    run = find_run(name)
    if base and out is None:
        out = run.path / f"samples-on-{Path(base).name}"
    sheets = []
    for part in [run.of_task(task) for task in tasks] or run.parts():
        guidance = part.config.guidance if flags["guidance"] is None else flags["guidance"]
        folders = sample_heldout(
            part,
            count=count,
            sampling=resolve_config(SampleConfig, flags={**flags, "guidance": guidance}),
            seed=seed,
            which=("base",) if base_alone else ("base", "tuned"),
            scale=scale,
            quiet=quiet,
            offline=offline,
            out=out / (part.task or "") if out else None,
            base=base,
            force=force,
            normalize=normalize,
        )
        sheets.append(folders[0].parent / "sheet.png")
    return sheets


class Sampler:
    """A base with tuners, loaded for prompts from the command line."""

    def __init__(
        self, chosen: list[Chosen], base: str | None, flags: dict[str, Any], *, by_class: bool = False, force: bool,
        offline: bool, quiet: bool,
    ) -> None:  # fmt: skip
        """The base is the tuners' when not given. `by_class`: classes were asked for.

        Raises `UsageError` for classes of a base that is conditioned on text.
        """
        from ..core.backbones.bases import family_of
        from ..core.backbones.loading import load_backbone
        from ..core.checkpoint import load_tuner
        from ..core.config import SampleConfig
        from ..core.devices import best_device
        from ..core.progress import Progress
        from ..core.resolving import resolve_config

        config = resolve_config(SampleConfig, flags=flags)
        self.chosen, self.progress = chosen, Progress(quiet)
        from ..core.chosen import base_of

        base = base or base_of(chosen)
        if by_class and not family_of(base, offline).by_class:
            raise UsageError(f"--class is for class-conditional bases; {base} is conditioned on text: pass a prompt.")
        self.backbone = load_backbone(base, device=best_device(), offline=offline)
        self.config = config.model_copy(update={"size": config.size or self.backbone.resolution})
        self.tuners = [load_tuner(one.file, self.backbone, force=force) for one in chosen]
        self.tasks = list(dict.fromkeys(one.task for one in chosen)) or [None]

    @property
    def size(self) -> int:
        """The side of the images in pixels."""
        return self.config.size or self.backbone.resolution

    @property
    def classes(self) -> dict[str | None, tuple[str, ...]]:
        """The classes that the tuners of each task add to the base's."""
        return {one.task: tuner.classes for one, tuner in zip(self.chosen, self.tuners, strict=True) if tuner.classes}

    def conditions(self, task: str | None) -> set[str]:
        """The conditions of a task's tuners."""
        pairs = zip(self.chosen, self.tuners, strict=True)
        return {name for one, tuner in pairs if one.task == task for name in tuner.conditions}

    def elsewhere(self, request: Request) -> bool:
        """Whether the request's class is one that other tasks add, and its own task does not."""
        others = {label for task, labels in self.classes.items() if task != request.task for label in labels}
        return request.prompt in others - set(self.classes.get(request.task, ()))

    def hints(self, hints: list[str], photos: list[str]) -> tuple[dict[str, Any], dict[str, float]]:
        """`read_hints`, with photographs annotated as the maps that the tuners were trained on."""
        map_settings = {name: how for one in self.chosen for name, how in one.meta.get("maps", {}).items()}
        return read_hints(hints, photos, self.size, map_settings)

    def requests(
        self, rows: list[dict[str, Any]], file: Path | None, count: int, seed: int, hints: dict[str, Any]
    ) -> list[Request]:
        """`read_requests`, a class for the tasks that know it; says how many prompts the text encoder cuts off.

        Raises `UsageError` for a hint that no task takes, and for a class that the base and the tuners do not have.
        """
        known = {task: self.conditions(task) for task in self.tasks if task}
        for name in hints if known else ():
            if not any(name in conditions for conditions in known.values()):
                raise unknown("hint", name, set().union(*known.values()) or ("none, no task has a condition",))
        requests = read_requests(rows, file, count, seed, hints, self.size, known)
        if self.backbone.family.by_class:
            from ..core.sampling import encoded

            requests = [request for request in requests if not self.elsewhere(request)]
            encoded(self.backbone, [(request.prompt, request.task) for request in requests], self.classes)
        texts = {request.prompt for request in requests}
        cut = sum(self.backbone.too_long(text) for text in texts)
        if cut:
            what = f"{cut} of {len(texts)} prompts are longer than the text encoder reads"
            self.progress.note(f"{what}; the rest of each is ignored")
        return requests

    def write(
        self, requests: list[Request], folder: Path, weights: dict[str, float], normalize: bool | None,
        compose: str | None,
    ) -> Path:  # fmt: skip
        """Samples the requests into `folder`; returns the contact sheet."""
        from ..core.sampling import sample_images, sampling_protocol, write_samples
        from ..core.sites.attaching import tuned

        used = [
            {"method": tuner.method, "file": one.name, "scale": one.scale, "weights": weights}
            | ({"task": one.task} if one.task else {})
            for tuner, one in zip(self.tuners, self.chosen, strict=True)
        ]
        attached = tuned(
            self.backbone.denoiser,
            *self.tuners,
            scales=[one.scale for one in self.chosen],
            weights=weights or None,
            normalize=normalize,
            tasks=[one.task for one in self.chosen],
            compose=compose,
        )
        rule = (compose or "sum") if self.tuners else None
        with self.progress.counting(len(requests), "sampling") as advance, attached:
            images = sample_images(self.backbone, requests, self.config, advance, classes=self.classes)
            write_samples(folder, images, sampling_protocol(self.backbone, self.config, used, rule))
        return folder / "sheet.png"
