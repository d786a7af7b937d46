"""Devices and precisions by name: the one table of each. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def best_device() -> str:
    """ "cuda" where there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_dtype(precision: str) -> torch.dtype:
    """fp32, bf16 or fp16 as torch's dtype."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def choose_precision(wanted: str, device: str | torch.device) -> str:
    """ "auto" is bf16 where the GPU has it, fp16 on older GPUs and fp32 on a CPU; any other word is taken as it is."""
    import torch

    if wanted != "auto":
        return wanted
    if torch.device(device).type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
