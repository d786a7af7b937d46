"""SC-Tuner's adapters in the files of the authors' tools: their widths as settings, and whether a file fits a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .foreign import Foreign, Reading

if TYPE_CHECKING:
    from ..backbones.loading import Backbone
    from ..sites.skips import Skip

LAYERS = {"down": "ln1", "up": "ln2"}
"""Our names of an adapter's two layers, and theirs."""


def ranks(foreign: Foreign, backbone: Backbone, first: Mapping[int, str]) -> dict[int, int]:
    """The adapters' bottleneck widths by skip; `first` has the key of each adapter's first weight (r, C).

    Raises `UsageError` for an adapter that is not as wide as its skip, or for a skip that the base does not have.
    """
    from ..tuners.scedit import known_skips

    sites, widths = known_skips(backbone.denoiser), {}
    for index, key in sorted(first.items()):
        if not 0 <= index < len(sites):
            raise UsageError(f"{misfit(foreign, backbone)}: {key} is for a skip beyond the base's {len(sites)}.")
        if key not in foreign.tensors:
            raise incomplete(foreign, key)
        shape, channels = tuple(foreign.tensors[key].shape), sites[index].channels
        if len(shape) != 2 or shape[1] != channels or not shape[0]:
            raise UsageError(f"{misfit(foreign, backbone)}: {key} is {shape}, and skip {index} is {channels} wide.")
        widths[index] = shape[0]
    return widths


def ratio(widths: Mapping[int, int], sites: list[Skip], stated: Any = None) -> float | None:
    """The ratio q with r = int(C q) for all adapters, `stated` if it is one; None where there is none."""
    pairs = [(sites[index].channels, rank) for index, rank in widths.items()]
    low = max(rank / channels for channels, rank in pairs)
    middle = (low + min((rank + 1) / channels for channels, rank in pairs)) / 2  # where low is rounded down too far
    stated = stated if isinstance(stated, int | float) else low
    return next((q for q in (stated, low, middle) if 0 < q <= 4 and all(int(c * q) == r for c, r in pairs)), None)


def settings(widths: Mapping[int, int], sites: list[Skip], stated: Any = None) -> dict[str, Any]:
    """The settings of an SC-Tuner of these widths: one ratio where there is one, else each width."""
    common = ratio(widths, sites, stated)
    if common is None:
        return {"ranks": dict(widths)}
    return {"ratio": common, **({"skips": tuple(sorted(widths))} if len(widths) < len(sites) else {})}


def fitted(
    foreign: Foreign, backbone: Backbone, config: Mapping[str, Any], conditions: tuple[str, ...],
    theirs: Callable[[str], str], keys: Mapping[str, str],
) -> Reading:  # fmt: skip
    """The file as an SCEdit of these settings. `theirs` maps our names to theirs, and `keys` theirs to the file's.

    Raises `UsageError` where a tensor is absent, or has another shape than on this base.
    """
    import torch

    from ..tuners import method_config
    from ..tuners.scedit import SCEdit

    with torch.device("meta"):
        shaped = SCEdit(method_config("scedit", config), backbone.denoiser, conditions, backbone.vae_scale)
    used = {}
    for name, value in shaped.state_dict().items():
        key = keys.get(theirs(name))
        if key is None:
            raise incomplete(foreign, theirs(name))
        shapes = tuple(foreign.tensors[key].shape), tuple(value.shape)
        if shapes[0] != shapes[1]:
            raise UsageError(f"{misfit(foreign, backbone)}: {key} is {shapes[0]} in the file and {shapes[1]} here.")
        used[key] = name
    return Reading("scedit", config, conditions, {name: foreign.tensors[key] for key, name in used.items()}, used)


def by_name(foreign: Foreign, named: Callable[[str], str | None]) -> dict[str, str]:
    """Keys by what `named` calls them; those that it calls None are left out. Raises `UsageError` for two of a name."""
    keys: dict[str, str] = {}
    for key in foreign.tensors:
        name = named(key)
        if name in keys:
            raise UsageError(f"{foreign.path} holds more than one tuner: both {keys[name]} and {key}. Save one alone.")
        if name is not None:
            keys[name] = key
    return keys


def without_maps(foreign: Foreign, condition: str | None) -> None:
    """Raises `UsageError` where a condition is given for a file without a part for maps."""
    if condition is not None:
        raise UsageError(f"{foreign.path} is an SC-Tuner and takes no maps; leave out --cond {condition}.")


def incomplete(foreign: Foreign, name: str) -> UsageError:
    """The error for a file that lacks `name`."""
    return UsageError(f"{foreign.path} is not whole: it has no {name}. Download or save it again.")


def misfit(foreign: Foreign, backbone: Backbone) -> str:
    """The beginning of the error for a file of another base."""
    return f"{foreign.path} does not fit base '{backbone.id}', it was made for another base or with other settings"
