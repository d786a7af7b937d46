"""Families of bases, one file each: all that differs between kinds of denoisers. `FAMILIES` is the only table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UsageError
from .base import Family
from .dit import DiT
from .sd import StableDiffusion
from .sdxl import StableDiffusionXL

FAMILIES: tuple[Family, ...] = (StableDiffusion(), StableDiffusionXL(), DiT())


def family_of_pipeline(pipeline: str, base: str) -> Family:
    """The family of a diffusers pipeline class, named in model_index.json. Raises `UsageError` for other pipelines."""
    for family in FAMILIES:
        if family.pipeline == pipeline:
            return family
    known = ", ".join(family.pipeline for family in FAMILIES)
    raise UsageError(f"--base {base} is a {pipeline}; supported are {known}.{_remedy(pipeline)}")


def _remedy(pipeline: str) -> str:
    if "Inpaint" in pipeline:
        return " Inpainting bases take a mask as input; use the base that it was made from, with --cond mask."
    return ""


def family_of_denoiser(config: Mapping[str, Any]) -> Family:
    """The family that recognises a denoiser's config. Raises `UsageError` when none does."""
    for family in FAMILIES:
        if family.recognises(config):
            return family
    raise UsageError(f"a {config.get('_class_name', 'denoiser')} of this kind is not supported.")
