"""The wiring of one denoiser: its hooks, the hint channel, and the tuners attached to it.

Hooks are public ones of `nn.Module`; nothing is patched, copied or renamed. A forward pre-hook on the denoiser takes
the condition maps out of the pipelines' open channel, `cross_attention_kwargs={"hint": ...}`, and encodes them. All
tuners attached together see the same unedited value x of a site:

    x' = x + sum_tuners s delta(x)        for SCEdit, delta = T(x)                                    (eq. 5)
                                          or sum_m alpha_m (T_m(x + c_m) + c_m)                       (eq. 7)

alpha is normalised to a sum of 1 over all conditions that have a hint, unless told otherwise; the scale s never is.
Instead of the sum another rule may combine the deltas, see `composing`; "routed" normalises alpha tuner by tuner.
A call may also say whose task each sample is, `{"task": ["flowers", None, ...]}`: a tuner that was attached with a task
then acts on its samples alone, and alpha is normalised task by task. Without "task" every tuner acts on all samples.
Attach before compiling: torch ignores hooks that are added to an already compiled module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import SctoolError, UsageError, unknown
from .composing import DEFAULT, RULES, Part, normalize
from .hints import Encodings, check_batch, checked, repeated, tensor_version
from .routing import EVERY, Samples, check_tasks, samples_of
from .site import Acting, Call, Features, Inputs, Site

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .kept import Kept

LATENTS = ("sample", "hidden_states")
"""What denoisers call their first argument."""
CHANNELS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""What denoisers call the argument that pipelines pass through untouched; it carries hints and tasks."""
OURS = ("hint", "task")
"""What is taken out of it."""


@dataclass(eq=False)
class Attached:
    """A tuner on a wiring: its scale, its conditions' weights, whether it asks for normalised weights, and its task."""

    wiring: Wiring
    tuner: Acting
    scale: float
    weights: Mapping[str, float]
    normalize: bool
    task: str | None = None
    call: Call = field(default_factory=Call)
    """What the tuner knows of the denoiser's call under way."""
    samples: Samples = EVERY
    """Those that it acts on in that call."""

    def seen(self, given: Tensor | None, module: nn.Module | None) -> Call:
        """The call as the tuner sees it at a site whose `module` was called with `given`."""
        return replace(self.call, given=None if given is None else self.samples.of(given), module=module)

    def part(self, site: Site, x: Tensor, given: Tensor | None, module: nn.Module | None) -> Part | None:
        """What it adds to its samples of the unedited x (B, ...) of a site; None for nothing."""
        delta = self.tuner.delta(site, self.samples.of(x), self.seen(given, module))
        return None if delta is None else Part(delta, self.scale, self.samples)

    def remove(self) -> None:
        """Takes the tuner off; the last one to leave removes the hooks."""
        self.wiring.remove(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one call: tensors inside a graph cannot be copied."""
        return {**self.__dict__, "call": Call(), "samples": EVERY}


class Edit:
    """One site and the tuners that act there."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.acting: list[Attached] = []

    def edited(self, x: Tensor, given: Tensor | None = None, module: nn.Module | None = None) -> Tensor:
        """x plus what the wiring's rule makes of all deltas of the unedited x; x itself where none adds anything."""
        kept = self.acting[0].wiring.kept if self.acting else None
        if kept is None or not getattr(self.site, "reused", False):
            return self._edited(x, given, module)
        return kept.edited(self.site, lambda: self._edited(x, given, module))

    def _edited(self, x: Tensor, given: Tensor | None, module: nn.Module | None) -> Tensor:
        active = self.active()
        out = self._by_the_only_one(x, active, given, module)
        if out is not None:
            return out
        parts = (one.part(self.site, x, given, module) for one in active)
        rule = RULES[active[0].wiring.compose if active else DEFAULT]
        return rule(x, (part for part in parts if part is not None), getattr(self.site, "linear", False))

    def _by_the_only_one(
        self, x: Tensor, active: Sequence[Attached], given: Tensor | None, module: nn.Module | None
    ) -> Tensor | None:
        """The edited value as the only tuner here makes it, to save memory in training; None: add the deltas."""
        if len(active) != 1 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        [one] = active
        whole = one.scale == 1 and one.samples.rows is None
        return one.tuner.edited(self.site, x, one.seen(given, module)) if whole else None

    def active(self) -> list[Attached]:
        """The tuners that act in the call under way."""
        return [one for one in self.acting if one.scale != 0 and one.samples.count]

    def refuse_overlap(self) -> None:
        """Raises `UsageError` where two tuners act on the same sample: ids of new classes would mean those of both."""
        for one, other in combinations(self.active(), 2):
            if one.samples.overlap(other.samples):
                raise UsageError(
                    f"two tuners add classes to {self.site}, so that an id could mean either's. Attach them with "
                    "tasks=[...] and pass the task of each sample."
                )


class Wiring:
    """All hooks of one denoiser and the tuners that they serve. `encodings` counts runs of hint encoders."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser_arguments = tuple(inspect.signature(denoiser.forward).parameters)
        self.channel = next((name for name in CHANNELS if name in self.denoiser_arguments), CHANNELS[0])
        self.attached: list[Attached] = []
        self.edits: dict[Site, Edit] = {}
        self.compose = DEFAULT
        self.encodings = 0
        self.kept: Kept | None = None  # what the call under way leaves or finds, where encoders are reused
        self._cached = Encodings()
        self._handles: list[RemovableHandle] = [denoiser.register_forward_pre_hook(self.begin, with_kwargs=True)]

    @classmethod
    def of(cls, denoiser: nn.Module) -> Wiring | None:
        """The wiring of `denoiser`, found through its own hooks; None where there is none."""
        owners = (getattr(hook, "__self__", None) for hook in denoiser._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, cls)), None)

    @classmethod
    def add(
        cls, denoiser: nn.Module, tuner: Acting, scale: float, weights: Mapping[str, float], normalize: bool,
        task: str | None = None,
    ) -> Attached:  # fmt: skip
        """Attaches `tuner` to the denoiser's wiring, which is made if need be.

        Raises `SctoolError` if it is attached already, or if one of its sites cannot be hooked.
        """
        wiring = cls.of(denoiser) or cls(denoiser)
        if any(one.tuner is tuner for one in wiring.attached):
            raise SctoolError(f"this {tuner.method} tuner is already attached to the denoiser; it would act twice.")
        attached = Attached(wiring, tuner, scale, weights, normalize, task)
        wiring.attached.append(attached)
        try:
            wiring._hook(denoiser, attached)
        except BaseException:
            attached.remove()
            raise
        return attached

    def _hook(self, denoiser: nn.Module, attached: Attached) -> None:
        """Hooks the tuner's sites that no earlier tuner has; a site has one hook, however many tuners act there."""
        fresh = {site: Edit(site) for site in attached.tuner.sites if site not in self.edits}
        handles: list[RemovableHandle] = []
        try:
            for kind in dict.fromkeys(map(type, fresh)):
                handles += kind.hook(denoiser, [edit for site, edit in fresh.items() if type(site) is kind])
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        self._handles += handles
        self.edits.update(fresh)
        for site in attached.tuner.sites:
            self.edits[site].acting.append(attached)
        self._cached = Encodings()

    def remove(self, attached: Attached) -> None:
        """Takes a tuner off; without tuners the hooks go too, and the denoiser is as it was."""
        self.attached.remove(attached)
        for edit in self.edits.values():
            edit.acting = [one for one in edit.acting if one is not attached]
        self._cached = Encodings()
        if not self.attached:
            self.edits.clear()
            while self._handles:
                self._handles.pop().remove()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one call."""
        return {**self.__dict__, "_cached": Encodings(), "kept": None}

    # ------------------------------------------------------------------------------------- the denoiser's calls

    def begin(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Pre-hook of the denoiser: takes `hint` and `task` out of its open channel and prepares this call."""
        channel = kwargs.get(self.channel) or {}
        if self.kept is None or not self.kept.prepare(self.attached):
            self._prepare(channel, dict(zip(self.denoiser_arguments, args, strict=False)) | kwargs)
        if not channel.keys() & set(OURS):
            return None
        rest = {name: value for name, value in channel.items() if name not in OURS}
        return args, {**kwargs, self.channel: rest or None}

    def _prepare(self, channel: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
        """Gives every tuner what it knows of a call with these arguments of the denoiser."""
        for one in self.attached:
            one.call, one.samples = Call(), EVERY
        tasks = self._route(channel["task"], _latents(arguments)) if channel.get("task") is not None else ()
        hints = self._named(channel["hint"]) if "hint" in channel else {}
        if hints or any(one.tuner.reads_inputs for one in self.attached):
            inputs = self._inputs(_latents(arguments), arguments)
            features = self._encode(hints, inputs, tasks)
            alphas = self._alphas(features, bool(tasks))
            for one, own, weights in zip(self.attached, features, alphas, strict=True):
                one.call = Call(repeated(own, _count(one.samples, inputs.latents)), weights)

    def _route(self, tasks: Any, latents: Tensor) -> tuple[str | None, ...]:
        """Gives every tuner with a task its samples; returns the checked names."""
        known = {one.task for one in self.attached if one.task is not None}
        names = check_tasks(tasks, known, len(latents))
        shares = {task: samples_of(task, names, len(latents), latents.device) for task in sorted(known)}
        for one in self.attached:
            one.samples = EVERY if one.task is None else shares[one.task]
        return names

    def _inputs(self, latents: Tensor, arguments: Mapping[str, Any]) -> Inputs:
        """The denoiser's arguments as a tuner reads them."""
        known = (*LATENTS, "timestep", self.channel, "return_dict")
        rest = {name: value for name, value in arguments.items() if name not in known and value is not None}
        return Inputs(latents, arguments.get("timestep"), rest)

    # ------------------------------------------------------------------------------------------------- the hints

    def _named(self, hint: Tensor | Mapping[str, Tensor | None] | None) -> dict[str, Tensor]:
        """The hints by condition. A bare tensor goes to the only condition. Raises `UsageError` for unknown names."""
        known = sorted({name for one in self.attached for name in one.tuner.conditions})
        if hint is None:
            return {}
        if isinstance(hint, Tensor):
            if len(known) != 1:
                raise UsageError(f"a hint without a name for the conditions {known}; pass {{name: hint}}.")
            return {known[0]: hint}
        for name in hint:
            if name not in known:
                raise unknown("hint", name, known or ("none, the tuner was trained without --cond",))
        return {name: value for name, value in hint.items() if value is not None}

    def _encode(self, hints: dict[str, Tensor], inputs: Inputs, tasks: tuple[str | None, ...]) -> list[Features]:
        """Every tuner's features for this call: of the hints alone, cached where they may be, or of the inputs too."""
        cached = [not one.tuner.reads_inputs for one in self.attached]
        from_hints = hints and any(cached)
        of_hints = iter(self._encode_hints(hints, inputs.latents, tasks) if from_hints else [{}] * sum(cached))
        return [
            next(of_hints) if of_hint else self._encode_inputs(one, hints, inputs)
            for one, of_hint in zip(self.attached, cached, strict=True)
        ]

    def _encode_inputs(self, one: Attached, hints: dict[str, Tensor], inputs: Inputs) -> Features:
        """Features of a tuner that reads the inputs: it is given those of its samples."""
        samples, latents = one.samples, inputs.latents
        if not samples.count:
            return {}
        own = repeated(self._fitting(one, hints, latents), _count(samples, latents))
        if samples.rows is not None:
            rest = samples.of_inputs(dict(inputs.conditioning))
            inputs = Inputs(samples.of(latents), samples.of_inputs(inputs.timestep), rest)
        return one.tuner.encode(own, inputs)

    def _encode_hints(self, hints: dict[str, Tensor], latents: Tensor, tasks: tuple[str | None, ...]) -> list[Features]:
        """Features of the tuners that read hints alone: with gradients at every call, without them once per hint."""
        if torch.is_grad_enabled():
            return self._encode_now(hints, latents)
        return self._encode_once(hints, latents, tasks)

    def _encode_now(self, hints: dict[str, Tensor], latents: Tensor) -> list[Features]:
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                self._cached = Encodings()  # weights are about to change
            self.encodings += 1
        features: list[Features] = []
        for one in self.attached:
            if not one.tuner.reads_inputs:
                own = self._fitting(one, hints, latents)
                features.append(one.tuner.encode(own) if own else {})
        return features

    @torch.compiler.disable
    def _encode_once(self, hints: dict[str, Tensor], latents: Tensor, tasks: tuple[str | None, ...]) -> list[Features]:
        """The same, reused while the same part of the same hint tensors and the same tasks come, see `Encodings`."""
        weights = [tensor_version(weight) for one in self.attached for weight in one.tuner.parameters()]
        kind = (latents.shape[-2:], latents.dtype, latents.device, torch.is_autocast_enabled(latents.device.type))
        features = self._cached.features(hints, (kind, tasks), weights, lambda: self._encode_now(hints, latents))
        for name, hint in hints.items():
            check_batch(name, hint, latents)
        return features

    @staticmethod
    def _fitting(one: Attached, hints: Mapping[str, Tensor], latents: Tensor) -> dict[str, Tensor]:
        """A tuner's hints for its samples, in the latents' dtype. Raises `UsageError` for one that does not fit."""
        tuner, samples = one.tuner, one.samples
        names = [name for name in tuner.conditions if name in hints] if samples.count else []
        return {name: checked(name, hints[name], latents, tuner.vae_scale, samples) for name in names}

    def _alphas(self, features: Sequence[Features], by_task: bool) -> list[dict[str, float]]:
        """alpha of every condition that has features now, summing to 1 unless a tuner was told otherwise (eq. 7)."""
        alphas = [
            {name: float(one.weights.get(name, 1.0)) for name in own if name in one.tuner.conditions}
            for one, own in zip(self.attached, features, strict=True)
        ]
        for group in self._together(by_task):
            if all(self.attached[i].normalize for i in group if self.attached[i].tuner.conditions):
                normalize([alphas[i] for i in group])
        return alphas

    def _together(self, by_task: bool) -> Iterator[list[int]]:
        """The tuners, by their place, whose conditions share a sum of 1: those of a task or all; each when routed."""
        if self.compose == "routed":
            yield from ([i] for i in range(len(self.attached)))
            return
        tasks = [one.task if by_task else None for one in self.attached]
        for task in dict.fromkeys(tasks):
            yield [i for i, own in enumerate(tasks) if own == task]


def _latents(arguments: Mapping[str, Any]) -> Tensor:
    """The denoiser's first argument."""
    return next(arguments[name] for name in LATENTS if name in arguments)


def _count(samples: Samples, latents: Tensor) -> int:
    """How many samples a tuner acts on."""
    return len(latents) if samples.rows is None else samples.count


def attached_tasks(denoiser: nn.Module) -> set[str]:
    """The tasks that tuners on the denoiser are attached with."""
    wiring = Wiring.of(denoiser)
    return {one.task for one in wiring.attached if one.task is not None} if wiring else set()
