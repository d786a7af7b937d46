"""The model card of a student: whose it is, what it was made by, and how far it came."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..resolving import to_yaml
from ..training.card import result_rows, trained_on

if TYPE_CHECKING:
    from ..training.log import Summary
    from ..training.training import Training


def student_card(training: Training, summary: Summary) -> str:
    """The card as Markdown."""
    t, student = training, training.backbone.student
    assert student is not None
    own = sum(p.numel() for p in t.backbone.denoiser.parameters())
    kind = "low-rank layers" if student.kind == "low-rank" else "blocks removed as in BK-SDM"
    return f"""---
license: {t.backbone.licence}
base_model: {student.teacher}
tags: [sctool, distill]
---

# {t.run.name}

A student of `{student.teacher}` with {kind}, made and trained with sctool. It is a base of its own:

    sctool sample "a prompt" --no-tuner --base {t.run.path}/student

Tuners that were trained on its teacher can be used with it. The teacher's licence applies: **{t.backbone.licence}**.

| | |
|---|---|
| parameters of the denoiser | {own:,} |
| relative squared error of its outputs to its teacher's before training | {student.start_error} |
| images | {sum(map(trained_on, t.lanes))} for training |
{result_rows(summary)}

## Configuration

```yaml
{to_yaml(t.config)}```
"""
