"""Where tuners act. The skip connections of a U-Net are edited by public hooks; nothing is patched, copied or renamed.

A forward pre-hook on every `up_blocks[i]` edits `res_hidden_states_tuple`, just before the decoder concatenates it, so
the encoder never sees an edit. A forward pre-hook on the denoiser takes the condition maps out of the pipelines' open
channel, `cross_attention_kwargs={"hint": ...}`, and encodes them. All tuners attached together see the same skip x:

    skip' = x + sum_SC s T(x) + sum_CSC s sum_m alpha_m (T_m(x + c_m) + c_m)        (SCEdit, eqs. 5 and 7)

alpha is normalised to a sum of 1 over all condition branches that have a hint, unless told otherwise; s never is.
Attach before compiling: torch ignores hooks that are added to an already compiled module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import SctoolError, UsageError, unknown
from .hints import check_batch, checked, mark, tiled

if TYPE_CHECKING:
    from ..tuners.base import Features, SkipTuner, Tuner

Scales = float | Sequence[float]


@dataclass(frozen=True)
class Skip:
    """One skip connection: `index` in encoder order, `position` in the tuple that up block `block` receives.

    `stride2` marks the output of a downsampler, which has half the sides of the skip before it.
    """

    index: int
    block: int
    position: int
    channels: int
    stride2: bool


def skips(denoiser: Any) -> list[Skip]:
    """The skip connections of a `UNet2DConditionModel` in encoder order (12 for SD 1.5 and 2.1, 9 for SDXL).

    Read from the modules, so it works on the meta device. Raises `SctoolError` for a model without such skips.
    """
    try:
        outputs = [(denoiser.conv_in.out_channels, False)]
        for down in denoiser.down_blocks:
            outputs += [(resnet.out_channels, False) for resnet in down.resnets]
            outputs += [(sampler.out_channels, True) for sampler in down.downsamplers or ()]
        counts = [len(up.resnets) for up in denoiser.up_blocks]
    except AttributeError as error:
        raise SctoolError(f"{type(denoiser).__name__} has no skip connections that can be edited ({error}).") from error
    if sum(counts) != len(outputs):
        raise SctoolError(f"{type(denoiser).__name__}: {len(outputs)} skips for {sum(counts)} decoder layers.")
    # The first up block takes the last outputs, in encoder order.
    owners = [(block, position) for block, n in reversed(list(enumerate(counts))) for position in range(n)]
    return [Skip(i, *owner, *output) for i, (owner, output) in enumerate(zip(owners, outputs, strict=True))]


@dataclass(eq=False)
class Seat:
    """A skip tuner's place at an editor: its scale, its conditions' weights, and whether it asks for normalisation."""

    editor: SkipEditor
    tuner: SkipTuner
    scale: float
    weights: Mapping[str, float]
    normalize: bool

    def remove(self) -> None:
        """Takes the tuner off; the last one to leave removes the hooks."""
        self.editor.remove(self)


class _BlockEdit:
    """The pre-hook of one up block; a bound method, so that a deep copy uses the copy's tuners."""

    def __init__(self, editor: SkipEditor, sites: list[Skip]) -> None:
        self.editor, self.sites = editor, sites

    def edit(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Replaces the skips (each (B, C, h, w)) in the block's arguments by their edited values."""
        states = kwargs["res_hidden_states_tuple"]
        edited = tuple(self.editor.edited(site, states[site.position]) for site in self.sites)
        return args, {**kwargs, "res_hidden_states_tuple": edited}


class SkipEditor:
    """The hooks of one denoiser and the tuners that they serve. `encodings` counts runs of hint encoders."""

    def __init__(self, denoiser: nn.Module) -> None:
        sites = skips(denoiser)
        self.seats: list[Seat] = []
        self.encodings = 0
        self._clear()
        self._handles = [denoiser.register_forward_pre_hook(self.take_hint, with_kwargs=True)]
        for index, block in enumerate(denoiser.up_blocks):
            mine = _BlockEdit(self, [site for site in sites if site.block == index])
            self._handles.append(block.register_forward_pre_hook(mine.edit, with_kwargs=True))

    @classmethod
    def of(cls, denoiser: nn.Module) -> SkipEditor | None:
        """The editor already attached to `denoiser`, found through its own hooks."""
        owners = (getattr(hook, "__self__", None) for hook in denoiser._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, cls)), None)

    @classmethod
    def add(
        cls, denoiser: nn.Module, tuner: SkipTuner, scale: float, weights: Mapping[str, float], normalize: bool
    ) -> Seat:
        """Seats `tuner` at the denoiser's editor, which it makes if need be. Raises `SctoolError` if it sits there."""
        editor = cls.of(denoiser) or cls(denoiser)
        if any(seat.tuner is tuner for seat in editor.seats):
            raise SctoolError(f"this {tuner.method} tuner is already attached to the denoiser; it would act twice.")
        seat = Seat(editor, tuner, scale, weights, normalize)
        editor.seats.append(seat)
        editor._clear()
        return seat

    def remove(self, seat: Seat) -> None:
        """Takes a tuner off; without tuners the hooks go too, and the denoiser is as it was."""
        self.seats.remove(seat)
        self._clear()
        if not self.seats:
            while self._handles:
                self._handles.pop().remove()

    def _clear(self) -> None:
        self._features: list[Features] = []
        self._alphas: list[dict[str, float]] = []
        self._cached: tuple[Any, Any, list[Features]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one call: tensors inside a graph cannot be copied."""
        return {**self.__dict__, "_features": [], "_alphas": [], "_cached": None}

    # ------------------------------------------------------------------------------------------------- the skips

    def edited(self, site: Skip, x: Tensor) -> Tensor:
        """The edited skip (B, C, h, w); x itself where no tuner has anything to add."""
        out = x
        for number, seat in enumerate(self.seats):
            if seat.scale == 0:
                continue
            features, alphas = (self._features[number], self._alphas[number]) if self._features else ({}, {})
            delta = seat.tuner.delta(site, x, features, alphas)
            if delta is not None:
                out = out + (delta if seat.scale == 1 else seat.scale * delta).to(x.dtype)
        return out

    # ------------------------------------------------------------------------------------------------- the hints

    def take_hint(
        self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Pre-hook of the denoiser: takes `hint` out of `cross_attention_kwargs` and encodes it for this call."""
        self._features, self._alphas = [], []
        channel = kwargs.get("cross_attention_kwargs")
        if not channel or "hint" not in channel:
            return None
        rest = {name: value for name, value in channel.items() if name != "hint"}
        latents = args[0] if args else kwargs["sample"]
        hints = self._named(channel["hint"])
        if hints:
            features = self._encode(hints, latents) if torch.is_grad_enabled() else self._encode_once(hints, latents)
            self._features = [tiled(each, len(latents)) for each in features]
            self._alphas = self._normalised()
        return args, {**kwargs, "cross_attention_kwargs": rest or None}

    def _named(self, hint: Tensor | Mapping[str, Tensor | None] | None) -> dict[str, Tensor]:
        """The hints by condition. A bare tensor goes to the only condition. Raises `UsageError` for unknown names."""
        known = sorted({name for seat in self.seats for name in seat.tuner.conditions})
        if hint is None:
            return {}
        if isinstance(hint, Tensor):
            if len(known) != 1:
                raise UsageError(f"a hint without a name for the conditions {known}; give {{name: hint}}.")
            return {known[0]: hint}
        for name in hint:
            if name not in known:
                raise unknown("hint", name, known or ("none, the tuner was trained without --cond",))
        return {name: value for name, value in hint.items() if value is not None}

    def _encode(self, hints: dict[str, Tensor], latents: Tensor) -> list[Features]:
        """Every tuner's features of its own hints, in the latents' dtype, for training: once a forward."""
        if not torch.compiler.is_compiling():
            self._cached = None  # weights are about to change
            self.encodings += 1
        features = []
        for seat in self.seats:
            mine = {name: hints[name] for name in seat.tuner.conditions if name in hints}
            ready = {name: checked(name, hint, latents, seat.tuner.vae_scale) for name, hint in mine.items()}
            features.append(seat.tuner.encode(ready) if ready else {})
        return features

    @torch.compiler.disable
    def _encode_once(self, hints: dict[str, Tensor], latents: Tensor) -> list[Features]:
        """The same without gradients, reused while the very same hint tensors come and no weight has changed.

        Changes made in place through `.data`, or to a hint made in inference mode, leave no mark: pass a new tensor.
        """
        weights = [weight for seat in self.seats for weight in seat.tuner.parameters()]
        kind = (latents.shape[-2:], latents.dtype, latents.device, torch.is_autocast_enabled(latents.device.type))
        key = (kind, [(name, *mark(hint)) for name, hint in hints.items()], [mark(weight) for weight in weights])
        if self._cached is None or self._cached[0] != key:
            features = self._encode(hints, latents)
            self._cached = (key, hints, features)  # holding the hints keeps their ids from being given to others
        else:
            for name, hint in hints.items():
                check_batch(name, hint, latents)
        return self._cached[2]

    def _normalised(self) -> list[dict[str, float]]:
        """alpha of every condition that has features now, summing to 1 unless a tuner was told otherwise (eq. 7)."""
        alphas = [
            {name: float(seat.weights.get(name, 1.0)) for name in features}
            for seat, features in zip(self.seats, self._features, strict=True)
        ]
        if not all(seat.normalize for seat in self.seats if seat.tuner.conditions):
            return alphas
        total = sum(weight for each in alphas for weight in each.values())
        if abs(total) < 1e-6:
            raise UsageError("the condition weights sum to 0; change them, or set normalize=false.")
        return [{name: weight / total for name, weight in each.items()} for each in alphas]


# ----------------------------------------------------------------------------------------------------- attaching


class Attachment:
    """Tuners on a denoiser; `detach` restores it exactly."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    def detach(self) -> None:
        """Takes the tuners off in reverse order; a second call does nothing."""
        while self._parts:
            self._parts.pop().remove()


def attach(
    target: Any,
    *tuners: Tuner,
    scales: Scales | None = None,
    weights: Mapping[str, float] | None = None,
    normalize: bool | None = None,
) -> Attachment:
    """Attaches tuners to a denoiser (or a backbone's): all of them or, when one does not fit, none.

    `scales` is one strength or one a tuner, of any size and sign; 0 leaves a tuner out. `weights` and `normalize`
    override the tuners' own alpha of eq. 7. Raises `SctoolError` or `UsageError` for what cannot be attached.
    """
    denoiser = getattr(target, "denoiser", target)
    scales = 1.0 if scales is None else scales
    each = [scales] * len(tuners) if isinstance(scales, int | float) else scales
    if len(each) != len(tuners):
        raise UsageError(f"{len(each)} scales for {len(tuners)} tuners; give one, or one a tuner.")
    known = {name for tuner in tuners for name in tuner.conditions}
    for name in weights or ():
        if name not in known:
            raise unknown("condition", name, known)
    attachment = Attachment([])
    try:
        for tuner, scale in zip(tuners, each, strict=True):
            attachment._parts.append(tuner.attach(denoiser, scale=float(scale), weights=weights, normalize=normalize))
    except BaseException:
        attachment.detach()
        raise
    return attachment


@contextmanager
def tuned(
    target: Any,
    *tuners: Tuner,
    scales: Scales | None = None,
    weights: Mapping[str, float] | None = None,
    normalize: bool | None = None,
) -> Iterator[nn.Module]:
    """The tuned denoiser inside, the base bit for bit outside. Arguments as `attach`."""
    attachment = attach(target, *tuners, scales=scales, weights=weights, normalize=normalize)
    try:
        yield getattr(target, "denoiser", target)
    finally:
        attachment.detach()


class TunedBackbone(nn.Module):
    """A frozen denoiser and its attached tuners as one module, for DDP and accelerate; only tuners are trained."""

    def __init__(self, denoiser: nn.Module, *tuners: Tuner, **attach_options: Any) -> None:
        super().__init__()
        self.denoiser = denoiser.requires_grad_(False)
        self.tuners = nn.ModuleList(tuners).requires_grad_(True)
        self.attachment = attach(denoiser, *tuners, **attach_options)
        self.train(denoiser.training)

    def train(self, mode: bool = True) -> TunedBackbone:
        """Training mode for the tuners; a denoiser whose weights are not trained stays in evaluation mode."""
        super().train(mode)
        if all(tuner.kind == "skips" for tuner in self.tuners):
            self.denoiser.eval()
        return self

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor], hints: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The denoiser's prediction (B, C, h, w) for noisy `latents` (B, C, h, w) at `timesteps` (B,).

        `text` holds prompt_embeds (B, L, D) and, for SDXL, pooled (B, P) and time_ids (B, 6). `hints` are maps
        (B, 3, H, W) in 0..1, by condition.
        """
        dtype = self.denoiser.dtype
        options: dict[str, Any] = {"cross_attention_kwargs": {"hint": hints}} if hints else {}
        if "pooled" in text:
            options["added_cond_kwargs"] = {"text_embeds": text["pooled"].to(dtype), "time_ids": text["time_ids"]}
        embeds = text["prompt_embeds"].to(dtype)
        return self.denoiser(latents.to(dtype), timesteps, embeds, return_dict=False, **options)[0]
