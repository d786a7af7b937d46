"""Students with each layer in the faster form."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sctool.core.backbones.loading import load_backbone
from sctool.core.backbones.students import read_student
from sctool.core.backbones.thin import THIN, ThinConv2d, ThinLinear
from sctool.core.distilling import fastest as timing
from sctool.core.distilling.distill import distill_config, make_only, one_call
from sctool.core.runs import open_run


def forms(path: Path) -> dict[str, type]:
    return {name: type(module) for name, module in load_backbone(str(path)).denoiser.named_modules()}


@pytest.mark.parametrize("form", ["flat", "spatial"])
def test_layers_are_ordinary_where_that_is_faster(
    form: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[Any, ...]] = []

    def narrow(one: Any, other: Any, x: torch.Tensor) -> bool:
        timed.append((type(other), repr(other), x.shape, x.stride()))
        return isinstance(one, nn.Linear) and one.in_features < 64

    monkeypatch.setattr(timing, "faster", narrow)
    config = distill_config({"base": str(tiny_base), "form": form, "start": "balanced"})
    run = open_run(tmp_path, "run", config)
    make_only(run, config, also=("fast",), quiet=True)
    slow, fast = (load_backbone(str(run.path / name)) for name in ("student", "fast"))
    kinds = dict(fast.denoiser.named_modules())
    thin = {name: module for name, module in slow.denoiser.named_modules() if isinstance(module, THIN)}
    wide = {name for name, layer in thin.items() if isinstance(layer, ThinLinear) and layer.in_features < 64}
    assert wide
    assert {name for name in thin if not isinstance(kinds[name], THIN)} == wide
    assert {type(kinds[name]) for name in wide} == {nn.Linear}
    written, before = read_student(run.path / "fast"), read_student(run.path / "student")
    assert written is not None
    assert before is not None
    assert set(written.ranks) == set(thin) - wide
    assert (written.form, written.ancestors, written.made) == (form, before.ancestors, before.made)
    assert len(timed) == len(set(timed)) < len(thin), "each shape is timed once"
    assert {shape[0] for _, _, shape, _ in timed} == {16}, "both halves of a batch with guidance"
    inputs = torch.randn(3, 4, 8, 8), torch.arange(3) * 300, slow.encode_prompts(["a photo"] * 3)
    with torch.no_grad():
        ours, theirs = (one.family.output(one.denoiser, *inputs) for one in (fast, slow))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not (run.path / "dense").exists()


def test_the_faster_form_is_found_by_the_clock() -> None:
    x = torch.randn(2, 8, 64, 64)
    slow, fast = nn.Conv2d(8, 512, 7), nn.Conv2d(8, 8, 1)
    assert timing.faster(fast, slow, x)
    assert not timing.faster(slow, fast, x)


def test_layers_of_one_kind_and_shape_share_a_choice(tiny_base: Path) -> None:
    base = load_backbone(str(tiny_base))
    like: Any = nn.Conv2d(8, 8, 3)
    assert repr(ThinConv2d(like, 2)) != repr(ThinConv2d(like, 3)), "the rank is part of a layer's shape"
    assert timing.inputs(base.denoiser, partial(one_call, base)) == {}, (
        "a base without low-rank layers has nothing to choose"
    )
