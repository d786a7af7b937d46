"""A copy of a U-Net's encoder and middle block: diffusers' own modules, with weights of their own or the base's.

The copy is the U-Net without its decoder. It sees the same latents, timestep and text, and features of maps beside
them. Its modules are new ones of the same classes, so whatever is hooked to the base's does not act on the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D
from torch import Tensor, nn

from ..errors import DoesNotFit, SctoolError
from ..sites.site import Inputs
from ..sites.skips import skips
from .fdn import FDN

DECODER = ("up_blocks", "conv_norm_out", "conv_act", "conv_out")
KINDS = (CrossAttnDownBlock2D, DownBlock2D)
Dicts = Mapping[str, Any]
T = TypeVar("T", bound=nn.Module)


def check_encoder(denoiser: Any, method: str) -> None:
    """Raises `DoesNotFit` for a denoiser whose encoder cannot be copied: no U-Net, or one of other blocks."""
    try:
        skips(denoiser)
    except SctoolError as error:
        raise DoesNotFit(
            f"{method} copies a U-Net's encoder, and a {type(denoiser).__name__} has none. "
            "Methods for every denoiser are diffscaler and lora."
        ) from error
    others = [type(block).__name__ for block in denoiser.down_blocks if not isinstance(block, KINDS)]
    if others:
        raise DoesNotFit(f"{method} cannot copy a U-Net with {others[0]}; use --method scedit.")


def own_copy(denoiser: nn.Module) -> Any:
    """The encoder with float32 weights of its own, which start as the base's."""
    made: dict[int, Any] = {}

    def own(tensors: Dicts) -> dict[str, Any]:
        return {name: None if tensor is None else cloned(tensor) for name, tensor in tensors.items()}

    def cloned(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            value = tensor.detach().float().clone() if tensor.is_floating_point() else tensor.clone()
            made[id(tensor)] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
        return made[id(tensor)]

    return _twin(denoiser, own, {}, leave_out=DECODER)


def shared_copy(denoiser: nn.Module) -> Any:
    """The encoder with the base's very own weights, whatever becomes of them: nothing is allocated.

    Not to be registered as a submodule: its parameters are the base's.
    """
    return _twin(denoiser, lambda tensors: tensors, {}, leave_out=DECODER)


def _twin(module: T, tensors: Callable[[Dicts], Dicts], made: dict[int, nn.Module], leave_out: Sequence[str] = ()) -> T:
    """A module of the same class and settings without hooks, and of its children; `tensors` gives it its weights."""
    if id(module) not in made:
        twin = made[id(module)] = module.__class__.__new__(module.__class__)
        fresh = {name: value for name, value in vars(nn.Module()).items() if name in vars(module)}
        twin.__dict__ = {**vars(module), **fresh, "training": False, "_modules": {}}
        twin.__dict__["_non_persistent_buffers_set"] = module._non_persistent_buffers_set
        twin.__dict__["_parameters"], twin.__dict__["_buffers"] = tensors(module._parameters), tensors(module._buffers)
        for name, child in module._modules.items():
            if name not in leave_out:
                twin._modules[name] = None if child is None else _twin(child, tensors, made)
    return made[id(module)]  # type: ignore[return-value] - of the same class


def inject(encoder: Any, norms: Sequence[Sequence[FDN]]) -> None:
    """Puts FDNs before and after the first convolution of each level's first residual block."""
    for block, (before, after) in zip(encoder.down_blocks, norms, strict=True):
        block.resnets[0].norm1, block.resnets[0].norm2 = before, after


def injected(resnet: Any, x: Tensor, emb: Tensor, features: Tensor) -> Tensor:
    """A residual block whose norms are given features; set here, since checkpointing calls it again in backward."""
    resnet.norm1.features = resnet.norm2.features = features
    try:
        return resnet(x, emb)
    finally:
        resnet.norm1.features = resnet.norm2.features = None


def encoder_states(encoder: Any, inputs: Inputs, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """The copy's skips in encoder order and its middle block's output, as the U-Net's own forward makes them.

    `features` (B or 1, width, h, w) are those of each level. The middle is None for a U-Net without a middle block.
    """
    x = 2 * inputs.latents - 1 if encoder.config.center_input_sample else inputs.latents
    emb, text = _embeddings(encoder, x, inputs)
    x = encoder.conv_in(x)
    states = [x]
    for block, own in zip(encoder.down_blocks, features, strict=True):
        x = _down(block, x, emb, text, own, states)
    middle = encoder.mid_block
    if middle is None:
        return states, None
    attends = getattr(middle, "has_cross_attention", False)
    return states, middle(x, emb, encoder_hidden_states=text) if attends else middle(x, emb)


def _embeddings(encoder: Any, x: Tensor, inputs: Inputs) -> tuple[Tensor, Any]:
    """The timestep's embedding with all that is added to it, and the text as attention reads it."""
    given = inputs.conditioning
    text, more = given.get("encoder_hidden_states"), given.get("added_cond_kwargs") or {}
    emb = encoder.time_embedding(encoder.get_time_embed(x, inputs.timestep), given.get("timestep_cond"))
    classes = encoder.get_class_embed(x, given.get("class_labels"))
    if classes is not None:
        emb = torch.cat([emb, classes], -1) if encoder.config.class_embeddings_concat else emb + classes
    added = encoder.get_aug_embed(emb, text, more)
    emb = emb if added is None else emb + added
    if encoder.time_embed_act is not None:
        emb = encoder.time_embed_act(emb)
    return emb, encoder.process_encoder_hidden_states(text, more)


def _down(block: Any, x: Tensor, emb: Tensor, text: Any, features: Tensor, states: list[Tensor]) -> Tensor:
    """One level; every state that goes to the decoder is added to `states`."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    for place, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
        run, arguments = (injected, (resnet, x, emb, features)) if place == 0 else (resnet, (x, emb))
        if block.gradient_checkpointing and torch.is_grad_enabled():
            x = block._gradient_checkpointing_func(run, *arguments)
        else:
            x = run(*arguments)
        if attention is not None:
            x = attention(x, encoder_hidden_states=text, return_dict=False)[0]
        states.append(x)
    for downsampler in block.downsamplers or ():
        x = downsampler(x)
        states.append(x)
    return x
