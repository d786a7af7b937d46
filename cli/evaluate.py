"""`sctool evaluate`: images in, numbers with their protocols out."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.fast import FAST_HELP
from ..eval.features.names import CLIP_MODEL, CLIP_TAG, FEATURES, WEIGHTS
from ..eval.metrics import FEATURE_METRICS, METRICS, flag_list
from ..eval.options import DEFAULT_COUNT, DEFAULT_SEED, Options


def _with_metric_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with a flag for each metric of the table in place of its parameter `metrics`."""

    @functools.wraps(command)
    def with_flags(**values: Any) -> None:
        requested = tuple(name for name in METRICS if values.pop(f"metric_{name}"))
        command(metrics=requested, **values)

    flags = [
        inspect.Parameter(
            f"metric_{row.name}",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option(row.flag, help=row.help)],
        )
        for row in METRICS.values()
    ]
    signature = inspect.signature(command, eval_str=True)
    parameters = []
    for parameter in signature.parameters.values():
        parameters += flags if parameter.name == "metrics" else [parameter.replace(kind=parameter.KEYWORD_ONLY)]
    vars(with_flags)["__signature__"] = signature.replace(parameters=parameters)
    return with_flags


@_with_metric_flags
def evaluate(
    target: Annotated[
        str | None, typer.Argument(help="Samples folder, run folder, or run name. \\[default: the latest run]")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Which task, of a run that has several.")] = None,
    metrics: tuple[str, ...] = (),
    features: Annotated[
        str,
        typer.Option(
            help=f"Features of {flag_list(FEATURE_METRICS)}: {', '.join(FEATURES)} (mini is the embedded CLIP). "
            "The names of the figures say which."
        ),
    ] = Options.features,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Weights of the features, or {', '.join(f'{name}=PATH' for name in WEIGHTS)}; repeatable. "
            "\\[default: the caches of torch and the Hugging Face hub, else a download]"
        ),
    ] = None,
    evaluator: Annotated[
        list[str] | None,
        typer.Option(
            help="What extracts a condition from the images, as in annotate --cond: seg:model=oneformer; repeatable. "
            "\\[default: what made the hint; for depth, seg and pose the evaluator in `sctool weights list`]"
        ),
    ] = None,
    clip_model: Annotated[
        str | None, typer.Option(help=f"open_clip model name, or a folder. \\[default: {CLIP_MODEL}]")
    ] = None,
    clip_weights: Annotated[
        str | None, typer.Option(help=f"Weight file or open_clip tag. \\[default: {CLIP_TAG}]")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Folder of reference images, or for --fid an .npz with mu and sigma. \\[default: the samples' own]"
        ),
    ] = None,
    save_stats: Annotated[
        Path | None, typer.Option(help="Also write the statistics of the references as .npz, for --reference.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=2, help=f"Held-out images to draw if a run has fewer. \\[default: {DEFAULT_COUNT}]"),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of images drawn now. \\[default: the run's]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps of images drawn now. \\[default: 50]")] = None,
    fast: Annotated[bool, typer.Option("--fast", help=f"Of images drawn now. {FAST_HELP}")] = False,
    seed: Annotated[
        int | None, typer.Option(help=f"Seed of the first image drawn now. \\[default: {DEFAULT_SEED}]")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for evaluation.json and evaluation.md. \\[default: next to the samples]"),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write report.html, with images and histograms, to this folder.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Measure drawn images; without a metric flag, compute every metric that applies.

    If a run has no held-out images yet, they are drawn first, with the base and with the tuned model.

    Examples:

      sctool evaluate                                     the latest run, all metrics

      sctool evaluate runs/edges --nmse --profile --json

      sctool evaluate runs/edges --fast --fid             images drawn the fast way, with a protocol of their own

      sctool evaluate runs/multi --task edges             one task of a run that trained several

      sctool evaluate runs/scenes --iou --evaluator seg:model=oneformer

      sctool evaluate runs/edges --report report          also writes report/report.html

      sctool evaluate samples --fid --reference photos --weights pt_inception-2015-12-05-6726825d.pth
    """
    from ..eval.evaluate import evaluate as measure
    from ..eval.report.tables import show, write

    options = Options(
        metrics=metrics,
        features=features,
        weights=tuple(weights or ()),
        evaluators=tuple(evaluator or ()),
        clip_model=clip_model,
        clip_weights=clip_weights,
        reference=reference,
        save_stats=save_stats,
        offline=offline,
        count=count,
        steps=steps,
        guidance=guidance,
        fast=fast,
        seed=seed,
        task=task,
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
