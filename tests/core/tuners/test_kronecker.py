"""Kronecker updates against torch's own product and dense layers, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sctool.core.errors import DoesNotFit
from sctool.core.tuners.kronecker import Kronecker

LAYERS = [
    nn.Linear(12, 8),
    nn.Linear(77, 321),
    nn.Linear(3, 2),
    nn.Conv2d(8, 12, 3, padding=1),
    nn.Conv2d(6, 9, 3, stride=2, padding=1),
    nn.Conv2d(3, 5, 1),
    nn.Conv2d(4, 320, (3, 5), stride=(1, 2), padding=(0, 2)),
]


def shaken(layer, n=4, rank=2):
    torch.manual_seed(0)
    update = Kronecker(layer, n, rank).double()
    nn.init.normal_(update.u)
    return update


def by_kron(update):
    """The definition: a sum of torch.kron, cut to the layer's size."""
    n, places = update.n, update.kernel[0] * update.kernel[1]
    whole = sum(torch.kron(update.A[i], update.u[i] @ update.v[i]) for i in range(n))
    return whole[: update.outputs, : update.inputs * places]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
@pytest.mark.parametrize("n", [1, 4])
def test_equals_the_definition(layer, n):
    update, weight = shaken(layer, n), layer.weight
    dense = by_kron(update).view(weight.shape)
    torch.testing.assert_close(update.materialised(), dense, rtol=0, atol=1e-13)
    if isinstance(layer, nn.Linear):
        x = torch.randn(2, 3, layer.in_features, dtype=torch.double)
        expected = x @ dense.T
    else:
        x = torch.randn(2, layer.in_channels, 7, 9, dtype=torch.double)
        expected = F.conv2d(x, dense, None, layer.stride, layer.padding)
    torch.testing.assert_close(update(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(update(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x), expected)


def test_numbers_and_start():
    update = Kronecker(nn.Conv2d(320, 640, 3, padding=1), 4, 8)
    assert sum(p.numel() for p in update.parameters()) == 4**3 + 8 * (640 + 320 * 9)
    assert not update.materialised().any()
    assert update.v.std().item() == pytest.approx((320 * 9) ** -0.5, rel=0.05)
    many = torch.stack([Kronecker(nn.Linear(4, 4), 4, 1).A for _ in range(200)])
    assert many.std().item() == pytest.approx(1 / 4, rel=0.05)


@pytest.mark.parametrize(("n", "rank", "most"), [(4, 1, 16), (4, 2, 32), (2, 3, 12)])
def test_the_rank_is_n_squared_times_that_of_a_term(n, rank, most):
    update = shaken(nn.Linear(64, 64), n, rank)
    assert torch.linalg.matrix_rank(update.materialised()) == most


def test_gradients_are_those_of_the_dense_weight():
    layer = nn.Conv2d(6, 10, 3, stride=2, padding=1)
    one = shaken(layer)
    x = torch.randn(2, 6, 8, 8, dtype=torch.double)
    one(x).square().sum().backward()
    found = [p.grad.clone() for p in one.parameters()]
    one.zero_grad()
    F.conv2d(x, one.materialised(), None, 2, 1).square().sum().backward()
    for grad, p in zip(found, one.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


def test_nothing_of_the_weights_size_is_kept_for_backward():
    layer = nn.Conv2d(64, 96, 3, padding=1)
    update, sizes = Kronecker(layer, 4, 2), []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    x = torch.randn(1, 64, 2, 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        update(x)
    assert max(sizes) < layer.weight.numel() / 8


def test_other_precisions_follow_the_input():
    update = Kronecker(nn.Linear(6, 5), 4, 2)
    assert update(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert update.A.dtype == torch.float32


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding": 1, "padding_mode": "circular"}])
def test_convolutions_of_other_kinds_are_refused(options):
    with pytest.raises(DoesNotFit, match="grouped or dilated"):
        Kronecker(nn.Conv2d(4, 4, 3, **options), 4, 1)
