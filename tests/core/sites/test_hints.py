"""Condition maps on their way to the tuners: range, fit, repetition for guidance, and whether they changed."""

from __future__ import annotations

import pytest
import torch

from sctool.core.errors import UsageError
from sctool.core.sites.hints import checked, repeated, tensor_version

LATENTS = torch.zeros(4, 4, 2, 3, dtype=torch.float64)


def test_a_hint_comes_in_the_latents_precision_and_bytes_become_0_to_1() -> None:
    numbers = torch.rand(4, 3, 16, 24)
    assert checked("canny", numbers, LATENTS, 8).dtype == torch.float64
    assert torch.equal(checked("canny", numbers, LATENTS, 8), numbers.double())
    ints = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    torch.testing.assert_close(checked("canny", ints, LATENTS, 8), ints.double() / 255)
    assert checked("canny", torch.rand(1, 3, 8, 12), LATENTS, 4).shape == (1, 3, 8, 12)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((3, 16, 24), "RGB batch"), ((4, 1, 16, 24), "RGB batch"), ((4, 3, 24, 16), "16x24 pixels but the image"),
        ((3, 3, 16, 24), "3 maps for 4 latents"), ((8, 3, 16, 24), "8 maps"), ((0, 3, 16, 24), "0 maps"),
    ],
)  # fmt: skip
def test_a_hint_that_does_not_fit_is_refused(shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(UsageError, match=f"hint 'canny' .*{reason}"):
        checked("canny", torch.rand(shape), LATENTS, 8)


def test_features_repeat_as_whole_batches_for_guidance() -> None:
    two = torch.arange(2.0).view(2, 1, 1).expand(2, 3, 5)
    assert repeated(two, 4)[:, 0, 0].tolist() == [0, 1, 0, 1]
    assert repeated(two, 4).shape == (4, 3, 5)
    assert repeated(two, 2) is two
    one = two[:1]
    assert repeated(one, 4) is one, "a single one is broadcast"
    nested = repeated({"a": [two, {"b": (two, "name")}], "c": None}, 6)
    assert nested["a"][0].shape == nested["a"][1]["b"][0].shape == (6, 3, 5)
    assert nested["a"][1]["b"][1] == "name"
    assert nested["c"] is None


def test_a_tensor_that_is_written_to_counts_as_another_one() -> None:
    a, b = torch.zeros(2), torch.zeros(2)
    before = tensor_version(a)
    assert before != tensor_version(b)
    assert before == tensor_version(a)
    a += 1
    assert before != tensor_version(a)
    with torch.inference_mode():
        frozen = torch.zeros(2)
    assert tensor_version(frozen) == tensor_version(frozen)
