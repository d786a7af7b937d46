"""A tiny random U-Net and a tiny random DiT for tests of sites and tuners."""

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel


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


def dit(tied=False, **more):
    """Two blocks of width 8, 8x8 latents, three classes, a learned variance; the same weights at every call, frozen."""
    torch.manual_seed(0)
    options = {
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 3,
        "norm_num_groups": 4,
    }
    net = DiTTransformer2DModel(**options | more)
    if tied:
        net.transformer_blocks[1].norm1.emb = net.transformer_blocks[0].norm1.emb
    return net.requires_grad_(False).eval()
