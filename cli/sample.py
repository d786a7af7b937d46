"""`sctool sample`: prompts and hints in, a folder of images and all that is needed to make them again out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import UsageError
from .options import help_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..core.sampling import Request


def sample(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Prompts to sample.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", help='Text file, one prompt per line; or .jsonl with "prompt", "seed" and "hints".'),
    ] = None,
    tuner: Annotated[
        list[str] | None,
        typer.Option(help="Run, tuner file, or FILE:SCALE; repeatable. \\[default: the latest run]"),
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
    count: Annotated[int | None, typer.Option(min=1, help="Images per prompt, or held-out images to draw.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; each further image adds 1.")] = 0,
    scheduler: Annotated[str | None, typer.Option(help=help_of("SampleConfig", "scheduler"))] = None,
    steps: Annotated[int | None, typer.Option(help=help_of("SampleConfig", "steps"))] = None,
    guidance: Annotated[float | None, typer.Option(help=help_of("SampleConfig", "guidance"))] = None,
    negative: Annotated[str | None, typer.Option(help=help_of("SampleConfig", "negative"))] = None,
    size: Annotated[int | None, typer.Option(help=help_of("SampleConfig", "size"))] = None,
    batch: Annotated[int | None, typer.Option(help=help_of("SampleConfig", "batch"))] = None,
    rescale: Annotated[float | None, typer.Option(help=help_of("SampleConfig", "rescale"))] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. \\[default: samples, or the run's own]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Load a tuner made for another base.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Sample images with unmodified diffusers pipelines.

    Without a prompt, the held-out captions and hints of the latest run are sampled by the base and by the tuned model.

    Examples:

      sctool sample                                           held-out images of the latest run

      sctool sample "a photo of a black hat" --hint canny=edges.png --count 4

      sctool sample "a chair" --tuner runs/canny --tuner runs/color --hint canny=e.png:0.7 --hint color=c.png:0.3

      sctool sample --prompts prompts.txt --scheduler dpm++ --steps 20 --out images
    """
    if no_tuner and tuner:
        raise UsageError("--tuner and --no-tuner exclude each other.")
    flags: dict[str, Any] = {
        "scheduler": scheduler, "steps": steps, "guidance": guidance, "negative": negative, "size": size,
        "batch": batch, "rescale": rescale,
    }  # fmt: skip
    tuners = [split_scale(text) for text in tuner or []]
    if not prompts and not prompts_file:
        if hint or photo:
            raise UsageError("a hint needs a prompt to go with it: sctool sample PROMPT --hint NAME=FILE.")
        sheet = sample_held_out(
            tuners[0] if tuners else (None, 1.0), flags, count=count or 8, seed=seed, base_alone=no_tuner, out=out,
            offline=offline, quiet=quiet,
        )  # fmt: skip
    else:
        chosen = [] if no_tuner else tuners or [(str(find_latest()), 1.0)]
        drawer = Sampler(chosen, base, flags, force=force, offline=offline, quiet=quiet)
        hints, weights = drawer.hints(hint or [], photo or [])
        requests = drawer.requests(prompts or [], prompts_file, count or 1, seed, hints)
        sheet = drawer.write(requests, out or Path("samples"), weights, normalize=False if no_normalize else None)
    print(json.dumps({"sheets": [str(sheet)]}) if as_json else sheet)


def find_latest() -> Path:
    """The folder of the latest run. Raises `UsageError` where there is none."""
    from ..core.runs import find_run

    return find_run(None).path


def sample_held_out(
    tuner: tuple[str | None, float], flags: dict[str, Any], *, count: int, seed: int, base_alone: bool,
    out: Path | None, offline: bool, quiet: bool,
) -> Path:  # fmt: skip
    """Samples a run's held-out captions and hints; returns the contact sheet."""
    from ..core.config import SampleConfig, resolve_config
    from ..core.runs import find_run
    from ..eval.heldout import sample_heldout

    name, scale = tuner
    run = find_run(name)
    flags["guidance"] = run.config.guidance if flags["guidance"] is None else flags["guidance"]
    folders = sample_heldout(
        run,
        count=count,
        sampling=resolve_config(SampleConfig, flags=flags),
        seed=seed,
        which=("base",) if base_alone else ("base", "tuned"),
        scale=scale,
        quiet=quiet,
        offline=offline,
        out=out,
    )
    return folders[0].parent / "sheet.png"


class Sampler:
    """A base with tuners, loaded for prompts from the command line."""

    def __init__(
        self, chosen: list[tuple[str, float]], base: str | None, flags: dict[str, Any], *, force: bool, offline: bool,
        quiet: bool,
    ) -> None:  # fmt: skip
        """`chosen` are tuners with their scales; the base is theirs when not given."""
        from ..core.backbones.loading import load_backbone
        from ..core.checkpoint import load_tuner, read_meta
        from ..core.config import SampleConfig, resolve_config
        from ..core.devices import best_device
        from ..core.progress import Progress

        config = resolve_config(SampleConfig, flags=flags)
        self.chosen, self.progress = chosen, Progress(quiet)
        self.metas = [read_meta(name) for name, _ in chosen]
        base = base or (self.metas[0]["base"]["id"] if chosen else "mini")
        self.backbone = load_backbone(base, device=best_device(), offline=offline)
        self.config = config.model_copy(update={"size": config.size or self.backbone.resolution})
        self.tuners = [load_tuner(name, self.backbone, force=force) for name, _ in chosen]

    @property
    def size(self) -> int:
        """The side of the images in pixels."""
        return self.config.size or self.backbone.resolution

    def hints(self, hints: list[str], photos: list[str]) -> tuple[dict[str, Any], dict[str, float]]:
        """`read_hints`, with photographs annotated as the maps that the tuners were trained on."""
        map_settings = {name: how for meta in self.metas for name, how in meta.get("maps", {}).items()}
        return read_hints(hints, photos, self.size, map_settings)

    def requests(
        self, prompts: list[str], file: Path | None, count: int, seed: int, hints: dict[str, Any]
    ) -> list[Request]:
        """`read_requests`; says how many prompts are longer than the text encoder reads."""
        requests = read_requests(prompts, file, count, seed, hints, self.size)
        texts = {request.prompt for request in requests}
        cut = sum(self.backbone.too_long(text) for text in texts)
        if cut:
            what = f"{cut} of {len(texts)} prompts are longer than the text encoder reads"
            self.progress.note(f"{what}; the rest of each is ignored")
        return requests

    def write(self, requests: list[Request], folder: Path, weights: dict[str, float], normalize: bool | None) -> Path:
        """Samples the requests into `folder`; returns the contact sheet."""
        from ..core.sampling import sample_images, sampling_protocol, write_samples
        from ..core.sites.attaching import tuned

        used = [
            {"method": tuner.method, "file": name, "scale": scale, "weights": weights}
            for tuner, (name, scale) in zip(self.tuners, self.chosen, strict=True)
        ]
        scales = [scale for _, scale in self.chosen]
        attached = tuned(
            self.backbone.denoiser, *self.tuners, scales=scales, weights=weights or None, normalize=normalize
        )
        with self.progress.counting(len(requests), "sampling") as advance, attached:
            images = sample_images(self.backbone, requests, self.config, advance)
            write_samples(folder, images, sampling_protocol(self.backbone, self.config, used))
        return folder / "sheet.png"


def split_scale(text: str) -> tuple[str, float]:
    """FILE or FILE:SCALE as (file, scale); the scale is 1 where none is given."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return head, float(tail)
    except ValueError:
        return text, 1.0


def read_hints(
    hints: list[str], photos: list[str], size: int, map_settings: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """NAME=FILE[:WEIGHT] flags as uint8 (size, size, 3) hints and the weights that were given, by condition.

    `map_settings` says how maps were made that photographs are to be annotated like. Raises `UsageError`.
    """
    from ..annotators.hint_files import hint_from_map, hint_from_photo
    from ..core.data.images import BadImage

    images: dict[str, Any] = {}
    weights: dict[str, float] = {}
    for flag, text in [*(("--hint", text) for text in hints), *(("--photo", text) for text in photos)]:
        name, equals, rest = text.partition("=")
        if not equals or not rest:
            raise UsageError(f"{flag} {text}: write it as NAME=FILE, e.g. canny=edges.png.")
        if name in images:
            raise UsageError(f"{flag} {text}: condition '{name}' is given twice.")
        file, weight = split_scale(rest)
        if weight != 1.0 or file != rest:
            weights[name] = weight
        if not Path(file).is_file():
            raise UsageError(f"{flag} {text}: no such file {file}.")
        try:
            if flag == "--hint":
                images[name] = hint_from_map(name, file, size)
            else:
                images[name] = hint_from_photo(name, file, size, (map_settings or {}).get(name))
        except BadImage as error:
            raise UsageError(f"{flag} {text}: the file {error.reason}.") from error
    return images, weights


def read_requests(
    prompts: list[str], file: Path | None, count: int, seed: int, maps: dict[str, Any], size: int
) -> list[Request]:
    """Every prompt `count` times with counting seeds; a .jsonl row may name its own seed and hints."""
    from ..core.sampling import Request

    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except OSError as error:
            raise UsageError(f"--prompts {file}: {error.strerror}.") from error
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if file.suffix == ".jsonl" else {"prompt": line}
                row["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f'--prompts {file}, line {number}: each row needs a "prompt".') from error
            rows.append(row)
    if not rows:
        raise UsageError(f"--prompts {file} contains no prompt.")
    requests = []
    for row in rows:
        own, _ = read_hints([f"{n}={(file or Path()).parent / f}" for n, f in row.get("hints", {}).items()], [], size)
        for copy in range(count):
            start = int(row["seed"]) + copy if "seed" in row else seed + len(requests)
            requests.append(Request(row["prompt"], start, {**maps, **own}))
    return requests
