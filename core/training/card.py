"""The model card of a run: what was trained, on what, how, with which result and under which licence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..backbones.loading import Backbone
from ..config import TrainConfig
from ..files import write_text
from ..resolving import to_yaml
from ..runs import Run
from .lanes import Lane

if TYPE_CHECKING:
    from .log import Summary


def write_card(run: Run, config: TrainConfig, backbone: Backbone, lanes: Sequence[Lane], summary: Summary) -> None:
    """Writes README.md into the run folder."""
    trained = sum(p.numel() for lane in lanes for p in lane.tuner.parameters())
    frozen = sum(p.numel() for p in backbone.denoiser.parameters())
    write_text(
        run.path / "README.md",
        f"""---
license: {backbone.licence}
base_model: {config.base}
tags: [sctool, {config.method}]
---

# {run.name}

{introduction(config, lanes)}
The tuner is used together with its base, so the base's licence applies to it: **{backbone.licence}**.

| | |
|---|---|
| trained parameters | {trained:,} ({100 * trained / frozen:.2f} % of the denoiser's {frozen:,}) |
| base | {config.base}, SHA-256 of the denoiser's weights `{backbone.hash}` |
| images | {sum(map(trained_on, lanes))} for training, {sum(map(held_out, lanes))} held out |
{result_rows(summary)}
{task_table(lanes)}
{usage(run, lanes)}

## Configuration

```yaml
{to_yaml(config)}```
""",
    )


def introduction(config: TrainConfig, lanes: Sequence[Lane]) -> str:
    """What was trained, on what."""
    if lanes[0].name:
        return f"{config.method} for {len(lanes)} tasks, trained together with sctool over the base `{config.base}`."
    control = f", controlled by {' and '.join(config.conditions)}" if config.conditions else ""
    return f"{config.method}{control}, trained with sctool on `{config.data}` over the frozen base `{config.base}`."


def task_table(lanes: Sequence[Lane]) -> str:
    """The tasks as a Markdown table; "" for a run without tasks."""
    if lanes[0].name is None:
        return ""
    rows = [
        f"| {lane.name} | `{lane.config.data}` | {', '.join(lane.config.conditions) or 'none'} | "
        f"{trained_on(lane)} | {held_out(lane)} | {sum(p.numel() for p in lane.tuner.parameters()):,} |"
        for lane in lanes
    ]
    head = "| task | data | conditions | images | held out | parameters |\n|---|---|---|---|---|---|"
    return "\n".join(["", head, *rows, ""])


def usage(run: Run, lanes: Sequence[Lane]) -> str:
    """How to sample, a line for each task."""
    return "\n".join(
        " ".join(
            [
                f'    sctool sample "a prompt" --tuner {run.path}',
                *([f"--task {lane.name}"] if lane.name else []),
                *[f"--hint {name}=MAP.png" for name in lane.config.conditions],
            ]
        )
        for lane in lanes
    )


def trained_on(lane: Lane) -> int:
    """Images for training."""
    return len(lane.data.train)


def held_out(lane: Lane) -> int:
    """Images held out."""
    return 0 if lane.data.held_out is None else len(lane.data.held_out)


def result_rows(summary: Summary) -> str:
    """The results as rows of a Markdown table."""
    figures: dict[str, float | str] = {"steps": summary.steps}
    if summary.last:
        figures |= {f"training loss, last {summary.last.steps_averaged} steps": summary.last.loss}
    figures |= {f"held-out {key.removeprefix('val/')}": value for key, value in summary.validation.items()}
    figures |= {"precision": summary.precision, "peak memory (GB)": summary.peak_memory_gb}
    rows = [f"| {k} | {v:.4f} |" if isinstance(v, float) else f"| {k} | {v} |" for k, v in figures.items()]
    return "\n".join(rows)
