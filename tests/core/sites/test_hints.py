"""Condition maps on their way to the tuners: range, fit, repetition for guidance, and whether they changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sctool.core.errors import UsageError
from sctool.core.sites.attaching import channel, tuned
from sctool.core.sites.hints import Encodings, checked, repeated, tensor_version
from sctool.core.tuners import method_config, tuner_class

from ..tiny import unet

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


class TestEncodings:
    """Features are made once, whichever tensor shows a part of a hint."""

    def test_each_part_of_a_hint_is_encoded_once(self) -> None:
        encodings, made = Encodings(), []
        hint = torch.rand(4, 3, 8, 8)

        def features(part: torch.Tensor, kind: str = "fp32", weights: int = 0) -> int:
            return encodings.features({"canny": part}, kind, weights, lambda: made.append(1) or len(made))

        for _ in range(3):  # steps; every slice is another tensor
            assert [features(part) for part in hint.chunk(2)] == [1, 2]
            assert features(hint[:2].detach()) == 1
        assert features(hint) == 3
        assert features(hint.contiguous().view(4, 3, 64, 1).view(4, 3, 8, 8)) == 3
        assert features(hint.clone()) == 4
        assert features(hint, kind="bf16") == 5
        assert features(hint.flip(0)) == 6
        assert features(hint.transpose(2, 3)) == 7
        hint[0] += 1
        assert features(hint) == 8
        assert features(hint, weights=1) == 9

    def test_features_do_not_outlive_the_hint_by_more_than_a_batch(self) -> None:
        encodings = Encodings()
        for _ in range(5):
            hint = torch.rand(2, 3, 8, 8)
            for part in hint.chunk(2):
                encodings.features({"canny": part}, "fp32", 0, object)
            assert len(encodings._known) == 2

    def test_new_numbers_at_the_old_place_are_noticed(self) -> None:
        """A frame buffer that is written to by others: each `from_numpy` has a memory of its own, at one address."""
        encodings, frame = Encodings(), np.zeros((1, 3, 8, 8), np.float32)
        results = []
        for number in range(3):
            frame[:] = number
            results.append(encodings.features({"canny": torch.from_numpy(frame)}, "fp32", 0, frame.copy)[0, 0, 0, 0])
        assert results == [0, 1, 2]


@pytest.mark.parametrize("split", [1, 2, 4])
def test_the_hint_net_runs_once_per_image_however_a_batch_is_divided(split: int) -> None:
    """Guidance in two calls, a batch in chunks: each part's features are made at the first step alone."""
    net = unet()
    tuner = tuner_class("scedit").build(method_config("scedit", {}), net, ("canny",)).eval()
    seen: list[int] = []
    encode = tuner.encode
    tuner.encode = lambda hints, inputs=None: (seen.append(len(hints["canny"])), encode(hints, inputs))[1]
    latents, text, hint = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 8), torch.rand(4, 3, 64, 64)
    with torch.no_grad(), tuned(net, tuner):
        for t in (900, 600, 300):
            for _ in range(2):  # the unconditional and the conditional call
                for x, rows, part in zip(latents.chunk(split), text.chunk(split), hint.chunk(split), strict=True):
                    net(x, t, rows, cross_attention_kwargs=channel({"canny": part}))
    assert sum(seen) == 4
    assert len(seen) == split
