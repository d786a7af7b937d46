"""Draws a run's held-out samples where those that it has do not fit the options."""

from __future__ import annotations

from typing import Any

from ..core.backbones.bases import family_of
from ..core.config import SampleConfig
from ..core.errors import UsageError
from ..core.fast import with_fast
from ..core.progress import Progress
from ..core.resolving import resolve_config
from ..core.runs import Run
from .heldout import held_out, sample_heldout
from .options import DEFAULT_COUNT, DEFAULT_SEED, Options
from .targets import Target, run_target


def with_samples(target: Target, options: Options, progress: Progress) -> Target:
    """The target with its run's held-out samples, drawn now where needed.

    Raises `UsageError` for a run without a trained tuner, and for drawing options without a run.
    """
    run = target.run
    if run is None:
        given = any(value is not None for value in (options.count, options.steps, options.guidance, options.seed))
        if given or options.fast:
            raise UsageError(
                "--count, --steps, --guidance, --fast and --seed apply when the samples of a run are drawn; "
                f"{target.path} is not a run."
            )
        return target
    if not run.tuner.is_file():
        raise UsageError(f"{run.path} has no trained tuner yet. Run the same `sctool train` again to finish training.")
    reason = None if options.only_profile else why_draw(target, options)
    if reason is None:
        return target
    progress.note(f"{reason}: drawing held-out images with the base and with the tuner")
    sample_heldout(
        run,
        count=options.count or DEFAULT_COUNT,
        sampling=_requested_sampling(run, options),
        seed=options.seed or DEFAULT_SEED,
        quiet=options.quiet,
        offline=options.offline,
    )
    return run_target(run)


def why_draw(target: Target, options: Options) -> str | None:
    """Why the run's samples must be drawn (again); None where those that it has will do."""
    run, folders = target.run, target.folders
    assert run is not None
    if len(folders) < 2:
        return f"{run.title} has no held-out samples"
    if (run.samples / "tuned" / "metadata.jsonl").stat().st_mtime < run.tuner.stat().st_mtime:
        return "the tuner is newer than its samples"
    if options.count is not None and smallest(target) < min(options.count, held_out(run) or options.count):
        return f"{run.title} has fewer than {options.count} held-out samples"
    if options.seed is not None and any(folder.rows[0].get("seed") != options.seed for folder in folders):
        return f"the samples were drawn with seeds that do not start at {options.seed}"
    requested = _requested_sampling(run, options)
    for name, value in _decisive(requested, options).items() if requested else ():
        if any(folder.sampling.get(name, []) != value for folder in folders):
            return f"the samples were not drawn with {name} {value}"
    return None


def smallest(target: Target) -> int:
    """Images in the smallest folder."""
    return min(len(folder.rows) for folder in target.folders)


def _requested_sampling(run: Run, options: Options) -> SampleConfig | None:
    """How the options say that the run's samples are drawn; None where they do not say."""
    if options.steps is None and options.guidance is None and not options.fast:
        return None
    guidance = run.config.guidance if options.guidance is None else options.guidance
    if guidance is None:
        guidance = family_of(run.config.base, options.offline).guidance
    flags = {"steps": options.steps, "guidance": guidance}
    return resolve_config(SampleConfig, flags=with_fast(flags) if options.fast else flags)


def _decisive(requested: SampleConfig, options: Options) -> dict[str, Any]:
    """The settings that samples must have been drawn with, as sampling.json has them."""
    values = requested.model_dump(mode="json")
    names = ("steps", "guidance", "key_steps", *(["scheduler"] if options.fast else []))
    return {name: values[name] for name in names}
