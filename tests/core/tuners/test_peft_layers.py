"""LoRA, DoRA and LoKr against peft's own injection into the denoiser."""

import copy

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from sctool.core.backbones.families import family_of_denoiser
from sctool.core.errors import SctoolError, UsageError
from sctool.core.sites.attaching import TunedBackbone, tuned
from sctool.core.tuners import method_config, tuner_class

from ..tiny import dit, unet
from .test_tuners import base_output, build, inputs

METHODS = {
    "lora": ({"rank": 4, "alpha": 8}, lambda **more: peft.LoraConfig(r=4, lora_alpha=8, **more)),
    "dora": ({"rank": 4, "alpha": 8}, lambda **more: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, **more)),
    "lokr": ({"rank": 2, "alpha": 4}, lambda **more: peft.LoKrConfig(r=2, alpha=4, **more)),
}
every_method = pytest.mark.parametrize("method", METHODS)
LAYERS = {"unet": (["attention"], ["down_blocks"], None), "dit": (["attention"], ["whole"], None)}
NETS = {"unet": unet, "dit": lambda: dit(tied=True)}


def shaken(tuner):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return tuner


def injected(net, method, tuner, seed=1):
    """A copy of the denoiser with peft's layers in it, on the same layers, and its adapters by name."""
    twin = copy.deepcopy(net)
    names = [site.name for site in tuner.sites]
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(METHODS[method][1](target_modules=names), twin)
    return twin, {name: p for name, p in twin.named_parameters() if ".default" in name}


def fill(theirs, tuner):
    with torch.no_grad():
        for name, value in tuner.state_dict().items():
            theirs[name].copy_(value)


@every_method
@pytest.mark.parametrize(("name", "layers"), [(name, layers) for name, all_ in LAYERS.items() for layers in all_])
def test_as_peft_itself(name, layers, method):
    net = NETS[name]()
    tuner = build(net, method, shaken=False, layers=layers, **METHODS[method][0])
    twin, theirs = injected(net, method, tuner)
    own = tuner.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[key], theirs[key]) for key in own), "the same weights for the same seed"
    fill(theirs, shaken(tuner))
    model = TunedBackbone(net, tuner)
    out, expected = model(*inputs(net)), base_output(twin)
    assert not torch.allclose(out, base_output(NETS[name]()), atol=1e-2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    out.square().mean().backward()
    expected.square().mean().backward()
    for key, parameter in tuner.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-4, atol=1e-6)


@every_method
@pytest.mark.parametrize("autocast", [False, True])
def test_as_peft_itself_in_lower_precision(method, autocast):
    net = unet().to(torch.bfloat16)
    tuner = shaken(build(net, method, shaken=False, **METHODS[method][0]))
    assert {p.dtype for p in tuner.parameters()} == {torch.float32}
    twin, theirs = injected(net, method, tuner)
    for module in twin.modules():
        if isinstance(module, BaseTunerLayer):
            peft.tuners.tuners_utils.cast_adapter_dtype(module, "default")
    theirs = {name: p for name, p in twin.named_parameters() if ".default" in name}
    fill(theirs, tuner)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad(), tuned(net, tuner):
        out, expected = base_output(net), base_output(twin)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("method", ["lora", "lokr"])
def test_a_scale_is_pefts(method):
    net = unet()
    tuner = shaken(build(net, method, shaken=False, **METHODS[method][0]))
    twin, theirs = injected(net, method, tuner)
    fill(theirs, tuner)
    for module in twin.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale("default", -0.5)
    with tuned(net, tuner, scales=-0.5):
        torch.testing.assert_close(base_output(net), base_output(twin), rtol=1e-5, atol=1e-6)


@every_method
def test_of_one_layer_a_scale_is_linear_and_two_tuners_add_up(method):
    net = unet()
    base = base_output(net)
    one, other = (shaken(build(net, method, layers=["conv_out"], rank=rank)) for rank in (2, 3))
    with tuned(net, one):
        first = base_output(net) - base
    with tuned(net, other):
        second = base_output(net) - base
    with tuned(net, one, scales=0.3):
        torch.testing.assert_close(base_output(net), base + 0.3 * first)
    for order in ((one, other), (other, one)):
        with tuned(net, *order):
            torch.testing.assert_close(base_output(net), base + first + second)
    assert torch.equal(base_output(net), base)


def test_tuners_may_come_off_in_any_order():
    net = unet()
    base = base_output(net)
    one, other = shaken(build(net, "lora")), shaken(build(net, "dora"))
    with tuned(net, other):
        expected = base_output(net)
    parts = one.attach(net), other.attach(net)
    parts[0].remove()
    assert torch.equal(base_output(net), expected)
    parts[1].remove()
    assert torch.equal(base_output(net), base)


def test_dora_reads_the_weights_that_are_there():
    net = unet()
    dora, full = shaken(build(net, "dora")), build(net, "full")
    changed = copy.deepcopy(net)
    changed.load_state_dict(full.state_dict())
    with tuned(changed, dora):
        expected = base_output(changed)
    for order in ((dora, full), (full, dora)):
        with tuned(net, *order):
            torch.testing.assert_close(base_output(net), expected)


@every_method
def test_what_a_dry_run_measures_and_prints(method):
    """A plan's activations are counted on copies on the meta device."""
    net = unet()
    tuner = build(net, method)
    assert tuner.describe_sites()[0].startswith(f"{len(tuner.sites)} layers, down_blocks.0.")
    assert build(net, method, layers=["conv_out"]).describe_sites() == ["conv_out (8 to 4)"]
    model = TunedBackbone(*(copy.deepcopy(module).to("meta") for module in (net, tuner)))
    latents, t, rows, _ = inputs(net)
    out = model(latents.to("meta"), t.to("meta"), {name: row.to("meta") for name, row in rows.items()})
    assert out.is_meta
    assert all(p.is_meta for p in model.parameters())


@every_method
def test_the_same_adapters_for_any_precision_and_shapes_without_storage(method):
    settings = METHODS[method][0]
    plain, lower = (build(unet().to(dtype), method, shaken=False, **settings) for dtype in (None, torch.bfloat16))
    meta = build(unet().to("meta"), method, shaken=False, **settings)
    for name, value in plain.state_dict().items():
        assert meta.get_parameter(name).is_meta
        assert meta.get_parameter(name).shape == value.shape
        if "magnitude" not in name:  # norms of the base's weights, which bf16 rounds
            assert torch.equal(lower.get_parameter(name), value)


def test_the_tuner_holds_no_weights_of_the_base_and_draws_nothing_later():
    net = unet()
    tuner = build(net, "lokr", layers=["whole"])
    theirs = {id(module) for module in net.modules()}
    assert not theirs & {id(m) for layer in tuner.adapted.values() for m in layer.modules()}
    assert not any(hasattr(layer, "base_layer") for layer in tuner.adapted.values())
    model = TunedBackbone(net, tuner).train()
    before = torch.get_rng_state()
    model(*inputs(net))
    assert torch.equal(torch.get_rng_state(), before)


def test_another_base_is_refused():
    tuner = build(unet(), "lora", layers=["conv_out"])
    wider = unet(out_channels=8)
    with pytest.raises(SctoolError, match="another base"), tuned(wider, tuner):
        pass
    assert not any(module._forward_hooks for module in wider.modules())
    with tuned(unet(), tuner):
        pass


def test_layers_that_are_not_there_and_conditions_are_refused():
    net = unet()
    with pytest.raises(UsageError, match=r"layers=to_x: no linear .* Parts of this base: down_blocks"):
        build(net, "lora", layers=["to_x"])
    with pytest.raises(UsageError, match="no condition maps"):
        build(net, "dora", ("canny",))
    with pytest.raises(UsageError, match="decompose_factor=-2"):
        method_config("lokr", {"decompose_factor": -2})


def test_kronecker_factors():
    net, kind = unet(), tuner_class("lokr")
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name, settings in {
        "plain": {"rank": 2}, "factor": {"rank": 2, "decompose_factor": 2}, "both": {"rank": 1, "decompose_both": True},
    }.items():  # fmt: skip
        tuner = kind.build(method_config("lokr", {**settings, "layers": [r"down_blocks.0.*attn1\.to_q"]}), net)
        shapes[name] = [tuple(value.shape) for value in tuner.state_dict().values()]
    assert shapes == {"plain": [(2, 2), (4, 4)], "factor": [(2, 2), (4, 4)], "both": [(2, 2), (4, 1), (1, 4)]}


def test_attention_is_the_default():
    names = [site.name for site in build(unet(), "lora").sites]
    assert names
    assert all(".attn" in name for name in names)
    assert family_of_denoiser(unet().config).parts["attention"]
