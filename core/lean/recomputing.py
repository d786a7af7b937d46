"""Levels 2 to 4: parts of a frozen denoiser whose forward pass is run again in backward, instead of keeping its values.

A stand-in keeps its input. In a transformer that input is a norm's output, which would be kept only for this: there the
norm is put off, so that the stand-in is given the residual stream, which is kept anyway, and norms it itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .exchanging import Exchange, hooked, places, sharing, trained
from .functions import wanted
from .keeping import KeepingGEGLU

aten = torch.ops.aten
ATTENTION = [
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""Their outputs are kept where q, k and v are computed again: attention itself is never run twice."""


def keep_attention() -> Any:
    """What selective checkpointing asks for: kept values in forward, the same ones again in backward."""
    return create_selective_checkpoint_contexts(ATTENTION)


def again(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`run` of the arguments, which alone are kept; nothing in it may draw random numbers."""
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def again_but_attention(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The same, and what `ATTENTION` returns is kept too."""
    return checkpoint(  # the compiler knows a context only by a global name
        run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=keep_attention,
        respect_saved_tensors_hooks=False, **kwargs,
    )  # fmt: skip


class Recomputed:
    """To be put before a module's class: what it computes is computed again in backward.

    Where its input needs no gradient it is as it was. Hooks of the module itself run once, outside.
    """

    before: tuple[nn.Module, ...] = ()
    """The norm that was put off; in a tuple, so that it is no submodule."""
    always: bool = False
    """Something inside is trained, so that it keeps values even for an input that needs no gradient."""
    again: Callable[..., Any] = staticmethod(again)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        if wanted(hidden_states):
            return self.again(self._normed, hidden_states, *args, **kwargs)
        own = super().forward  # type: ignore[misc]
        if self.always and torch.is_grad_enabled():
            return self.again(own, hidden_states, *args, **kwargs)
        return own(hidden_states, *args, **kwargs)

    def _normed(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        for norm in self.before:
            hidden_states = norm(hidden_states)
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


class RecomputedGEGLU(Recomputed, KeepingGEGLU):
    """The first layer of a feed-forward network."""


class RecomputedGELU(Recomputed, GELU):
    """That of a transformer without gates."""


class RecomputedAttention(Recomputed, Attention):
    """Attention whose q, k and v are computed again, and whose output is kept."""

    again = staticmethod(again_but_attention)


class RecomputedResnet(Recomputed, ResnetBlock2D):
    """A whole residual block."""


class RecomputedTransformer2D(Recomputed, Transformer2DModel):
    """A whole transformer of a U-Net, with its projections."""


class RecomputedBlock(Recomputed, BasicTransformerBlock):
    """A whole block of a transformer."""


class PutOff(nn.LayerNorm):
    """A norm that is left to the stand-in after it."""

    def forward(self, input: Tensor) -> Tensor:
        """The input itself where a gradient is wanted, as `Recomputed` decides too; else the norm."""
        return input if wanted(input) else super().forward(input)


FIRST: dict[type, type] = {KeepingGEGLU: RecomputedGEGLU, GELU: RecomputedGELU}
WHOLE: dict[type, type] = {ResnetBlock2D: RecomputedResnet, Transformer2DModel: RecomputedTransformer2D}


def recompute_feed_forward(denoiser: nn.Module, exchange: Exchange) -> None:
    """The first layer of every feed-forward network, which is four to eight times as wide as the stream."""
    for block in _blocks(denoiser):
        net: Any = block.ff.net
        first = net[0]
        if type(first) in FIRST:
            before = _put_off(block, "norm3", exchange, block.ff, first)
            exchange.put(net, "0", sharing(FIRST[type(first)], first, before=before, always=_learns(first)))


def recompute_attention(denoiser: nn.Module, exchange: Exchange) -> None:
    """q, k and v of every attention."""
    for block in _blocks(denoiser):
        for name, norm in (("attn1", "norm1"), ("attn2", "norm2")):
            attention: Any = getattr(block, name, None)
            if type(attention) is Attention:
                before = _put_off(block, norm, exchange, attention)
                own = sharing(RecomputedAttention, attention, before=before, always=_learns(attention))
                exchange.put(block, name, own)


def recompute_layers(denoiser: nn.Module, exchange: Exchange) -> None:
    """Every layer: residual blocks and transformers of a U-Net, the blocks of a transformer."""
    found = [place for place in places(denoiser) if type(place[2]) in WHOLE]
    for holder, name, module in found:
        exchange.put(holder, name, sharing(WHOLE[type(module)], module, always=_learns(module)))
    if not found:
        for holder, name, module in places(denoiser):
            if type(module) is BasicTransformerBlock:
                exchange.put(holder, name, sharing(RecomputedBlock, module, always=_learns(module)))


def _learns(module: nn.Module) -> bool:
    """Whether anything in it may be trained: its own weights, or a tuner's by a hook."""
    return any(hooked(part) or trained(part) for part in module.modules())


def _blocks(denoiser: nn.Module) -> list[BasicTransformerBlock]:
    return [module for module in denoiser.modules() if isinstance(module, BasicTransformerBlock)]


def _put_off(block: BasicTransformerBlock, name: str, exchange: Exchange, *readers: nn.Module) -> tuple[nn.Module, ...]:
    """The block's norm, put off; () where it must stay: trained, hooked, or its output is not all that is read.

    `readers` are the modules that are given its output.
    """
    norm = getattr(block, name, None)
    if type(norm) is not nn.LayerNorm or trained(norm) or hooked(norm, *readers):
        return ()
    if block.norm_type != "layer_norm" or block.pos_embed is not None or block._chunk_size is not None:
        return ()
    exchange.put(block, name, sharing(PutOff, norm))
    return (norm,)
