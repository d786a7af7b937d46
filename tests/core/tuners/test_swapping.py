"""BitFit, DiffFit and full fine-tuning against the denoiser itself with the same weights."""

import copy
import itertools

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from sctool.core.errors import DoesNotFit, SctoolError, UsageError
from sctool.core.sites.attaching import TunedBackbone, tuned
from sctool.core.sites.parts import family_of
from sctool.eval.profile import parameters

from ..tiny import dit, unet
from .test_tuners import base_output, build, inputs

NETS = {"unet": unet, "dit": dit, "tied dit": lambda: dit(tied=True)}
every_net = pytest.mark.parametrize("net", NETS)


def scaled(module, gamma):
    """The module with its output multiplied by gamma: a restatement that shares no code with the sites."""
    forward = module.forward

    def multiplied(*args, **kwargs):
        out = forward(*args, **kwargs)
        return (gamma * out).to(out.dtype)

    module.forward = multiplied


def restated(net, tuner):
    """A copy of the denoiser with the tuner's weights in it, in the denoiser's precision."""
    twin, state = copy.deepcopy(net), tuner.state_dict()
    gammas = {name: state.pop(name) for name in list(state) if ".gamma_" in name}
    unexpected = twin.load_state_dict(state, strict=False).unexpected_keys
    assert not unexpected
    for name, gamma in gammas.items():
        path, part = name.split(".gamma_")
        scaled(twin.get_submodule(f"{path}.{part}"), gamma)
    return twin


@every_net
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["bitfit", "difffit"])
def test_the_denoiser_with_these_weights(net, method, dtype):
    net = NETS[net]().to(dtype)
    tuner = build(net, method)
    base, expected = base_output(net), base_output(restated(net, tuner))
    with tuned(net, tuner):
        out = base_output(net)
    assert out.dtype == dtype
    assert not torch.allclose(out, base, atol=0.1)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(out, expected, **tolerance)
    if method == "bitfit":
        assert torch.equal(out, expected)


@every_net
def test_a_scale_factor_for_every_part_of_a_block(net):
    net = NETS[net]()
    blocks = [(name, m) for name, m in net.named_modules() if isinstance(m, BasicTransformerBlock)]
    parts = ("attn1", "attn2", "ff") if family_of(net).name == "sd" else ("attn1", "ff")
    gammas = {f"{name}.gamma_{part}": block.dim for name, block in blocks for part in parts}
    tuner = build(net, "difffit", shaken=False)
    found = {name: p for name, p in tuner.named_parameters() if "gamma" in name}
    assert {name: p.numel() for name, p in found.items()} == gammas
    assert all(torch.equal(p, torch.ones(len(p))) for p in found.values())
    assert tuner.describe_sites()[1] == f"{len(gammas)} outputs of transformer blocks' parts"


def test_which_weights():
    net = unet()
    bias = {name for name, _ in net.named_parameters() if name.endswith("bias")}
    norm = {name for name, _ in net.named_parameters() if "norm" in name}
    assert set(build(net, "bitfit").swapped) == bias
    assert set(build(net, "difffit").swapped) == bias | norm
    net = dit(tied=True)  # its norms have no weights; "norm1.linear" computes their scale and is none
    bias = {name for name, _ in net.named_parameters() if name.endswith("bias")}
    assert set(build(net, "difffit").swapped) == set(build(net, "bitfit").swapped) == bias
    blocks = build(net, "bitfit", layers=["blocks"]).swapped
    assert {name.split(".")[0] for name in blocks} == {"transformer_blocks"}
    assert not [name for name in blocks if "emb" in name]
    with pytest.raises(UsageError, match="layers=nowhere"):
        build(net, "bitfit", layers=["nowhere"])


def test_a_denoiser_without_transformer_blocks_has_nothing_to_scale():
    plain = unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None)
    with pytest.raises(DoesNotFit, match="has none"):
        build(plain, "difffit")


@every_net
@pytest.mark.parametrize("classes", [(), ("cats",)])
def test_totals_count_replaced_weights_once(net, classes):
    net = NETS[net]()
    if classes and not family_of(net).by_class:
        return
    base = sum(p.numel() for p in net.parameters())
    for method, added in (("full", 0), ("bitfit", 0), ("difffit", "gamma"), ("lora", "lora"), ("lokr", "lokr")):
        tuner = build(net, method, classes=classes)
        named = dict(tuner.named_parameters())
        more = sum(p.numel() for name, p in named.items() if (added and added in name) or "new_classes" in name)
        assert parameters(net, tuner)["total"] == base + more
        assert parameters(net, tuner)["trainable"] == sum(p.numel() for p in named.values())


@pytest.mark.parametrize("method", ["full", "bitfit", "difffit"])
def test_neither_conditions_nor_scales(method):
    net = unet()
    with pytest.raises(UsageError, match="no condition maps"):
        build(net, method, ("canny",))
    with pytest.raises(UsageError, match="no scale"), tuned(net, build(net, method), scales=0.5):
        pass


@pytest.mark.parametrize("method", ["full", "bitfit", "difffit"])
def test_weights_of_another_base_are_refused(method):
    net = unet()
    tuner = build(net, method)
    fewer, wider = copy.deepcopy(net), copy.deepcopy(net)
    fewer.conv_out.bias = None
    wider.conv_out.bias = torch.nn.Parameter(torch.zeros(9))
    for other in (fewer, wider):
        before = dict(other.named_parameters())
        with pytest.raises(SctoolError, match="another base"), tuned(other, tuner):
            pass
        assert all(p is before[name] for name, p in other.named_parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


def test_in_lower_precision_a_copy_is_independent_and_a_failed_call_leaves_the_weights_in():
    net = unet().to(torch.bfloat16)
    tuner = build(net, "difffit")
    model = TunedBackbone(net, tuner)
    out, twin = model(*inputs(net)), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.mul_(3)
    assert torch.equal(twin(*inputs(net)), out)
    assert not torch.equal(model(*inputs(net)), out)
    with pytest.raises(RuntimeError):
        net.conv_in(torch.zeros(1, 99, 8, 8, dtype=torch.bfloat16))
    assert net.conv_in.bias is tuner.get_parameter("conv_in.bias")
    model.attachment.detach()
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_full_owns_float32_copies_under_the_denoisers_names():
    net = unet().to(torch.bfloat16)
    tuner = build(net, "full", shaken=False)
    assert list(dict(tuner.named_parameters())) == list(dict(net.named_parameters()))
    assert {p.dtype for p in tuner.parameters()} == {torch.float32}
    model = TunedBackbone(net, tuner)
    assert model(*inputs(net)).dtype == torch.float32
    model.attachment.detach()
    assert net.dtype == torch.bfloat16
    assert tuner.describe_sites() == [f"all {sum(p.numel() for p in net.parameters()):,} weights"]


def test_tied_blocks_share_the_trained_weights():
    net = dit(tied=True)
    tuner = build(net, "bitfit")
    assert not [name for name in tuner.swapped if name.startswith("transformer_blocks.1.norm1.emb")]
    with tuned(net, tuner):
        first, second = (block.norm1.emb.timestep_embedder.linear_1.bias for block in net.transformer_blocks)
        assert first is second
        assert first is tuner.get_parameter("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.bias")
    untied = dit()
    assert len(build(untied, "bitfit").swapped) == len(tuner.swapped) + 2
    with pytest.raises(SctoolError, match="another base"), tuned(untied, tuner):
        pass


def test_of_two_that_replace_a_weight_the_last_is_used_and_the_base_comes_back():
    net = unet()
    base, originals = base_output(net), list(net.parameters())
    for first, second in itertools.permutations([build(net, "full"), build(net, "bitfit")]):
        with tuned(net, first, second):
            assert net.conv_in.bias is second.get_parameter("conv_in.bias")
        assert all(p is original for p, original in zip(net.parameters(), originals, strict=True))
        assert torch.equal(base_output(net), base)
