"""What every method must hold, for every row of the table: a new row is covered without a new test."""

import copy
import subprocess
import sys
import types

import pytest
import torch

from sctool.core.backbones.families import family_of_denoiser
from sctool.core.checkpoint import load_tuner, save_tuner
from sctool.core.errors import SctoolError, UsageError
from sctool.core.sites.attaching import TunedBackbone, tuned
from sctool.core.sites.wiring import Wiring
from sctool.core.tuners import TUNERS, method_config, tuner_class

from ..tiny import unet

CASES = [
    pytest.param(method, conditions, id=method + "-".join(("", *conditions)))
    for method, row in TUNERS.items()
    for conditions in ((), *((("canny",), ("canny", "color")) if row.takes_conditions else ()))
]
every_method = pytest.mark.parametrize(("method", "conditions"), CASES)


def build(net, method, conditions, shaken=True, **settings):
    torch.manual_seed(1)
    tuner = tuner_class(method).build(method_config(method, settings), net, conditions, vae_scale=4)
    if shaken:
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return tuner


def inputs(conditions):
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = {"prompt_embeds": torch.randn(2, 3, 8, generator=generator)}
    hints = {name: torch.rand(2, 3, 32, 32, generator=generator) for name in conditions}
    return latents, torch.tensor([3, 7]), text, hints or None


def base_output(net, conditions):
    latents, t, text, _ = inputs(conditions)
    return net(latents, t, text["prompt_embeds"]).sample


@every_method
def test_starts_at_the_identity(method, conditions):
    net = unet()
    base = base_output(net, conditions)
    model = TunedBackbone(net, build(net, method, conditions, shaken=False))
    assert torch.equal(model(*inputs(conditions)), base)


@every_method
def test_gradients_reach_every_tuner_weight_and_no_other(method, conditions):
    net = unet()
    frozen = list(net.parameters())
    tuner = build(net, method, conditions)
    TunedBackbone(net, tuner)(*inputs(conditions)).square().mean().backward()
    assert [name for name, p in tuner.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in frozen)
    assert all(p.dtype == torch.float32 for p in tuner.parameters())


@every_method
def test_detaching_restores_the_base_bit_for_bit(method, conditions):
    net = unet()
    state, parameters, base = copy.deepcopy(net.state_dict()), list(net.parameters()), base_output(net, conditions)
    tuner = build(net, method, conditions)
    model = TunedBackbone(net, tuner)
    model(*inputs(conditions)).mean().backward()
    torch.optim.SGD(tuner.parameters(), 0.1).step()
    model.attachment.detach()
    assert torch.equal(base_output(net, conditions), base)
    assert all(new is old for new, old in zip(net.parameters(), parameters, strict=True))
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


@every_method
def test_a_saved_tuner_is_the_same_tuner(method, conditions, tmp_path):
    net = unet()
    tuner = build(net, method, conditions)
    family = family_of_denoiser(net.config)
    backbone = types.SimpleNamespace(id="tiny", hash="0" * 64, family=family, licence="none", denoiser=net)
    save_tuner(tmp_path, tuner, backbone)
    again = load_tuner(tmp_path, backbone)
    assert (again.method, again.config, again.conditions) == (tuner.method, tuner.config, tuner.conditions)
    with tuned(net, tuner):
        expected = family.predict(net, *inputs(conditions))
    with tuned(net, again):
        assert torch.equal(family.predict(net, *inputs(conditions)), expected)
    for name, value in tuner.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@every_method
def test_a_deep_copy_is_independent(method, conditions):
    net = unet()
    model = TunedBackbone(net, build(net, method, conditions))
    out = model(*inputs(conditions))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.tuners.parameters():
            parameter.mul_(3)
    assert torch.equal(twin(*inputs(conditions)), out)
    assert not torch.equal(model(*inputs(conditions)), out)


@every_method
def test_gradient_checkpointing_changes_nothing(method, conditions):
    net = unet()
    tuner = build(net, method, conditions)
    model, grads = TunedBackbone(net, tuner).train(), []
    for checkpointing in (False, True):
        tuner.zero_grad()
        if checkpointing:
            net.enable_gradient_checkpointing()
        model(*inputs(conditions)).square().mean().backward()
        grads.append([p.grad.clone() for p in tuner.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


# As small as a U-Net can be: the compiler's time is the test's.
SMALLEST = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "conditions"), [case for case in CASES if len(case.values[1]) != 1])
def test_compiles(method, conditions):
    net = unet(**SMALLEST)
    tuner = build(net, method, conditions)
    model = TunedBackbone(net, tuner)
    arguments = inputs(conditions)
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
    latents, t, text, hints = inputs(("canny",))
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
def test_attaching_twice_is_an_error(method, conditions):
    net = unet()
    tuner = build(net, method, conditions)
    with tuned(net, tuner), pytest.raises(SctoolError, match="already attached"), tuned(net, tuner):
        pass


def test_methods_stack():
    net = unet()
    full, skips = build(net, "full", ()), build(net, "scedit", ())
    base = base_output(net, ())
    outs = []
    for order in ((full, skips), (skips, full)):
        with tuned(net, *order):
            outs.append(base_output(net, ()))
    assert torch.equal(*outs)
    assert torch.equal(base_output(net, ()), base)


def test_full_owns_float32_copies_under_the_denoisers_names():
    net = unet().to(torch.bfloat16)
    tuner = build(net, "full", (), shaken=False)
    assert tuner_class("full").build(method_config("full", {}), net, (), 4).vae_scale == 4
    assert list(dict(tuner.named_parameters())) == list(dict(net.named_parameters()))
    assert {p.dtype for p in tuner.parameters()} == {torch.float32}
    model = TunedBackbone(net, tuner)
    assert model(*inputs(())).dtype == torch.float32
    model.attachment.detach()
    assert net.dtype == torch.bfloat16


def test_full_takes_neither_conditions_nor_scales():
    net = unet()
    with pytest.raises(UsageError, match="no condition maps"):
        build(net, "full", ("canny",))
    with pytest.raises(UsageError, match="no scale"), tuned(net, build(net, "full", ()), scales=0.5):
        pass


def test_full_weights_of_another_base_are_refused():
    net = unet()
    tuner = build(net, "full", ())
    fewer, wider = copy.deepcopy(net), copy.deepcopy(net)
    fewer.conv_out.bias = None
    wider.conv_out.bias = torch.nn.Parameter(torch.zeros(9))
    for other in (fewer, wider):
        before = dict(other.named_parameters())
        with pytest.raises(SctoolError, match="another base"), tuned(other, tuner):
            pass
        assert all(p is before[name] for name, p in other.named_parameters())
    assert tuner.describe_sites() == [f"all {sum(p.numel() for p in net.parameters()):,} weights"]


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
