"""From a base to its untrained student: ranks or blocks, the start of its weights, and a folder of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.loading import Backbone
from ..backbones.saving import save_base
from ..backbones.students import NAME, Student
from ..backbones.thin import THIN, Form, make_dense
from ..config import StudentConfig
from ..errors import DoesNotFit, UsageError
from ..files import write_json
from .calibrating import calibrate, start_error
from .factorising import decompose, layers_to_divide
from .pruning import pruned
from .ranks import by_energy, by_map, by_ratio, fixed_size, size

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a student will be: parameters of the denoiser before and after, and the layers that change."""

    before: int
    after: int
    ranks: Mapping[str, int]
    layers: int
    moments: Mapping[str, Tensor] | None = field(default=None, repr=False)
    """E[x x^T] of the layers' inputs, where the ranks depend on them."""


def plan(backbone: Backbone, config: StudentConfig, say: Say = lambda line: None) -> Plan:
    """The ranks that the settings give, or the blocks that they leave. Raises `UsageError` for what cannot be."""
    denoiser, moments = backbone.denoiser, None
    before = sum(p.numel() for p in denoiser.parameters())
    if config.prune:
        student = pruned(copy.deepcopy(denoiser).to("meta"), backbone.family, config.prune)
        after = sum(p.numel() for p in student.parameters())
        _check_smaller(before, after)
        return Plan(before, after, {}, 0)
    layers = layers_to_divide(denoiser, config.untouched)
    fixed = fixed_size(denoiser, layers)
    if config.ranks is not None:
        ranks = by_map(layers, config.ranks, config.form)
    elif config.budget is not None:
        moments = measured(backbone, layers, say) if config.start == "whitened" else None
        ranks = by_energy(layers, budget(config.budget, before), fixed, config.form, moments)
    else:
        assert config.ratio is not None
        ranks = by_ratio(layers, config.ratio, config.form)
    after = fixed + size(layers, ranks, config.form)
    _check_smaller(before, after)
    return Plan(before, after, ranks, len(layers), moments)


def measured(backbone: Backbone, names: Iterable[str], say: Say) -> dict[str, Tensor]:
    """`calibrate`, announced."""
    say("measuring the inputs of the layers")
    return calibrate(backbone, names)


def budget(wanted: float, before: int) -> int:
    """A budget in parameters; up to 1 it is a share of the base's."""
    return int(wanted * before) if wanted <= 1 else int(wanted)


def _check_smaller(before: int, after: int) -> None:
    if after >= before:
        raise UsageError(
            f"this student would have {after:,} parameters, its teacher has {before:,}: a student is smaller. "
            "Lower --ratio or --budget, or take the teacher's own teacher as --base."
        )


def make(backbone: Backbone, config: StudentConfig, say: Say = lambda line: None) -> tuple[nn.Module, Student]:
    """The untrained student's denoiser, a new module, and what it says of itself.

    Raises `UsageError` for settings that the base does not allow.
    """
    _check_shared(backbone)
    own = plan(backbone, config, say)
    denoiser = (
        pruned(backbone.denoiser, backbone.family, config.prune) if config.prune
        else _low_rank(backbone, own, config, say)
    )  # fmt: skip
    ancestors = (backbone.hash, *backbone.ancestors)
    moved = ancestors if config.prune else backbone.student.moved if backbone.student else ()
    say("comparing the student with its teacher")
    ranks, form = all_ranks(denoiser)
    return denoiser, Student(
        "pruned" if config.prune else "low-rank", backbone.id, ancestors, ranks, form, config.model_dump(mode="json"),
        moved, round(start_error(backbone, denoiser), 6),
    )  # fmt: skip


def _low_rank(backbone: Backbone, own: Plan, config: StudentConfig, say: Say) -> nn.Module:
    """A copy of the base's denoiser with low-rank layers."""
    moments = own.moments
    if config.start == "whitened" and moments is None:
        moments = measured(backbone, own.ranks, say)
    say(f"factorising {len(own.ranks)} layers")
    return decompose(copy.deepcopy(backbone.denoiser), own.ranks, config.form, config.start, moments)


def _check_shared(backbone: Backbone) -> None:
    """Raises `DoesNotFit` for modules of its own where bases of its kind share one, as a DiT's blocks the embedders.

    A student is built as its kind is, and would silently get one for all.
    """
    family, config = backbone.family, {**backbone.denoiser.config}  # type: ignore[dict-item]
    with torch.device("meta"):
        built = family.build_denoiser(config)
    if len(list(built.modules())) != len(list(backbone.denoiser.modules())):
        raise DoesNotFit(f"{backbone.id}: its blocks' embedders differ, and a student's blocks would share one.")


def all_ranks(denoiser: nn.Module) -> tuple[dict[str, int], Form]:
    """The ranks of all low-rank layers, and the form of the convolutions among them.

    Raises `DoesNotFit` for a teacher whose convolutions have another form.
    """
    found: dict[str, Any] = {name: module for name, module in denoiser.named_modules() if isinstance(module, THIN)}
    forms = {module.form for module in found.values() if hasattr(module, "form")}
    if len(forms) > 1:
        raise DoesNotFit("the teacher has low-rank convolutions of another form; give the same --form.")
    return {name: module.rank for name, module in found.items()}, forms.pop() if forms else "flat"


def save_student(path: str | Path, backbone: Backbone, denoiser: nn.Module, student: Student, card: str) -> Path:
    """Writes a student's folder: its teacher's parts, its own denoiser and `student.json`. Atomic; returns it."""
    return save_base(path, backbone, denoiser, card, lambda folder: write_json(folder / NAME, student.as_json()))


def densified(denoiser: nn.Module) -> nn.Module:
    """A copy with ordinary layers: the stock architecture, which everything can load."""
    return make_dense(copy.deepcopy(denoiser))
