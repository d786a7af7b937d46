"""The formats of other tools, and which of them a file is in or can hold a method."""

from __future__ import annotations

from ..errors import DoesNotFit, UsageError, unknown
from .comfyui import ComfyUI
from .foreign import Foreign, Format
from .kohya import Kohya
from .peft_format import Diffusers, Peft
from .scepter import Scepter
from .swift import Swift

FORMATS: tuple[Format, ...] = (Peft(), Diffusers(), Kohya(), Scepter(), Swift(), ComfyUI())
"""In the order in which a file is compared with them."""
INTO_BASE = ("full", "bitfit", "difffit", "lokr")
"""Methods whose effect no other tool's file holds, but a base's own weights do."""


def recognised(foreign: Foreign) -> Format:
    """The format of a file. Raises `UsageError` for one in none of them, showing some of its keys."""
    for one in FORMATS:
        if one.fits(foreign):
            return one
    if "sctool" in foreign.config:
        raise UsageError(f"{foreign.path} is a tuner of sctool already: use it with --tuner {foreign.path}.")
    keys = sorted(foreign.tensors)
    shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    known = ", ".join(one.what for one in FORMATS if one.name != "comfyui")
    raise UsageError(f"{foreign.path} is in no known format ({known}). Its keys: {shown or 'none'}.")


def format_for(name: str, method: str) -> Format:
    """The format of that name. Raises `UsageError` for an unknown one, and `DoesNotFit` where it cannot hold a method.

    The message says which formats can.
    """
    found = next((one for one in FORMATS if one.name == name and one.methods), None)
    if found is None:
        raise unknown("format", name, [one.name for one in FORMATS if one.methods])
    if method not in found.methods:
        able = [one.name for one in FORMATS if method in one.methods]
        other = f"--to {' or '.join(able)} can." if able else "no other tool's file can; keep the tuner as it is."
        if not able and method in INTO_BASE:
            other = "sctool merge --into-base writes a base that has it in its weights, for every tool."
        raise DoesNotFit(f"--to {name} cannot hold {method}, only {', '.join(found.methods)}; {other}")
    return found
