"""The model card of a run: what was trained, on what, how, with which result and under which licence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..backbones.loading import Backbone
from ..config import TrainConfig, to_yaml
from ..files import write_text
from ..runs import Run

if TYPE_CHECKING:
    from ..tuners.base import Tuner
    from .log import Summary
    from .setup import Data


def write_card(run: Run, config: TrainConfig, backbone: Backbone, tuner: Tuner, summary: Summary, data: Data) -> None:
    """Writes README.md into the run folder."""
    trained = sum(p.numel() for p in tuner.parameters())
    frozen = sum(p.numel() for p in backbone.denoiser.parameters())
    control = f", controlled by {' and '.join(config.conditions)}" if config.conditions else ""
    use = " ".join(f"--hint {name}=MAP.png" for name in config.conditions)
    write_text(
        run.path / "README.md",
        f"""---
license: {backbone.licence}
base_model: {config.base}
tags: [sctool, {config.method}]
---

# {run.name}

{config.method}{control}, trained with sctool on `{config.data}` over the frozen base `{config.base}`.
The tuner is used together with its base, so the base's licence applies to it: **{backbone.licence}**.

| | |
|---|---|
| trained parameters | {trained:,} ({100 * trained / frozen:.2f} % of the denoiser's {frozen:,}) |
| base | {config.base}, SHA-256 of the denoiser's weights `{backbone.hash}` |
| images | {len(data.train)} for training, {len(data.held_out) if data.held_out is not None else 0} held out |
{result_rows(summary)}

    sctool sample "a prompt" --tuner {run.path} {use}

## Configuration

```yaml
{to_yaml(config)}```
""",
    )


def result_rows(summary: Summary) -> str:
    """The results as rows of a Markdown table."""
    figures: dict[str, float | str] = {"steps": summary.steps}
    if summary.last:
        figures |= {f"training loss, last {summary.last.steps_averaged} steps": summary.last.loss}
    figures |= {f"held-out {key.removeprefix('val/')}": value for key, value in summary.validation.items()}
    figures |= {"precision": summary.precision, "peak memory (GB)": summary.peak_memory_gb}
    rows = [f"| {k} | {v:.4f} |" if isinstance(v, float) else f"| {k} | {v} |" for k, v in figures.items()]
    return "\n".join(rows)
