"""Attaching tuners to a denoiser and taking them off again; denoiser and tuners as one module for training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import UsageError, unknown
from .composing import DEFAULT, check_rule
from .parts import family_of
from .tokens import TokenMask
from .wiring import Wiring

Scales = float | Sequence[float]


class Removable(Protocol):
    """What a tuner's `attach` returns: undoes it exactly. A plain object, so that a deep copy undoes the copy's."""

    def remove(self) -> None:
        """Takes the tuner off."""
        ...


class Attachable(Protocol):
    """A tuner as it is attached."""

    method: str
    conditions: tuple[str, ...]
    routes: bool

    def attach(
        self, denoiser: nn.Module, *, scale: float, weights: Mapping[str, float] | None, normalize: bool | None,
        task: str | None,
    ) -> Removable:  # fmt: skip
        """Makes the denoiser use the tuner until the value returned is removed."""
        ...


class Attachment:
    """Tuners on a denoiser; `detach` restores it exactly."""

    def __init__(self, parts: list[Removable]) -> None:
        self._parts = parts

    def also(self, part: Removable) -> None:
        """Something else to take off."""
        self._parts.append(part)

    def detach(self) -> None:
        """Takes the tuners off in reverse order; a second call does nothing."""
        while self._parts:
            self._parts.pop().remove()

    remove = detach


class Composition:
    """A rule by which the tuners on a wiring compose, until it is removed. Raises `UsageError` for an unknown one."""

    def __init__(self, denoiser: nn.Module, rule: str) -> None:
        wiring = Wiring.of(denoiser)
        assert wiring is not None, "a tuner was attached before"
        self.wiring, self.before = wiring, wiring.compose
        wiring.compose = check_rule(rule)

    def remove(self) -> None:
        """Brings the rule before it back."""
        self.wiring.compose = self.before


def all_or_none(steps: Iterable[Callable[[], Removable]]) -> Attachment:
    """Attaches with every step in turn; when one raises, those before it are taken off again."""
    attachment = Attachment([])
    try:
        for step in steps:
            attachment.also(step())
    except BaseException:
        attachment.detach()
        raise
    return attachment


def attach(
    target: Any,
    *tuners: Attachable,
    scales: Scales | None = None,
    weights: Mapping[str, float] | None = None,
    normalize: bool | None = None,
    tasks: Sequence[str | None] | None = None,
    compose: str | None = None,
) -> Attachment:
    """Attaches tuners to a denoiser (or a backbone's): all of them or, when one does not fit, none.

    `scales` is one strength, or one per tuner, of any size and sign; 0 leaves a tuner out. `weights` and `normalize`
    override the tuners' own condition weights (alpha). `tasks` names a task per tuner: where a call of the denoiser
    says whose task each sample is (see `wiring`), such a tuner acts on its samples alone; those of None act on all.
    `compose` is the rule by which all tuners on the denoiser act together (see `composing`), the sum unless said.
    Raises `SctoolError` or `UsageError` for a tuner that cannot be.
    """
    denoiser = getattr(target, "denoiser", target)
    scales = 1.0 if scales is None else scales
    strengths = [scales] * len(tuners) if isinstance(scales, int | float) else scales
    if len(strengths) != len(tuners):
        raise UsageError(f"{len(strengths)} scales for {len(tuners)} tuners; pass one, or one per tuner.")
    names = [None] * len(tuners) if tasks is None else tasks
    if len(names) != len(tuners):
        raise UsageError(f"{len(names)} tasks for {len(tuners)} tuners; pass one, or None, per tuner.")
    known = {name for tuner in tuners for name in tuner.conditions}
    for name in weights or ():
        if name not in known:
            raise unknown("condition", name, known)
    if check_rule(compose or DEFAULT) != DEFAULT:
        check_composable(tuners)
    steps: list[Callable[[], Removable]] = [
        partial(tuner.attach, denoiser, scale=float(scale), weights=weights, normalize=normalize, task=task)
        for tuner, scale, task in zip(tuners, strengths, names, strict=True)
    ]
    return all_or_none([*steps, partial(Composition, denoiser, compose)] if compose and tuners else steps)


def check_composable(tuners: Iterable[Attachable]) -> None:
    """Raises `UsageError` for a tuner that changes the denoiser itself: it has no deltas that could be routed."""
    for tuner in tuners:
        if not tuner.routes:
            raise UsageError(
                f"method {tuner.method} changes the denoiser itself and adds nothing that could be routed; "
                "leave it out, or compose by the sum."
            )


@contextmanager
def tuned(
    target: Any,
    *tuners: Attachable,
    scales: Scales | None = None,
    weights: Mapping[str, float] | None = None,
    normalize: bool | None = None,
    tasks: Sequence[str | None] | None = None,
    compose: str | None = None,
) -> Iterator[nn.Module]:
    """The tuned denoiser inside, the base bit for bit outside. Arguments as `attach`."""
    attachment = attach(
        target, *tuners, scales=scales, weights=weights, normalize=normalize, tasks=tasks, compose=compose
    )
    try:
        yield getattr(target, "denoiser", target)
    finally:
        attachment.detach()


class TunedBackbone(nn.Module):
    """A frozen denoiser and its attached tuners as one module, for DDP and accelerate; only tuners are trained.

    `tuners` are `core.tuners.base.Tuner`s.
    """

    def __init__(self, denoiser: nn.Module, *tuners: Any, **attach_options: Any) -> None:
        super().__init__()
        self.family = family_of(denoiser)
        self.denoiser = denoiser.requires_grad_(False)
        self.tuners = nn.ModuleList(tuners).requires_grad_(True)
        self.attachment = attach(denoiser, *tuners, **attach_options)
        ends = self.family.token_layers(denoiser)
        self.tokens = TokenMask(*ends) if ends else None
        if self.tokens:
            self.attachment.also(self.tokens)
        self.train(denoiser.training)

    def train(self, mode: bool = True) -> TunedBackbone:
        """Training mode for the tuners. The denoiser stays in evaluation mode, also under full fine-tuning.

        Its dropout would draw from torch's global generator, which a resumed run cannot repeat; captions are dropped by
        the objective.
        """
        super().train(mode)
        self.denoiser.eval()
        return self

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        rows: Mapping[str, Tensor],
        hints: Mapping[str, Tensor] | None = None,
        kept: Tensor | None = None,
        tasks: Sequence[str | None] | None = None,
    ) -> Tensor:
        """The denoiser's output (B, C or 2C, h, w) for noisy `latents` (B, C, h, w) at timesteps `t` (B,).

        `rows` is the family's conditioning, `hints` condition maps (B, 3, H, W) in 0..1 by condition. A learned
        variance is the second half of the channels. `kept` (B, K) are the tokens to compute, all when not given; the
        output is 0 elsewhere. `tasks` is the task of each sample, for tuners attached with one.
        """
        if self.tokens:
            self.tokens.kept = kept
        return self.family.output(self.denoiser, latents, t, rows, channel(hints, tasks))


def channel(hints: Mapping[str, Tensor] | None, tasks: Sequence[str | None] | None = None) -> dict[str, Any] | None:
    """What goes through a denoiser's open channel to the tuners; None where there is nothing to say."""
    return {**({"hint": hints} if hints else {}), **({"task": list(tasks)} if tasks else {})} or None
