"""Files of SCEdit's authors (github.com/modelscope/scepter), read and written.

Their names are those of `scepter/modules/model/tuner/sce/scetuning.py` (`CSCTuners`, `SCTuner`) and of
`scepter/modules/model/network/ldm/ldm_sce.py`, which saves them. Adapters are numbered there in the decoder's order,
the cascade's blocks in the encoder's, as all skips are here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DoesNotFit, UsageError
from ..files import replacing, write_json
from .adapters import LAYERS, by_name, fitted, incomplete, misfit, ranks, ratio, settings, without_maps
from .foreign import Foreign, Format, Reading

if TYPE_CHECKING:
    from ..backbones.loading import Backbone
    from ..sites.skips import Skip
    from ..tuners.base import Tuner
    from ..tuners.scedit import SCEdit

TEXT = re.compile(r"(?:model\.)?(lsc_identity\.(\d+)\.tuner_op\.\w+\.\w+)")
CONTROL = re.compile(
    r"(?:model\.)?(?:control_blocks\.)?(?:(?P<branch>\d+)\.)?"
    r"(?P<name>(?:pre_hint_blocks|dense_hint_blocks|lsc_tuner_blocks)\.\d+\..+)"
)
"""Keys with the prefixes that their loaders cut off."""
FACTOR = 8
"""Their hint block reduces a map by this."""
OURS = "SCTOOL"
"""The entry of configuration.json that says what their format has no place for."""


class Scepter(Format):
    """`pytorch_model.bin` with `configuration.json`: an SC-Tuner, or a CSC-Tuner of one condition.

    A controller's folder is called `0_SwiftSCETuning` where their inference looks for it, inside the controller's own
    (`scepter/modules/inference/control_inference.py`).
    """

    name = "scepter"
    what = "SCEdit's authors' (scepter)"
    methods = ("scedit",)

    def fits(self, foreign: Foreign) -> bool:
        """Whether any key is of an SC-Tuner or of a controller."""
        return any(TEXT.fullmatch(key) or CONTROL.fullmatch(key) for key in foreign.tensors)

    def read(self, foreign: Foreign, backbone: Backbone, condition: str | None) -> Reading:
        """An SC-Tuner, or a CSC-Tuner of one condition, which the file names only where it was written here.

        Raises `UsageError` for a file that does not fit the backbone or is not whole, and for several controllers.
        """
        from ..tuners.scedit import known_skips

        sites = known_skips(backbone.denoiser)
        if any(CONTROL.fullmatch(key) for key in foreign.tensors):
            return _controller(foreign, backbone, sites, _condition(foreign, condition))
        without_maps(foreign, condition)
        return _sc_tuner(foreign, backbone, sites)

    def write(self, out: Path, tuner: Tuner, backbone: Backbone, meta: Mapping[str, Any]) -> list[Path]:
        """Writes both files. A condition's weight and gain become `SCALE`.

        Raises `DoesNotFit` for what their classes cannot load or run.
        """
        import torch

        from ..tuners.scedit import SCEdit, known_skips

        assert isinstance(tuner, SCEdit)
        sites = known_skips(backbone.denoiser)
        if reason := next(_unfit(tuner, sites), None):
            raise DoesNotFit(f"{reason} Or keep sctool's own file.")
        config = _control_config(tuner, sites) if tuner.conditions else _text_config(tuner, sites)
        ours = {key: meta[key] for key in ("conditions", "maps", "base", "licence") if key in meta}
        theirs = partial(_theirs, count=len(sites))
        state = {theirs(name): value.detach().cpu().float().clone() for name, value in tuner.state_dict().items()}
        if not tuner.conditions:
            state = {f"model.{name}": value for name, value in state.items()}
        weights, described = out / "pytorch_model.bin", out / "configuration.json"
        with replacing(weights) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
        write_json(described, {**config, OURS: ours})
        return [weights, described]


# --------------------------------------------------------------------------------------------------------- names


def _theirs(name: str, count: int) -> str:
    """Their name of our tensor `name`, on a base with `count` skips."""
    kind, *place, layer, leaf = name.split(".")
    if kind == "sc":
        return f"lsc_identity.{count - 1 - int(place[0])}.tuner_op.{LAYERS[layer]}.{leaf}"
    _, part, *rest = place
    if part == "stem":
        return f"pre_hint_blocks.{2 * int(layer)}.{leaf}"  # SiLU between has the odd numbers
    if part == "dense":
        return f"dense_hint_blocks.{rest[0]}.1.{leaf}"
    return f"lsc_tuner_blocks.{count - 1 - int(rest[0])}.tuner_op.{LAYERS[layer]}.{leaf}"


def _blocks(keys: Mapping[str, str], block: str) -> list[int]:
    """The numbers that a list of blocks has in the file."""
    return sorted({int(name.split(".")[1]) for name in keys if name.startswith(f"{block}.")})


def _first(keys: Mapping[str, str], block: str, count: int) -> dict[int, str]:
    """The key of each adapter's first weight, by its skip; a name that is not in the file where it is absent."""
    names = {number: f"{block}.{number}.tuner_op.ln1.weight" for number in _blocks(keys, block)}
    return {count - 1 - number: keys.get(name, name) for number, name in names.items()}


# ------------------------------------------------------------------------------------------------------- reading


def _sc_tuner(foreign: Foreign, backbone: Backbone, sites: list[Skip]) -> Reading:
    keys = by_name(foreign, lambda key: match[1] if (match := TEXT.fullmatch(key)) else None)
    widths = ranks(foreign, backbone, _first(keys, "lsc_identity", len(sites)))
    stated = foreign.config.get("SC_TUNER_CFG")
    stated = stated if isinstance(stated, Mapping) else {}
    if stated:  # it also says which skips are edited
        chosen = foreign.config.get("USE_LAYERS") or range(len(sites))
        if absent := sorted(set(chosen) - {len(sites) - 1 - index for index in widths}):
            raise incomplete(foreign, f"lsc_identity.{absent[0]}")
    config = settings(widths, sites, stated.get("DOWN_RATIO"))
    return fitted(foreign, backbone, config, (), partial(_theirs, count=len(sites)), keys)


def _controller(foreign: Foreign, backbone: Backbone, sites: list[Skip], condition: str) -> Reading:
    if backbone.vae_scale != FACTOR:
        raise UsageError(
            f"{foreign.path} does not fit base '{backbone.id}': its maps are reduced by {FACTOR}, and the base's "
            f"autoencoder reduces by {backbone.vae_scale}."
        )
    matches = {key: match for key in foreign.tensors if (match := CONTROL.fullmatch(key))}
    branches = sorted({match["branch"] or "0" for match in matches.values()}, key=int)
    if len(branches) > 1:
        raise UsageError(
            f"{foreign.path} holds {len(branches)} controllers, {', '.join(f'{one}.' for one in branches)} "
            "Save each in a file of its own, import each with its --cond, and use them together or merge them."
        )
    keys = by_name(foreign, lambda key: matches[key]["name"] if key in matches else None)
    stated = _control_model(foreign.config)
    indices = _cascade(foreign, backbone, keys, sites)
    widths = ranks(foreign, backbone, _first(keys, "lsc_tuner_blocks", len(sites)))
    common = ratio(widths, sites, stated.get("DOWN_RATIO"))
    if common is None:
        raise UsageError(f"{foreign.path}: its adapters have widths that no one ratio gives, {widths} by skip.")
    config = {
        "ratio": common,
        "kernel": _size(foreign, keys, f"dense_hint_blocks.{indices[0]}.1.weight", -1),
        "hint_channels": _size(foreign, keys, "pre_hint_blocks.12.weight", 0),
        "normalize": False,  # their sum over conditions is not normalised
        **({"skips": tuple(indices)} if len(indices) < len(sites) else {}),
        **({"gains": {condition: scale}} if (scale := stated.get("SCALE", 1.0)) != 1 else {}),
    }
    return fitted(foreign, backbone, config, (condition,), partial(_theirs, count=len(sites)), keys)


def _cascade(foreign: Foreign, backbone: Backbone, keys: Mapping[str, str], sites: list[Skip]) -> list[int]:
    """The skips of a controller. Raises `UsageError` where its adapters are at others, or a halving is left out."""
    dense = _blocks(keys, "dense_hint_blocks")
    tuned = sorted(len(sites) - 1 - number for number in _blocks(keys, "lsc_tuner_blocks"))
    if dense != tuned or not dense:
        raise UsageError(
            f"{misfit(foreign, backbone)}: its cascade has skips {dense} and its adapters have {tuned}; "
            f"the base has {len(sites)}."
        )
    if halved := [site.index for site in sites[: dense[-1]] if site.stride2 and site.index not in dense]:
        raise UsageError(f"{foreign.path}: its cascade leaves out skip {halved[0]}, where the base halves the size.")
    return dense


def _size(foreign: Foreign, keys: Mapping[str, str], name: str, axis: int) -> int:
    """A side of a convolution's weight (out, in, k, k). Raises `UsageError` where it is absent or of another kind."""
    if name not in keys:
        raise incomplete(foreign, name)
    shape = tuple(foreign.tensors[keys[name]].shape)
    if len(shape) != 4:
        raise UsageError(f"{foreign.path}: {keys[name]} is {shape}, not the weight of a convolution.")
    return shape[axis]


def _condition(foreign: Foreign, condition: str | None) -> str:
    """What a controller is controlled by. Raises `UsageError` where nobody says it, or two say different things."""
    ours = foreign.config.get(OURS)
    names = ours.get("conditions") if isinstance(ours, Mapping) else None
    stated = str(names[0]) if isinstance(names, list) and names else None
    if stated and condition and stated != condition:
        raise UsageError(f"{foreign.path} is controlled by {stated}; leave out --cond {condition}.")
    if name := stated or condition:
        return name
    raise UsageError(f"{foreign.path} does not say what maps it is controlled by; add --cond, e.g. --cond canny.")


def _control_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of CSCTuners in configuration.json: alone, as training writes them, or as inference reads them."""
    model = config.get("CONTROL_MODEL", config)
    model = model[0] if isinstance(model, list) and len(model) == 1 else model
    return model if isinstance(model, Mapping) else {}


# ------------------------------------------------------------------------------------------------------- writing


def _unfit(tuner: SCEdit, sites: list[Skip]) -> Iterator[str]:
    """Why their classes cannot load or run the tuner, setting by setting."""
    config, conditions = tuner.config, tuner.conditions
    if config.operator != "linear":
        yield f"operator={config.operator}: scepter's adapters are linear; train with operator=linear."
    if tuner.classes:
        yield f"classes={','.join(tuner.classes)}: scepter's files have no new classes; train on captions."
    if not conditions:
        if ratio(_widths(tuner.sc), sites) is None:
            yield f"ranks={config.ranks}: scepter's SC-Tuner has one ratio for all skips; train with one."
        return
    if config.ranks:
        yield "the tuner is an SC-Tuner and a CSC-Tuner in one (ranks); export the two that it was merged from."
    if len(conditions) > 1:
        yield f"conditions={','.join(conditions)}: a controller of scepter has one; train one run a condition."
    if config.dual:
        yield "dual=true: scepter's dense blocks are one convolution; train with dual=false."
    if config.cascade != "zero-chain":
        yield f"cascade={config.cascade}: scepter's cascade has no heads; train with cascade=zero-chain."
    if config.skips is not None and len(config.skips) < len(sites):
        yield f"skips={list(config.skips)}: scepter's controllers run with all skips only; train with all."
    if tuner.vae_scale != FACTOR:
        yield f"its autoencoder reduces by {tuner.vae_scale}, scepter's hint block by {FACTOR}; take another base."
    if any(ratio(_widths(branch.tuner), sites) is None for branch in tuner.csc.values()):
        yield f"ratio={config.ratio}: no ratio gives these widths in scepter; train with a larger one."


def _widths(adapters: Any) -> dict[int, int]:
    """The bottleneck widths by skip."""
    return {int(index): len(adapter.down.weight) for index, adapter in adapters.items()}


def _text_config(tuner: SCEdit, sites: list[Skip]) -> dict[str, Any]:
    """What `LatentDiffusionSCETuning` is built from."""
    widths = _widths(tuner.sc)
    sc_tuner = {"NAME": "SCTuner", "TUNER_NAME": "SCEAdapter", "DOWN_RATIO": ratio(widths, sites, tuner.config.ratio)}
    layers = sorted(len(sites) - 1 - index for index in widths)
    return {"SC_TUNER_CFG": sc_tuner, **({"USE_LAYERS": layers} if len(layers) < len(sites) else {})}


def _control_config(tuner: SCEdit, sites: list[Skip]) -> dict[str, Any]:
    """What `CSCTuners` is built from, under the name that their inference reads it by."""
    [name], config = tuner.conditions, tuner.config
    stem = tuner.csc[name].stem
    weight = 1.0 if config.normalize else config.weights.get(name, 1.0)  # normalised, the weight of one is 1
    return {
        "CONTROL_MODEL": {
            "NAME": "CSCTuners",
            "PRE_HINT_IN_CHANNELS": 3,
            "PRE_HINT_OUT_CHANNELS": stem[-1].out_channels,
            "PRE_HINT_DIM_RATIO": stem[0].out_channels / 16,
            "DENSE_HINT_KERNAL": config.kernel,  # their spelling
            "SCALE": weight * config.gains.get(name, 1.0),
            "DOWN_RATIO": ratio(_widths(tuner.csc[name].tuner), sites, config.ratio),
            "SC_TUNER_CFG": {"NAME": "SCTuner", "TUNER_NAME": "SCEAdapter"},
        }
    }
