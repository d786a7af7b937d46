"""`sctool merge`: several tuners as one file, or in the base's own weights, with the error that this makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import UsageError

if TYPE_CHECKING:
    from ..core.chosen import Chosen
    from ..core.merging.measuring import MergeError
    from ..core.merging.pruning import Residual


def merge(
    tuners: Annotated[
        list[str], typer.Argument(metavar="TUNER...", help="Runs or tuner files; FILE:WEIGHT gives a weight.")
    ],
    weights: Annotated[
        str | None, typer.Option(metavar="W1,W2,...", help="A weight per tuner, of any size and sign. \\[default: 1]")
    ] = None,
    minus: Annotated[
        list[str] | None, typer.Option(metavar="TUNER", help="A tuner to take away, weight -1; repeatable.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Tasks of a run that has several; repeatable, or a,b. \\[default: all]")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="How they become one, see docs/merge.md. \\[default: the method's exact rule]")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of the result: units a layer, for prune; LoRA's rank, for rules with svd."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of weights kept, for ties, dare and magnitude_prune.")
    ] = None,
    into_base: Annotated[
        bool, typer.Option("--into-base", help="Write a plain diffusers folder with the tuner in its weights.")
    ] = False,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="With --into-base: also what does not fold exactly.")
    ] = False,
    max_error: Annotated[
        float | None,
        typer.Option(min=0, help="Largest difference of the denoiser's output. \\[default: 1e-4 where exact]"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base that they are for. \\[default: the tuners']")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("merged"),
    force: Annotated[bool, typer.Option("--force", help="Load tuners made for another base.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Merge tuners of one method into one, and say how far the result is from them side by side.

    Examples:

      sctool merge runs/hats runs/coats --weights 0.7,0.3 --out both

      sctool merge runs/two --out both                          all tasks of a run

      sctool merge runs/hats --weights 0.7 --out weaker

      sctool merge runs/hats runs/coats --rank 16 --out small   fewer units a layer (DiffScaler), a smaller rank (LoRA)

      sctool merge runs/big --minus runs/small --rule ties --density 0.5

      sctool merge runs/hats --into-base --out ./base-with-hats
    """
    from ..core.backbones.loading import load_backbone
    from ..core.chosen import base_of
    from ..core.merging.merge import alone, write, write_base
    from ..core.merging.merge import merge as merge_tuners
    from ..core.merging.table import check_methods, check_options, find_rule

    if approximate and not into_base:
        raise UsageError("--approximate belongs to --into-base; an approximate merge is chosen with --rule.")
    files = weighted(tuners, weights, minus or [], task or [])
    if not (into_base and alone(files, rule, rank)):  # before the base is loaded
        _, chosen = find_rule(check_methods([one.meta["method"] for one in files]), rule, rank)
        check_options(chosen, {"rank": rank, "density": density})
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UsageError(f"--out {out} exists already; choose another folder, or remove it.")
    backbone = load_backbone(base or base_of(files), offline=offline)
    result = merge_tuners(
        files, backbone, rule, max_error=None if into_base else max_error, force=force, rank=rank, density=density
    )
    report: dict[str, Any] = {"method": result.tuner.method, **result.as_json()}
    if into_base:
        path, error = write_base(result, out, backbone, approximate=approximate, max_error=max_error)
        report |= {"base": str(path), "exact": result.exact and not approximate, "folding_error": vars(error)}
    else:
        path, error = write(result, out, backbone), result.error
        report |= {"tuner": str(path), "parameters": sum(p.numel() for p in result.tuner.parameters())}
    print(json.dumps(report) if as_json else "\n".join([str(path), *said(report, error, result.residual)]))


def weighted(tuners: list[str], weights: str | None, minus: list[str], tasks: list[str]) -> list[Chosen]:
    """The tuner files with their weights. A run of several tasks stands for all of them, or for those named.

    Raises `UsageError` for weights that are no numbers or do not fit the tuners.
    """
    from ..core.chosen import split_scale

    given = [split_scale(text) for text in tuners]
    if weights is not None:
        numbers = [number(text) for text in weights.split(",")]
        if len(numbers) != len(given):
            raise UsageError(f"--weights has {len(numbers)} numbers for {len(given)} tuners; give one for each.")
        if any(scale != 1 for _, scale in given):
            raise UsageError("give weights as FILE:WEIGHT or with --weights, not both.")
        given = [(name, weight) for (name, _), weight in zip(given, numbers, strict=True)]
    given += [(name, -scale) for name, scale in map(split_scale, minus)]
    names = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
    return [one for name, weight in given for one in parts(name, weight, names)]


def parts(name: str, weight: float, tasks: list[str]) -> list[Chosen]:
    """The tuner file of a run, or those of its tasks."""
    from ..core.checkpoint import task_files
    from ..core.chosen import choose

    several = list(task_files(name))
    chosen = [task for task in tasks if task in several] or several if several else []
    if several and tasks and not set(tasks) & set(several):
        choose([(name, weight)], tasks)  # says which tasks there are
    return choose([(name, weight)], chosen)


def number(text: str) -> float:
    """A weight. Raises `UsageError` for text that is no number."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--weights: '{text}' is not a number.") from None


def said(report: dict[str, Any], error: MergeError | None, residual: Residual | None) -> list[str]:
    """What was merged and how exactly, as lines."""
    kind = "exact" if report["exact"] else "approximate"
    lines = [f"{report['method']}, rule {report['rule']} ({kind})"]
    lines += [f"  {one['weight']:+g} {one['file']}{' ' + one['task'] if 'task' in one else ''}" for one in report["of"]]
    lines += [str(residual)] if residual else []
    if error is None:
        return [*lines, "these tuners cannot act side by side: the rule defines the result"]
    return [
        *lines,
        f"difference of the output on a fixed batch: {error.largest:.3g} at most, {error.mean:.3g} on average; "
        f"the tuners change it by {error.effect:.3g} on average",
    ]
