"""The names that layers of Stable Diffusion's U-Nets have in the original code (CompVis, Stability): LDM's.

ComfyUI, the web UI and kohya's files for SDXL use them; diffusers renamed the layers.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

TOP = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def ldm_name(name: str, denoiser: nn.Module) -> str | None:
    """What a layer or block of diffusers' U-Net is called there; None for one that it does not have."""
    for theirs, ours in TOP.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name[len(theirs) :]
    unet: Any = denoiser
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.?(.*)", name):
        kind, index, rest = match[1], int(match[2]), match[3]
        return _joined(f"middle_block.{2 * index if kind == 'resnets' else 1}", kind, rest)
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.?(.*)", name)
    if not match:
        return None
    side, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    blocks = unet.down_blocks if side == "down" else unet.up_blocks
    before = sum(len(block.resnets) + (side == "down") for block in blocks[:level])
    block = blocks[level]
    if side == "down":
        place = before + 1
        if kind == "downsamplers":
            return f"input_blocks.{place + len(block.resnets)}.0.{rest.replace('conv', 'op', 1)}"
        return _joined(f"input_blocks.{place + index}.{int(kind == 'attentions')}", kind, rest)
    if kind == "upsamplers":
        last = before + len(block.resnets) - 1
        return f"output_blocks.{last}.{2 if getattr(block, 'attentions', None) else 1}.{rest}"
    return _joined(f"output_blocks.{before + index}.{int(kind == 'attentions')}", kind, rest)


def _joined(place: str, kind: str, rest: str) -> str:
    """The block's place and the layer in it, which transformers call as diffusers does."""
    if not rest:
        return place
    if kind == "resnets":
        head, dot, tail = rest.partition(".")
        rest = RESNET[head] + dot + tail
    return f"{place}.{rest}"
