"""Encoder reuse for sampling: Faster Diffusion (Li et al. 2023, arXiv 2312.09608), on any U-Net with skip connections.

From step to step a U-Net's encoder gives nearly the same features, its decoder does not. So the encoder's blocks and
the middle block run at key steps alone. At the others the decoder gets the features of the last key step, with the
timestep of its own; the first convolution, whose output is the first skip, runs at every step: reusing it too saves
nothing and doubles the error. In such a call the blocks are exchanged for stand-ins that return what was kept; the
denoiser's `forward` is its own, and between calls so is the denoiser. Works with unmodified diffusers pipelines:

    with tuned(pipe.unet, edges), reusing(pipe.unet, key_steps(20)):
        pipe("a wooden chair", num_inference_steps=20, cross_attention_kwargs=channel)

What tuners add is reused with the features that they add it to. Edits of skips that depend on them and the hint alone
(SC-Tuner and CSC-Tuner) are the very edits of the reused features. Tuners in the encoder, and those with a network
that reads latents and timestep (ControlNet and its kind), act anew at key steps alone; tuners in the decoder at every
step. Of what diffusers' own pipelines pass in, a ControlNet's residuals are added at every step, a T2I-Adapter's
features at key steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import DoesNotFit, SctoolError, UsageError
from .kept import Kept
from .skips import skips
from .wiring import Wiring

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

FEATURES = ("down_intrablock_additional_residuals", "down_block_additional_residuals")
"""Arguments by which pipelines pass in what is added inside the encoder; the second only without a middle's."""


class Recalled(nn.Module):
    """Stands for a module of the encoder in one call, and returns what the module itself returned at the key step."""

    def __init__(self, module: nn.Module, output: Any) -> None:
        super().__init__()
        self.has_cross_attention = getattr(module, "has_cross_attention", False)
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The kept output, whatever the arguments."""
        return self.output


class EncoderReuse:
    """Hooks on a denoiser that let its encoder run at the steps `keys` only, until `remove`. See `reusing`.

    Steps are counted from 0, by changes of the timestep; one that rises begins another image at step 0. Several calls
    with the same timestep, such as those for guidance or for parts of a batch, each reuse their own features. A call
    computes all where there is nothing to reuse: the first, one of another shape, and one with gradients.
    """

    def __init__(self, denoiser: Any, keys: Iterable[int]) -> None:
        check_reuse(denoiser)
        self.denoiser, self.keys = denoiser, frozenset(keys)
        self.step, self.turn = 0, 0
        self._timestep: float | None = None
        self._kept: list[Kept] = []  # of the calls of one step, in turn
        self._own: dict[str, nn.Module] = {}
        self._capturing: list[RemovableHandle] = []
        self._handles: list[RemovableHandle] = [
            denoiser.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True),
            denoiser.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Takes the hooks off and forgets the features."""
        self._restore()
        self._kept = []
        while self._handles:
            self._handles.pop().remove()

    # ------------------------------------------------------------------------------------------------ around a call

    def _begin(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Pre-hook of the denoiser, before all others: decides whether this call reuses an earlier one's encoder."""
        self._restore()  # of a call that was interrupted
        if torch.is_grad_enabled():
            return None
        latents: Tensor = args[0] if args else kwargs["sample"]
        self._count(args[1] if len(args) > 1 else kwargs["timestep"])
        kind = latents.shape, latents.dtype, latents.device
        kept = None if self.step in self.keys else self._known(kind)
        reused, kept = kept is not None, kept or self._fresh(kind)
        if wiring := Wiring.of(denoiser):
            wiring.kept = kept
        if not reused:
            self._capture(kept)
            return None
        self._exchange(kept)
        return args, _without_features(kwargs)

    def _end(self, denoiser: nn.Module, args: tuple, output: Any) -> None:
        """Hook after the denoiser's call, also one that failed."""
        wiring = Wiring.of(denoiser)
        if wiring and wiring.kept:
            wiring.kept.note(wiring.attached)
        self._restore()

    def _count(self, timestep: Any) -> None:
        """Which step this call belongs to, and how many calls of the step came before it."""
        now = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        if self._timestep is None or now > self._timestep:
            self.step, self.turn, self._kept = 0, 0, []
        elif now < self._timestep:
            self.step, self.turn = self.step + 1, 0
        else:
            self.turn += 1
        self._timestep = now

    def _known(self, kind: Any) -> Kept | None:
        """What the same call of an earlier step left; None where there was none, another one, or one that failed."""
        kept = self._kept[self.turn] if self.turn < len(self._kept) else None
        return kept if kept and kept.kind == kind and kept.outputs.keys() == self._encoder().keys() else None

    def _fresh(self, kind: Any) -> Kept:
        """Where this call's features go."""
        kept = Kept(kind)
        self._kept[self.turn : self.turn + 1] = [kept]
        return kept

    # ------------------------------------------------------------------------------------------- the encoder's modules

    def _encoder(self) -> dict[str, nn.Module]:
        """The modules before the decoder, by name."""
        blocks = {f"down_blocks.{number}": block for number, block in enumerate(self.denoiser.down_blocks)}
        middle = {"mid_block": self.denoiser.mid_block} if self.denoiser.mid_block is not None else {}
        return {**blocks, **middle}

    def _capture(self, kept: Kept) -> None:
        """Keeps what the encoder's modules return in this call, as the last of their hooks leaves it."""

        def keeper(name: str) -> Any:
            return lambda module, args, output: kept.outputs.__setitem__(name, output)

        self._capturing = [module.register_forward_hook(keeper(name)) for name, module in self._encoder().items()]

    def _exchange(self, kept: Kept) -> None:
        """Puts stand-ins in the place of the encoder's modules."""
        own = self._encoder()
        stand_ins = {name: Recalled(own[name], output) for name, output in kept.outputs.items()}
        self._own = {name: getattr(self.denoiser, name) for name in ("down_blocks", "mid_block")}
        self.denoiser.down_blocks = nn.ModuleList(one for name, one in stand_ins.items() if name != "mid_block")
        self.denoiser.mid_block = stand_ins.get("mid_block")

    def _restore(self) -> None:
        """The denoiser as it was before the call."""
        while self._capturing:
            self._capturing.pop().remove()
        for name, module in self._own.items():
            setattr(self.denoiser, name, module)
        self._own = {}
        if wiring := Wiring.of(self.denoiser):
            wiring.kept = None


def _without_features(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The denoiser's arguments without what would be added inside the encoder: the kept features have it already."""
    controlled = kwargs.get("mid_block_additional_residual") is not None
    dropped = FEATURES[:1] if controlled else FEATURES
    return {name: value for name, value in kwargs.items() if name not in dropped}


def check_reuse(denoiser: nn.Module) -> None:
    """Raises `DoesNotFit` for a denoiser without skip connections, `SctoolError` for one that is compiled."""
    try:
        skips(denoiser)
    except SctoolError as error:
        raise DoesNotFit(
            f"fast sampling reuses a U-Net's encoder, and a {type(denoiser).__name__} has none. "
            "Use fewer steps instead: --scheduler dpm++ --steps 20."
        ) from error
    if hasattr(denoiser, "_orig_mod") or denoiser._compiled_call_impl is not None:
        raise SctoolError("encoder reuse exchanges modules between calls, which a compiled denoiser does not notice.")


@contextmanager
def reusing(target: Any, keys: Iterable[int]) -> Iterator[EncoderReuse]:
    """Inside, the encoder of a denoiser (or a backbone's) runs at the steps `keys` alone; outside all is as before.

    Tuners may be attached before or inside. Raises `UsageError` for steps that are no numbers from 0, `DoesNotFit` for
    a denoiser without an encoder, `SctoolError` for one that reuses already or is compiled.
    """
    denoiser, keys = getattr(target, "denoiser", target), tuple(keys)
    if any(not isinstance(key, int) or key < 0 for key in keys):
        raise UsageError(f"key steps {list(keys)}: they are numbers of steps, from 0.")
    hooks = getattr(denoiser, "_forward_pre_hooks", {}).values()
    if any(isinstance(getattr(hook, "__self__", None), EncoderReuse) for hook in hooks):
        raise SctoolError("this denoiser's encoder is reused already; leave the other block first.")
    reuse = EncoderReuse(denoiser, keys)
    try:
        yield reuse
    finally:
        reuse.remove()
