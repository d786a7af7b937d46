"""What `--features` and `--weights` accept, and the default models. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...core.errors import UsageError, unknown

FEATURES = ("auto", "inception", "inception-clean", "clip", "dinov2", "mini")
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
DINOV2 = "facebook/dinov2-large"
CLIP_MODEL = "ViT-L-14"
"""open_clip's name of the default model of the CLIP score."""
CLIP_TAG = "openai"
"""open_clip's name of the default CLIP weights."""
WEIGHTS = {
    "inception": f"It is {INCEPTION_URL}",
    "clip": "It is a file of open_clip's ViT-L-14-336, or a folder of open_clip or transformers.",
    "dinov2": f"It is a folder with config.json and model.safetensors of {DINOV2}.",
}
"""What `--weights NAME=PATH` may name, and what is expected there."""


def named_weights(specs: Sequence[str], features: str) -> dict[str, str]:
    """`--weights` by network: each is `NAME=PATH` with a name of `WEIGHTS`, or a PATH for the network of `--features`.

    Raises `UsageError` for unknown features or networks, a network given twice, a path that does not exist, or mini
    features, which take no weights.
    """
    if features not in FEATURES:
        raise unknown("--features value", features, FEATURES)
    paths: dict[str, str] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not equals or name not in WEIGHTS:
            if equals and "/" not in name and not Path(spec).expanduser().exists():
                raise unknown("--weights network", name, WEIGHTS, " Write NETWORK=PATH, or only the path.")
            name, path = features if features in WEIGHTS else "inception", spec
            if features == "mini":
                raise UsageError(f"--weights {spec} does nothing here: --features mini takes no weights. Drop one.")
        if name in paths:
            raise UsageError(f"--weights names {name} twice: {paths[name]} and {path}.")
        paths[name] = path
    for name, path in paths.items():
        if not Path(path).expanduser().exists():
            spec = f"{name}={path}" if f"{name}={path}" in specs else path
            raise UsageError(f"--weights {spec}: no such file. {WEIGHTS[name]}")
    return paths
