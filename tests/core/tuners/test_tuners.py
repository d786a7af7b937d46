"""What every method must hold, for every row of the table: a new row is covered without a new test."""

import copy
import functools
import itertools
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

from sctool.core.checkpoint import load_tuner, save_tuner
from sctool.core.errors import DoesNotFit, SctoolError, UsageError
from sctool.core.sites.attaching import TunedBackbone, channel, tuned
from sctool.core.sites.parts import family_of
from sctool.core.sites.wiring import Wiring
from sctool.core.tuners import TUNERS, method_config, tuner_class

from ..tiny import dit, unet

DEEP = functools.partial(unet, layers_per_block=2, block_out_channels=(20, 40))
"""diffusers' ControlNet-XS is of U-Nets with two layers per block."""
NETS = {"unet": unet, "deep": DEEP, "dit": functools.partial(dit, tied=True)}
CONTROLS = {
    "none": [()],
    "optional": [(), ("canny",), ("canny", "color")],
    "required": [("canny",), ("canny", "color")],
}
UNETS_ONLY = {"scedit", "controlnet", "t2i-adapter", "controlnet-xs", "uni-controlnet", "elr", "controllora"}
"""Methods that act on what a DiT does not have, such as skip connections."""
CASES = [
    pytest.param(
        "deep" if method == "controlnet-xs" else "unet", method, conditions, (), id="-".join((method, *conditions))
    )
    for method, row in TUNERS.items()
    for conditions in CONTROLS[row.control]
] + [
    pytest.param("dit", method, (), classes, id="-".join(("dit", method, *classes)))
    for method in TUNERS
    if method not in UNETS_ONLY
    for classes in ((), ("cats", "dogs"))
]
every_method = pytest.mark.parametrize(("net", "method", "conditions", "classes"), CASES)


def build(net, method, conditions=(), classes=(), shaken=True, **settings) -> Any:
    torch.manual_seed(1)
    config = method_config(method, settings)
    tuner = tuner_class(method).build(config, net, conditions, vae_scale=4, classes=classes)
    if shaken:
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return tuner


def inputs(net, conditions=(), classes=()):
    """Latents, timesteps, rows and hints for `net`; rows of a DiT: a class of the base, the null class, new ones."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(4, 3, 8, generator=generator)
    latents = torch.randn(4, 4, 8, 8, generator=generator)
    hints = {name: torch.rand(4, 3, 32, 32, generator=generator) for name in conditions}
    labels = torch.tensor([1, 3, 4, 5] if classes else [0, 1, 2, 3])
    rows = {"label": labels} if family_of(net).by_class else {"prompt_embeds": text}
    return latents, torch.tensor([3, 7, 500, 999]), rows, hints or None


def base_output(net, conditions=(), classes=()):
    latents, t, rows, _ = inputs(net, conditions, classes)
    return family_of(net).output(net, latents, t, rows)


@every_method
def test_starts_at_the_identity(net, method, conditions, classes):
    net = NETS[net]()
    base = base_output(net, conditions, classes)
    model = TunedBackbone(net, build(net, method, conditions, classes, shaken=False))
    assert torch.equal(model(*inputs(net, conditions, classes)), base)


@every_method
def test_gradients_reach_every_tuner_weight_and_no_other(net, method, conditions, classes):
    net = NETS[net]()
    frozen = list(net.parameters())
    tuner = build(net, method, conditions, classes)
    TunedBackbone(net, tuner)(*inputs(net, conditions, classes)).square().mean().backward()
    assert [name for name, p in tuner.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in frozen)
    assert all(p.dtype == torch.float32 for p in tuner.parameters())


@every_method
def test_detaching_restores_the_base_bit_for_bit(net, method, conditions, classes):
    net = NETS[net]()
    state, parameters, base = (
        copy.deepcopy(net.state_dict()),
        list(net.parameters()),
        base_output(net, conditions, classes),
    )
    tuner = build(net, method, conditions, classes)
    model = TunedBackbone(net, tuner)
    model(*inputs(net, conditions, classes)).mean().backward()
    torch.optim.SGD(tuner.parameters(), 0.1).step()
    model.attachment.detach()
    assert torch.equal(base_output(net, conditions, classes), base)
    assert all(new is old for new, old in zip(net.parameters(), parameters, strict=True))
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


@every_method
def test_a_saved_tuner_is_the_same_tuner(net, method, conditions, classes, tmp_path):
    net = NETS[net]()
    tuner = build(net, method, conditions, classes)
    family = family_of(net)
    backbone = types.SimpleNamespace(id="tiny", hash="0" * 64, family=family, licence="none", denoiser=net)
    save_tuner(tmp_path, tuner, backbone)
    again = load_tuner(tmp_path, backbone)
    assert (again.method, again.config, again.conditions) == (tuner.method, tuner.config, tuner.conditions)
    with tuned(net, tuner):
        expected = family.predict(net, *inputs(net, conditions, classes))
    with tuned(net, again):
        assert torch.equal(family.predict(net, *inputs(net, conditions, classes)), expected)
    for name, value in tuner.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@every_method
def test_a_deep_copy_is_independent(net, method, conditions, classes):
    net = NETS[net]()
    model = TunedBackbone(net, build(net, method, conditions, classes))
    out = model(*inputs(net, conditions, classes))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.tuners.parameters():
            parameter.mul_(3)
    assert torch.equal(twin(*inputs(net, conditions, classes)), out)
    assert not torch.equal(model(*inputs(net, conditions, classes)), out)


@every_method
def test_gradient_checkpointing_changes_nothing(net, method, conditions, classes):
    net = NETS[net]()
    tuner = build(net, method, conditions, classes)
    model, grads = TunedBackbone(net, tuner).train(), []
    for checkpointing in (False, True):
        tuner.zero_grad()
        if checkpointing:
            net.enable_gradient_checkpointing()
        model(*inputs(net, conditions, classes)).square().mean().backward()
        grads.append([p.grad.clone() for p in tuner.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


# As small as a U-Net with attention can be: the compiler's time is the test's.
SMALLEST = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "conditions"),
    [
        pytest.param(*case.values[1:3], id=case.id)
        for case in CASES
        if case.values[0] != "dit" and len(case.values[2]) != 1
    ],
)
def test_compiles(method, conditions):
    whole = {"mid_block_type": "UNetMidBlock2DCrossAttn"} if method.startswith("controlnet") else {}
    net = unet(**SMALLEST | whole | ({"layers_per_block": 2} if method == "controlnet-xs" else {}))
    tuner = build(net, method, conditions)
    model = TunedBackbone(net, tuner)
    arguments = inputs(net, conditions)
    model(*arguments).square().mean().backward()
    grads = [p.grad.clone() for p in tuner.parameters()]
    tuner.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    out = compiled(*arguments)
    torch.testing.assert_close(out, model(*arguments))
    out.square().mean().backward()
    for p, grad in zip(tuner.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_sampler_encodes_the_hint_once():
    net = unet(**SMALLEST)
    latents, t, text, hints = inputs(net, ("canny",))
    with torch.no_grad(), tuned(net, build(net, "scedit", ("canny",))):
        channel = {"cross_attention_kwargs": {"hint": hints}}
        expected = net(latents, t, text["prompt_embeds"], **channel).sample
        before = Wiring.of(net).encodings
        torch._dynamo.reset()
        net.compile(backend="aot_eager")
        for _ in range(3):
            torch.testing.assert_close(net(latents, t, text["prompt_embeds"], **channel).sample, expected)
        assert Wiring.of(net).encodings == before
    torch._dynamo.reset()


@every_method
def test_attaching_twice_is_an_error(net, method, conditions, classes):
    net = NETS[net]()
    tuner = build(net, method, conditions, classes)
    with tuned(net, tuner), pytest.raises(SctoolError, match="already attached"), tuned(net, tuner):
        pass


NEEDED = {method: CONTROLS[row.control][0] for method, row in TUNERS.items()}
"""The conditions that a method cannot do without."""
REPLACING = {"full", "bitfit", "difffit"}
PAIRS = [pair for pair in itertools.combinations(TUNERS, 2) if not REPLACING.issuperset(pair)]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_methods_stack_in_any_order(pair):
    net = DEEP() if "controlnet-xs" in pair else unet()
    one, other = (build(net, method, NEEDED[method]) for method in pair)
    base = base_output(net)
    outs = []
    for order in ((one,), (other,), (one, other), (other, one)):
        with tuned(net, *order):
            latents, t, rows, hints = inputs(net, {name for tuner in order for name in tuner.conditions})
            outs.append(family_of(net).output(net, latents, t, rows, channel(hints)))
        assert torch.equal(base_output(net), base)
    torch.testing.assert_close(outs[2], outs[3])
    assert not torch.allclose(outs[2], outs[0], atol=1e-3)
    assert not torch.allclose(outs[2], outs[1], atol=1e-3)


def test_skip_connections_are_not_to_be_had_everywhere():
    with pytest.raises(DoesNotFit):
        build(dit(), "scedit")


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'scedit'"):
        tuner_class("scedti")
    with pytest.raises(UsageError, match="Did you mean 'ratio'"):
        method_config("scedit", {"ration": 0.1})
    with pytest.raises(UsageError, match="ratio=-1"):
        method_config("scedit", {"ratio": -1})


def test_the_table_imports_no_torch():
    code = "import sys; from sctool.core import checkpoint, counting, tuners; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
