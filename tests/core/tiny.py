"""A tiny random U-Net for tests of sites and tuners."""

import torch
from diffusers import UNet2DConditionModel


def unet(**more):
    """Four skips, 8x8 latents, text rows of width 8; the same weights at every call, frozen."""
    torch.manual_seed(0)
    options = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**options | more).requires_grad_(False).eval()
