"""`sctool sample`: prompts and hints in, a folder of images and all that is needed to make them again out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import UsageError
from .options import help_of

if TYPE_CHECKING:
    from ..core.backbones.loading import Backbone
    from ..core.progress import Progress
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
    flags: dict[str, Any] = {
        "scheduler": scheduler, "steps": steps, "guidance": guidance, "negative": negative, "size": size,
        "batch": batch, "rescale": rescale,
    }  # fmt: skip
    if no_tuner and tuner:
        raise UsageError("--tuner and --no-tuner exclude each other.")
    from ..core.config import SampleConfig, resolve_config
    from ..core.runs import find_run

    if not prompts and not prompts_file:
        if hint or photo:
            raise UsageError("a hint needs a prompt to go with it: sctool sample PROMPT --hint NAME=FILE.")
        from ..eval.heldout import sample_heldout

        run = find_run(split_scale(tuner[0])[0] if tuner else None)
        flags["guidance"] = guidance if guidance is not None else run.config.guidance
        folders = sample_heldout(
            run,
            count=count or 8,
            sampling=resolve_config(SampleConfig, flags=flags),
            seed=seed,
            which=("base",) if no_tuner else ("base", "tuned"),
            scale=split_scale(tuner[0])[1] if tuner else 1.0,
            quiet=quiet,
            offline=offline,
            out=out,
        )
        report([folders[0].parent / "sheet.png"], as_json)
        return

    from ..core.backbones.loading import load_backbone
    from ..core.checkpoint import load_tuner, read_meta, tuner_file
    from ..core.devices import best_device
    from ..core.progress import Progress
    from ..core.sampling import sample_images, sampling_protocol, write_samples
    from ..core.sites.attaching import tuned

    chosen = [] if no_tuner else [split_scale(text) for text in tuner or [str(find_run(None).path)]]
    base = base or (read_meta(tuner_file(chosen[0][0]))["base"]["id"] if chosen else "mini")
    backbone = load_backbone(base, device=best_device(), offline=offline)
    config = resolve_config(SampleConfig, flags=flags)
    config = config.model_copy(update={"size": config.size or backbone.resolution})
    tuners = [load_tuner(name, backbone, force=force) for name, _ in chosen]
    maps, weights = read_hints(hint or [], photo or [], config.size)
    requests = read_requests(prompts or [], prompts_file, count or 1, seed, maps, config.size)
    say_what_is_cut(backbone, requests, Progress(quiet))
    used = [
        {"method": t.method, "file": n, "scale": s, "weights": weights}
        for t, (n, s) in zip(tuners, chosen, strict=True)
    ]
    folder = out or Path("samples")
    with (
        Progress(quiet).counting(len(requests), "sampling") as advance,
        tuned(
            backbone.denoiser,
            *tuners,
            scales=[scale for _, scale in chosen],
            weights=weights or None,
            normalize=False if no_normalize else None,
        ),
    ):
        write_samples(
            folder, sample_images(backbone, requests, config, advance), sampling_protocol(backbone, config, used)
        )
    report([folder / "sheet.png"], as_json)


def say_what_is_cut(backbone: Backbone, requests: list[Request], progress: Progress) -> None:
    """Tells how many prompts are longer than the text encoder reads."""
    prompts = {request.prompt for request in requests}
    cut = sum(backbone.too_long(prompt) for prompt in prompts)
    if cut:
        progress.note(
            f"{cut} of {len(prompts)} prompts are longer than the text encoder reads; the rest of each is ignored"
        )


def report(sheets: list[Path], as_json: bool) -> None:
    """Says where the contact sheets are."""
    print(json.dumps({"sheets": [str(s) for s in sheets]}) if as_json else "\n".join(str(s) for s in sheets))


def split_scale(text: str) -> tuple[str, float]:
    """FILE or FILE:SCALE as (file, scale); the scale is 1 where none is given."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return head, float(tail)
    except ValueError:
        return text, 1.0


def read_hints(hints: list[str], photos: list[str], size: int) -> tuple[dict[str, Any], dict[str, float]]:
    """NAME=FILE[:WEIGHT] flags as uint8 (size, size, 3) hints and the weights that were given, by condition.

    Maps (`hints`) are resized to the picture; photographs are resized first and then annotated.
    """
    from ..annotators import ANNOTATORS, annotator
    from ..core.data.conditions import condition
    from ..core.data.images import BadImage, Geometry, decode_map, decode_rgb
    from ..core.data.records import FileBlob
    from ..core.errors import unknown

    found: dict[str, Any] = {}
    weights: dict[str, float] = {}
    geometry = Geometry(size)
    for flag, text, from_photo in [("--hint", t, False) for t in hints] + [("--photo", t, True) for t in photos]:
        name, equals, rest = text.partition("=")
        if not equals or not rest:
            raise UsageError(f"{flag} {text}: write it as NAME=FILE, e.g. canny=edges.png.")
        if name in found:
            raise UsageError(f"{flag} {text}: condition '{name}' is given twice.")
        file, weight = split_scale(rest)
        if weight != 1.0 or file != rest:
            weights[name] = weight
        if not Path(file).is_file():
            raise UsageError(f"{flag} {text}: no such file {file}.")
        try:
            if not from_photo:
                picture = decode_map(FileBlob(file), file)
                fitted = geometry.apply_map(picture, picture.shape, names=condition(name).categorical)
                if condition(name).needs_image and fitted.ndim == 2:
                    raise UsageError(
                        f"{flag} {text}: give the picture itself, with what is to be painted set to black."
                    )
                found[name] = fitted if condition(name).needs_image else condition(name).render(fitted, fitted)
                continue
            if name not in ANNOTATORS:
                raise unknown("condition", name, ANNOTATORS)
            image = geometry.apply(decode_rgb(FileBlob(file), file))
            (made, _), *_ = annotator(name)([image], [Path(file).stem])
            found[name] = condition(name).render(geometry.apply_map(made, image.shape), image)
        except BadImage as error:
            raise UsageError(f"{flag} {text}: the file {error.reason}.") from error
    return found, weights


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
        raise UsageError(f"--prompts {file} holds no prompt.")
    requests = []
    for row in rows:
        own, _ = read_hints([f"{n}={(file or Path()).parent / f}" for n, f in row.get("hints", {}).items()], [], size)
        for copy in range(count):
            start = int(row["seed"]) + copy if "seed" in row else seed + len(requests)
            requests.append(Request(row["prompt"], start, {**maps, **own}))
    return requests
