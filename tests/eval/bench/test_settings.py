"""What a command line means, and what would make a comparison unfair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sctool.core.errors import UsageError
from sctool.core.tuners import TUNERS
from sctool.eval.bench.settings import RATE_SEED, Measuring, Settings

Make = Callable[..., Settings]
SAME = {"method", "tuner", "lr", "seed"}


def test_methods_differ_in_their_own_settings_alone(make: Make) -> None:
    settings = make(pairs=("caption_dropout=0.3", "scedit:tuner.ratio=0.5", "full:weight_decay=0"), lr=("full=1e-5",))
    full, scedit = (settings.config(method, 1) for method in ("full", "scedit"))
    assert (full.lr, scedit.lr) == (1e-5, TUNERS["scedit"].lr)
    assert scedit.tuner == {"ratio": 0.5}
    assert (full.weight_decay, scedit.weight_decay) == (0, 0.01)
    assert full.caption_dropout == scedit.caption_dropout == 0.3
    theirs = {key for key, value in full.model_dump().items() if value != scedit.model_dump()[key]}
    assert theirs <= {*SAME, "weight_decay"}


def test_the_last_step_is_validated_and_nothing_is_previewed(make: Make) -> None:
    config = make(flags={"steps": 11}).config("full", 0)
    assert (config.validate_every, config.sample_every) == (3, 0)
    short = make(rates=(1e-3,), rate_steps=2).config("full", RATE_SEED, lr=1e-3, steps=2)
    assert (short.steps, short.validate_every, short.lr) == (2, 1, 1e-3)


def test_rates_are_for_methods_without_one_of_their_own(make: Make) -> None:
    assert make().tuned == ()
    assert make(rates=(1e-3, 1e-4)).tuned == ("full", "scedit")
    assert make(rates=(1e-3,), lr=("full=1e-5",)).tuned == ("scedit",)
    assert make(rates=(1e-3,), pairs=("full:lr=1e-5",)).tuned == ("scedit",)


def test_images_of_two_seeds_share_no_noise(make: Make) -> None:
    settings = make(count=5)
    assert [settings.first_image(seed) for seed in range(3)] == [0, 5, 10]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"names": ("full", "scedti")}, "Did you mean 'scedit'?"),
        ({"names": ("full", "full")}, "full twice"),
        ({"names": ()}, "names no method"),
        ({"seeds": 0}, "--seeds 0"),
        ({"seeds": RATE_SEED + 1}, "--seeds 1001"),
        ({"count": 1}, "--count 1"),
        ({"pairs": ("seed=3",)}, "--seeds"),
        ({"pairs": ("lr=1e-3",)}, "--lr METHOD=RATE"),
        ({"pairs": ("cond=canny",)}, "without condition maps"),
        ({"pairs": ("validate_every=0",)}, "always measured"),
        ({"pairs": ("scedit:batch=4",)}, "For all of them: batch=4"),
        ({"pairs": ("scedti:tuner.ratio=1",)}, "Did you mean 'scedit'?"),
        ({"pairs": ("scedit:tuner.ratoi=1",)}, "Did you mean 'ratio'?"),
        ({"names": ("full",), "pairs": ("scedit:tuner.ratio=1",)}, "not among --methods full"),
        ({"pairs": ("stps=3",)}, "Did you mean 'steps'?"),
        ({"lr": ("scedit",)}, "METHOD=RATE"),
        ({"lr": ("scedit=fast",)}, "METHOD=RATE"),
        ({"lr": ("scedit=-1",)}, "METHOD=RATE"),
        ({"rates": (0.0,)}, "more than 0"),
        ({"rate_steps": 5}, "add --rates"),
        ({"rates": (1e-3,), "lr": ("full=1", "scedit=1")}, "--rates has no use"),
        ({"measuring": Measuring("resnet")}, "--features"),
    ],
)  # fmt: skip
def test_what_is_refused(make: Make, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        make(**more)
