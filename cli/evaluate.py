"""`sctool evaluate`: pictures in, numbers with their protocols out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    target: Annotated[
        str | None, typer.Argument(help="Samples folder, run folder, or run name. \\[default: the latest run]")
    ] = None,
    fid: Annotated[bool, typer.Option("--fid", help="Fréchet distance to the real pictures.")] = False,
    kid: Annotated[
        bool, typer.Option("--kid", help="Kernel distance to the real pictures; fair to small sets.")
    ] = False,
    inception_score: Annotated[
        bool, typer.Option("--is", help="Inception score; compares with no real pictures.")
    ] = False,
    pr: Annotated[bool, typer.Option("--pr", help="Precision and recall against the real pictures.")] = False,
    cmmd: Annotated[bool, typer.Option("--cmmd", help="CLIP discrepancy (CMMD) to the real pictures.")] = False,
    clip: Annotated[bool, typer.Option("--clip", help="CLIP score against the prompts.")] = False,
    control: Annotated[
        bool, typer.Option("--control", help="How far the pictures keep to their hints, for every condition they have.")
    ] = False,
    nmse: Annotated[bool, typer.Option("--nmse", help="Of these, edges (canny, sketch) only: NMSE and F1.")] = False,
    iou: Annotated[bool, typer.Option("--iou", help="Of these, seg only: mIoU and accuracies.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Parameters, step times and peak memory against the base.")
    ] = False,
    features: Annotated[
        str,
        typer.Option(
            help="Of --fid, --kid and --pr: auto, inception, inception-clean, clip, dinov2, or mini (the embedded "
            "CLIP). Figures are named by them."
        ),
    ] = "auto",
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Weights of the features, or inception=PATH, clip=PATH, dinov2=PATH; repeatable. \\[default: the "
            "caches of torch and of the hub, else a download]"
        ),
    ] = None,
    evaluator: Annotated[
        list[str] | None,
        typer.Option(
            help="What extracts a condition from the pictures, as in annotate --cond: seg:model=oneformer; repeatable. "
            "\\[default: as the hint was made; for depth, seg and pose the evaluator of `sctool weights list`]"
        ),
    ] = None,
    clip_model: Annotated[
        str | None, typer.Option(help="open_clip model name, or a folder. \\[default: ViT-L-14]")
    ] = None,
    clip_weights: Annotated[str | None, typer.Option(help="Weight file or open_clip tag. \\[default: openai]")] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Folder of real pictures, or for --fid an .npz with mu and sigma. \\[default: the samples' own]"
        ),
    ] = None,
    save_stats: Annotated[
        Path | None, typer.Option(help="Also write the reference statistics as .npz, for --reference.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=2, help="Held-out pictures to draw where a run has fewer. \\[default: 200]")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance of pictures drawn now. \\[default: the run's]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps of pictures drawn now. \\[default: 50]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture drawn now. \\[default: 0]")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    out: Annotated[
        Path | None, typer.Option(help="Folder of evaluation.json and evaluation.md. \\[default: beside the samples]")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write report.html, with pictures and histograms, to this folder.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Measure drawn pictures; with no metric named, everything that applies.

    Held-out pictures of a run that has none are drawn first, by the base and by the tuned model.

    Examples:

      sctool evaluate                                     the latest run, all metrics

      sctool evaluate runs/edges --nmse --profile --json

      sctool evaluate runs/scenes --iou --evaluator seg:model=oneformer

      sctool evaluate runs/edges --report report          with report/report.html

      sctool evaluate samples --fid --reference photos --weights pt_inception-2015-12-05-6726825d.pth
    """
    chosen = {"fid": fid, "kid": kid, "is": inception_score, "pr": pr, "cmmd": cmmd, "clip": clip}
    chosen |= {"control": control, "nmse": nmse, "iou": iou, "profile": profile}
    sampling: dict[str, Any] = {"guidance": guidance, "steps": steps}
    drawn = any(value is not None for value in sampling.values())

    from ..core.config import SampleConfig, resolve_config
    from ..core.runs import find_run
    from ..eval.evaluate import evaluate as measure
    from ..eval.options import Options
    from ..eval.report.tables import show, write
    from ..eval.targets import is_run

    if drawn and is_run(target):
        sampling["guidance"] = guidance if guidance is not None else find_run(target, runs).config.guidance
    options = Options(
        metrics=tuple(name for name, wanted in chosen.items() if wanted),
        features=features,
        weights=tuple(weights or ()),
        evaluators=tuple(evaluator or ()),
        clip_model=clip_model,
        clip_weights=clip_weights,
        reference=reference,
        save_stats=save_stats,
        offline=offline,
        count=count,
        sampling=resolve_config(SampleConfig, flags=sampling) if drawn else None,
        seed=seed,
        quiet=quiet,
    )
    results = measure(target, options, runs=runs)
    files = [*write(results, out or results.target)]
    if report:
        from ..eval.report.html import write_html

        files.append(write_html(results, report))
    if as_json:
        print(json.dumps(results.to_json()))
        return
    show(results)
    print("\n".join(str(file) for file in files))
