"""SC-Tuners of modelscope's swift, read.

`swift/tuners/scetuning/scetuning.py` puts a module `scetuner_NAME` on each target module and saves the whole model's
keys that contain it (`swift/tuners/base.py`) beside `adapter_config.json`. Where a target is, and swift's
`tuner_mode`, decide what is edited: `decoder` the skip inside a decoder layer's input, `identity` a skip where
scepter's U-Net has an empty module for it (`lsc_identity`), `encoder` the output of an encoder block, which is not
SCEdit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import UsageError
from .adapters import LAYERS, by_name, fitted, incomplete, misfit, ranks, settings, without_maps
from .foreign import Foreign, Format, Reading

if TYPE_CHECKING:
    from ..backbones.loading import Backbone
    from ..sites.skips import Skip

KEY = re.compile(r"(?:(?P<place>.+)\.)?scetuner_[^.]+\.tuner_op\.(?P<layer>\w+\.\w+)")
PLACES = {
    "identity": (r"(?:.+\.)?lsc_identity\.(\d+)",),  # scepter's U-Net
    "decoder": (
        r"(?:.+\.)?up_blocks\.(\d+)\.resnets\.(\d+)",  # diffusers' U-Net
        r"(?:.+\.)?output_blocks\.(\d+)(?:\.0)?",  # scepter's U-Net
    ),
}
"""Target modules that are SC-Tuner's places, by swift's mode."""


class Swift(Format):
    """`adapter_model.safetensors` or `.bin` with `adapter_config.json`: an SC-Tuner."""

    name = "swift"
    what = "modelscope swift's SCEdit"

    def fits(self, foreign: Foreign) -> bool:
        """Whether any key is of a swift adapter for SCEdit."""
        return any(KEY.fullmatch(key) for key in foreign.tensors)

    def read(self, foreign: Foreign, backbone: Backbone, condition: str | None) -> Reading:
        """An SC-Tuner. Raises `UsageError` where it edits anything but skips, does not fit, or is not whole."""
        from ..tuners.scedit import known_skips

        without_maps(foreign, condition)
        if foreign.config.get("hint_modules"):
            raise UsageError(
                f"{foreign.path} has hint_modules, which swift never gives to its adapters; it is no controller."
            )
        sites = known_skips(backbone.denoiser)
        index = _finder(foreign, backbone, sites)
        found: set[int] = set()

        def named(key: str) -> str | None:
            match = KEY.fullmatch(key)
            if match is None:
                return None
            found.add(skip := index(match["place"] or "the whole model"))
            return _name(skip, match["layer"])

        keys = by_name(foreign, named)
        first = {skip: keys.get(name, name) for skip in found for name in [_name(skip, "ln1.weight")]}
        dims = foreign.config.get("dims")
        if isinstance(dims, list) and len(dims) > len(found):
            raise incomplete(foreign, f"adapters for {len(dims) - len(found)} of its {len(dims)} targets")
        config = settings(ranks(foreign, backbone, first), sites, foreign.config.get("down_ratio"))
        return fitted(foreign, backbone, config, (), _theirs, keys)


def _name(skip: int, layer: str) -> str:
    """What a tensor is called in messages: its key depends on the model that it was trained in."""
    return f"{layer} for skip {skip}"


def _theirs(name: str) -> str:
    """Our name of a tensor, as `_name` has it."""
    _, index, layer, leaf = name.split(".")
    return _name(int(index), f"{LAYERS[layer]}.{leaf}")


def _finder(foreign: Foreign, backbone: Backbone, sites: list[Skip]) -> Callable[[str], int]:
    """A function from a target module to the skip that is edited there."""
    stated = foreign.config.get("tuner_mode")
    if stated is not None and stated not in PLACES:
        raise UsageError(
            f"{foreign.path} was trained with tuner_mode={stated}, which edits what the encoder itself goes on with; "
            "SC-Tuner edits skips: tuner_mode=decoder or identity."
        )
    patterns = [pattern for mode in ([stated] if stated else PLACES) for pattern in PLACES[mode]]

    def index(place: str) -> int:
        match = next((match for pattern in patterns if (match := re.fullmatch(pattern, place))), None)
        if match is None:
            mode = f"tuner_mode={stated}" if stated else "no tuner_mode"
            raise UsageError(f"{foreign.path} edits {place} ({mode}), which is not the place of a skip connection.")
        numbers = [int(number) for number in match.groups()]
        reached = sites[::-1]  # as the decoder's layers take them: the encoder's last output first
        if len(numbers) == 2:  # the block, and the layer in it
            reached, numbers = [skip for skip in reached if skip.block == numbers[0]], numbers[1:]
        if numbers[0] >= len(reached):
            raise UsageError(f"{misfit(foreign, backbone)}: the base has no {place}.")
        return reached[numbers[0]].index

    return index
