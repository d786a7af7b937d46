"""Layers, the middle block, condition columns and class rows: each against an independent restatement."""

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel
from peft import LoraConfig
from torch import nn

from sctool.core.backbones.upsampling import PhaseUpsample2D, fold_upsampling
from sctool.core.errors import SctoolError, UsageError
from sctool.core.resolving import Config
from sctool.core.sites.attaching import TunedBackbone, tuned
from sctool.core.sites.inputs import class_tables, input_layer
from sctool.core.sites.layers import layer_site, layers
from sctool.core.sites.skips import middle, skips
from sctool.core.sites.wiring import Wiring
from sctool.core.tuners.base import SiteTuner

from ..tiny import unet


class NoSettings(Config):
    """None."""


class LowRank(SiteTuner):
    """y + U D x on linear layers, as LoRA of rank 2 and scale 1."""

    method = "low-rank"

    def __init__(self, sites):
        super().__init__(NoSettings(), sites)
        self.down = nn.ModuleList(nn.Linear(site.inputs, 2, bias=False) for site in sites)
        self.up = nn.ModuleList(nn.Linear(2, site.outputs, bias=False) for site in sites)

    def delta(self, site, x, call):
        number = self.sites.index(site)
        return self.up[number](self.down[number](call.given))


class Adding(SiteTuner):
    """A constant at each site."""

    method = "adding"

    def __init__(self, *sites, value=1.0):
        super().__init__(NoSettings(), sites)
        self.value = nn.Parameter(torch.tensor(value))

    def delta(self, site, x, call):
        return self.value.expand_as(x)


class Columns(SiteTuner):
    """W_c c at the input layer: the hint, brought to the latents' grid, through columns of its own."""

    method = "columns"

    def __init__(self, denoiser, *conditions):
        site = input_layer(denoiser)
        super().__init__(NoSettings(), [site], conditions, 4)
        self.columns = nn.ModuleDict(
            {
                name: nn.Conv2d(3, site.outputs, site.kernel, site.stride, site.padding, bias=False)
                for name in conditions
            }
        )

    def encode(self, hints, inputs=None):
        return {name: nn.functional.avg_pool2d(hint, 4) for name, hint in hints.items()}

    def delta(self, site, x, call):
        if not call.features:
            return None
        return sum(call.alphas[name] * self.columns[name](hint) for name, hint in call.features.items())


class Rows(SiteTuner):
    """Two further classes."""

    method = "rows"

    def __init__(self, sites):
        super().__init__(NoSettings(), sites)
        self.rows = nn.Parameter(torch.randn(2, sites[0].width))

    def delta(self, site, x, call):
        own = call.given >= site.rows
        new = self.rows[(call.given - site.rows).clamp(min=0)]
        return torch.where(own[:, None], new - x, torch.zeros_like(x))


class Reading(SiteTuner):
    """The timestep, added at the middle block, with the text's mean and the latents' mean."""

    method = "reading"
    reads_inputs = True

    def __init__(self, denoiser, *conditions):
        super().__init__(NoSettings(), [middle(denoiser), *skips(denoiser)[:1]], conditions, 4)
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []

    def encode(self, hints, inputs=None):
        self.seen.append({name: len(hint) for name, hint in hints.items()})
        text = inputs.conditioning["encoder_hidden_states"].mean((1, 2)) + inputs.latents.mean((1, 2, 3))
        return {name: inputs.timestep.float() / 1000 + text + hint.mean((1, 2, 3)) for name, hint in hints.items()}

    def delta(self, site, x, call):
        if not call.features:
            return None
        (value,) = call.features.values()
        return (self.weight * value)[:, None, None, None].expand_as(x)


def dit():
    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=5,
    )  # fmt: skip
    return net.requires_grad_(False).eval()


LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
STEPS = torch.tensor([3, 700])


def call(net, **kwargs):
    return net(LATENTS, STEPS, TEXT, return_dict=False, **kwargs)[0]


def hint(seed=0, batch=1):
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------- layers


def test_layers_are_chosen_by_name_on_the_meta_device_too():
    chosen = layers(unet(), r"attn1\.to_[qv]$")
    assert {site.name.rpartition(".")[2] for site in chosen} == {"to_q", "to_v"}
    assert len(chosen) == len(layers(unet().to("meta"), r"attn1\.to_[qv]$")) == 8
    assert len(layers(unet())) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in unet().modules())
    with pytest.raises(UsageError, match="no linear or convolutional layer"):
        layers(unet(), "nowhere")
    with pytest.raises(UsageError, match="not a valid regular expression"):
        layers(unet(), "(")


def test_a_layer_site_has_the_layers_geometry():
    convolution = layer_site("c", nn.Conv2d(3, 5, (3, 1), stride=2, padding=(1, 0)))
    assert (convolution.inputs, convolution.outputs, convolution.linear) == (3, 5, False)
    assert (convolution.kernel, convolution.stride, convolution.padding) == ((3, 1), (2, 2), (1, 0))
    linear = layer_site("l", nn.Linear(3, 5))
    assert (linear.inputs, linear.outputs, linear.linear) == (3, 5, True)
    assert (linear.kernel, linear.stride, linear.padding) == ((1, 1), (1, 1), (0, 0))


def test_a_low_rank_tuner_on_layers_equals_pefts_lora():
    net, pattern = unet(), r".*attn[12]\.to_[qv]$"
    tuner = LowRank(layers(net, pattern))
    reference = copy.deepcopy(net)
    reference.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=pattern))
    for site, down, up in zip(tuner.sites, tuner.down, tuner.up, strict=True):
        lora = reference.get_submodule(site.name)
        with torch.no_grad():
            lora.lora_A["default"].weight.copy_(down.weight)
            lora.lora_B["default"].weight.copy_(up.weight)
    with tuned(net, tuner, scales=0.5):
        half = call(net)
    with tuned(net, tuner):
        out = call(net)
    torch.testing.assert_close(out, call(reference))
    assert not torch.equal(half, out)
    out.square().sum().backward()
    call(reference).square().sum().backward()
    for site, down in zip(tuner.sites, tuner.down, strict=True):
        torch.testing.assert_close(down.weight.grad, reference.get_submodule(site.name).lora_A["default"].weight.grad)


def test_tuners_on_one_layer_see_the_same_unedited_value():
    net = unet()
    sites = layers(net, r"mid_block.*attn1\.to_out\.0")
    low, constant = LowRank(sites), Adding(*sites)
    seen = []
    constant.delta = lambda site, x, call: seen.append(x.clone()) or torch.ones_like(x)
    with tuned(net, low, constant):
        assert len(net.get_submodule(sites[0].name)._forward_hooks) == 1
        both = call(net)
    with tuned(net, constant, low):
        torch.testing.assert_close(call(net), both)
    assert torch.equal(*seen)


def test_detaching_one_of_two_tuners_leaves_the_other():
    net = unet()
    base, low, constant = call(net), LowRank(layers(net, "attn1.to_q")), Adding(middle(net))
    with tuned(net, low):
        alone = call(net)
        with tuned(net, constant):
            assert not torch.equal(call(net), alone)
        assert torch.equal(call(net), alone)
    assert torch.equal(call(net), base)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_hooked_convolution_is_never_folded_and_a_folded_one_never_hooked():
    net = unet()
    sites = layers(net, r"upsamplers\.0\.conv")
    model = TunedBackbone(net, Adding(*sites))
    before = model(LATENTS, STEPS, {"prompt_embeds": TEXT})
    assert len(fold_upsampling(net).done) == 0
    assert torch.equal(model(LATENTS, STEPS, {"prompt_embeds": TEXT}), before)
    model.attachment.detach()
    assert len(fold_upsampling(net).done) == 1
    with pytest.raises(SctoolError, match="attach before folding"), tuned(net, Adding(*sites)):
        pass
    assert not net._forward_pre_hooks
    assert any(isinstance(module, PhaseUpsample2D) for module in net.modules())


def test_an_unknown_layer_attaches_nothing():
    net = unet()
    (site,) = layers(net, "conv_out")
    wrong = Adding(type(site)("nowhere", 1, 1))
    with pytest.raises(SctoolError, match="has no nowhere"), tuned(net, wrong):
        pass
    assert not net._forward_pre_hooks


# ------------------------------------------------------------------------------------------------- middle, inputs


def test_the_middle_block_is_a_site():
    net = unet()
    with tuned(net, Adding(middle(net), value=2.0), scales=0.25):
        out = call(net)
    handle = net.mid_block.register_forward_hook(lambda _, args, output: output + 0.5)
    torch.testing.assert_close(out, call(net))
    handle.remove()
    with pytest.raises(SctoolError, match="no middle block"):
        middle(nn.Linear(2, 2))


def test_condition_columns_equal_a_widened_first_layer():
    net = unet()
    tuner = Columns(net, "canny")
    wide = copy.deepcopy(net)
    wide.conv_in = nn.Conv2d(7, 8, 3, padding=1)
    wide.conv_in.weight.data = torch.cat([net.conv_in.weight, tuner.columns["canny"].weight.detach()], 1)
    wide.conv_in.bias.data = net.conv_in.bias.data
    c = nn.functional.avg_pool2d(hint(), 4).expand(2, -1, -1, -1)
    expected = wide(torch.cat([LATENTS, c], 1), STEPS, TEXT, return_dict=False)[0]
    base = call(net)
    with tuned(net, tuner):
        torch.testing.assert_close(call(net, cross_attention_kwargs={"hint": {"canny": hint()}}), expected)
        assert torch.equal(call(net), base)
    assert input_layer(dit()).name == "pos_embed.proj"
    with pytest.raises(SctoolError, match="none of the input layers"):
        input_layer(nn.Linear(2, 2))


def test_class_rows_extend_the_table_of_a_transformer():
    net = dit()
    sites = class_tables(net)
    assert [(site.rows, site.width) for site in sites] == [(6, 8), (6, 8)]
    tuner = Rows(sites)
    wide = copy.deepcopy(net)
    for site in sites:
        table = wide.get_submodule(site.name)
        table.weight = nn.Parameter(torch.cat([table.weight, tuner.rows.detach()]))
    labels = torch.tensor([7, 2])
    expected = wide(LATENTS, STEPS, labels, return_dict=False)[0]
    with tuned(net, tuner):
        out = net(LATENTS, STEPS, labels, return_dict=False)[0]
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    grad = tuner.rows.grad
    assert grad is not None
    assert [bool(row.any()) for row in grad] == [False, True]
    with pytest.raises(IndexError):
        net(LATENTS, STEPS, labels)
    with pytest.raises(SctoolError, match="no class table"):
        class_tables(unet())


def test_the_first_further_class_is_the_one_after_the_tables_last():
    net = dit()
    tuner = Rows(class_tables(net))
    wide = copy.deepcopy(net)
    for site in class_tables(net):
        table = wide.get_submodule(site.name)
        table.weight = nn.Parameter(torch.cat([table.weight, tuner.rows.detach()]))
    labels = torch.tensor([6, 5])
    with tuned(net, tuner):
        out = net(LATENTS, STEPS, labels, return_dict=False)[0]
    torch.testing.assert_close(out, wide(LATENTS, STEPS, labels, return_dict=False)[0])


def test_ids_beyond_the_table_read_its_last_row_before_they_are_edited():
    net = dit()
    with tuned(net, Adding(*class_tables(net), value=0.0)):
        outs = [net(LATENTS, STEPS, torch.tensor([label, 2]), return_dict=False)[0] for label in (5, 6, 9)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_conditions_share_one_weight_unless_a_tuner_says_otherwise():
    net = unet()
    tuner = Columns(net, "canny", "color")
    assert (tuner.weights, tuner.normalize) == ({}, True)
    first, second = ({"hint": {name: hint()}} for name in ("canny", "color"))
    both = {"hint": {"canny": hint(), "color": hint()}}
    tuner.columns["color"] = tuner.columns["canny"]
    with tuned(net, tuner):
        one, other, together = (call(net, cross_attention_kwargs=given) for given in (first, second, both))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(together, one, msg="half of each, not the sum")


def test_class_rows_leave_no_hook_and_no_ids_behind():
    net = dit()
    tuner = Rows(class_tables(net))
    labels = torch.tensor([1, 5])
    before = net(LATENTS, STEPS, labels, return_dict=False)[0]
    with tuned(net, tuner):
        known = net(LATENTS, STEPS, labels, return_dict=False)[0]
    assert torch.equal(known, before), "ids within the table read its own rows"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# ------------------------------------------------------------------------------------------------ reading inputs


def test_a_tuner_that_reads_inputs_is_asked_at_every_step():
    net = unet()
    tuner = Reading(net, "canny")
    channel = {"cross_attention_kwargs": {"hint": {"canny": hint()}}}
    with torch.no_grad(), tuned(net, tuner):
        out = call(net, **channel)
        call(net, **channel)
        call(net)
        assert tuner.seen == [{"canny": 1}, {"canny": 1}, {}]
        assert Wiring.of(net).encodings == 0
        later = net(LATENTS, STEPS + 200, TEXT, return_dict=False, **channel)[0]
        keywords = net(sample=LATENTS, timestep=STEPS, encoder_hidden_states=TEXT, return_dict=False, **channel)[0]
    assert not torch.equal(later, out)
    assert torch.equal(keywords, out)
    value = (STEPS / 1000 + TEXT.mean((1, 2)) + LATENTS.mean((1, 2, 3)) + hint().mean())[:, None, None, None]
    handles = [net.mid_block.register_forward_hook(lambda _, args, output: output + value)]
    first = skips(net)[0]

    def edit(_, args, kwargs):
        states = list(kwargs["res_hidden_states_tuple"])
        states[first.position] = states[first.position] + value
        return args, {**kwargs, "res_hidden_states_tuple": tuple(states)}

    handles.append(net.up_blocks[first.block].register_forward_pre_hook(edit, with_kwargs=True))
    torch.testing.assert_close(out, call(net))
    for handle in handles:
        handle.remove()


def test_beside_a_tuner_that_reads_inputs_hints_are_still_encoded_once():
    net = unet()
    channel = {"cross_attention_kwargs": {"hint": {"canny": hint(), "color": hint(1, batch=2)}}}
    with torch.no_grad(), tuned(net, Reading(net, "color"), Columns(net, "canny"), normalize=False):
        for _ in range(3):
            call(net, **channel)
        assert Wiring.of(net).encodings == 1


# ------------------------------------------------------------------------------------------- sites that are not there


def test_a_site_that_is_not_there_is_an_error_and_leaves_no_hook():
    net, deep = unet(), unet(layers_per_block=2)
    for sites in (skips(deep), class_tables(dit()), layers(deep, "resnets.1.conv1")):
        with pytest.raises(SctoolError, match="has no "), tuned(net, Adding(*sites)):
            pass
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    with pytest.raises(SctoolError, match="no skip connections"), tuned(dit(), Adding(*skips(net))):
        pass


def test_a_tuner_that_fails_leaves_the_others_as_they_were():
    net = unet()
    (layer,) = layers(net, "conv_out")
    with tuned(net, Adding(middle(net))):
        alone = call(net)
        with pytest.raises(SctoolError, match="has no nowhere"):
            Wiring.add(net, Adding(*skips(net)[:1], type(layer)("nowhere", 1, 1)), 1.0, {}, True)
        assert torch.equal(call(net), alone)
        with tuned(net, Adding(*skips(net)[:1])):
            twice = call(net)
        with tuned(net, Adding(*skips(net)[:1])):
            assert torch.equal(call(net), twice)


def test_features_may_be_numbers():
    class Numbers(Adding):
        def encode(self, hints, inputs=None):
            return {name: {"mean": hint.mean(), "list": [hint.mean((1, 2, 3))]} for name, hint in hints.items()}

        def delta(self, site, x, call):
            return call.features["canny"]["mean"].expand_as(x) if call.features else None

    net = unet()
    tuner = Numbers(middle(net))
    tuner.conditions, tuner.vae_scale = ("canny",), 4
    with tuned(net, tuner):
        out = call(net, cross_attention_kwargs={"hint": {"canny": hint()}})
    handle = net.mid_block.register_forward_hook(lambda _, args, output: output + hint().mean())
    torch.testing.assert_close(out, call(net))
    handle.remove()
