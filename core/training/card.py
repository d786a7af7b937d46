"""The model card of a run: what was trained, on what, how, with which result and under which licence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..backbones.loading import Backbone
from ..config import TrainConfig, to_yaml
from ..files import write_text
from ..runs import Run

if TYPE_CHECKING:
    from ..data.prepared import PreparedSet
    from ..tuners.base import Tuner


def write_card(
    run: Run,
    config: TrainConfig,
    backbone: Backbone,
    tuner: Tuner,
    figures: Mapping[str, Any],
    pictures: int,
    val: PreparedSet | None,
) -> None:
    """Writes README.md into the run folder."""
    trained = sum(p.numel() for p in tuner.parameters())
    frozen = sum(p.numel() for p in backbone.denoiser.parameters())
    control = f", controlled by {' and '.join(config.conditions)}" if config.conditions else ""
    use = " ".join(f"--hint {name}=MAP.png" for name in config.conditions)
    rows = "\n".join(f"| {k} | {v:.4f} |" if isinstance(v, float) else f"| {k} | {v} |" for k, v in figures.items())
    write_text(
        run.path / "README.md",
        f"""---
license: {backbone.licence}
base_model: {config.base}
tags: [sctool, {config.method}]
---

# {run.name}

{config.method}{control}, trained with sctool on `{config.data}` over the frozen base `{config.base}`.
The tuner is used together with its base, so the base's licence holds for it: **{backbone.licence}**.

| | |
|---|---|
| trained parameters | {trained:,} ({100 * trained / frozen:.2f} % of the denoiser's {frozen:,}) |
| base | {config.base}, SHA-256 of the denoiser's weights `{backbone.hash}` |
| pictures | {pictures} for training, {len(val) if val is not None else 0} held out |
{rows}

    sctool sample "a prompt" --tuner {run.path} {use}

## Configuration

```yaml
{to_yaml(config)}```
""",
    )
