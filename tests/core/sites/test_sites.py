"""The seam: which skips there are, and that attaching and detaching leave no trace."""

import pytest
import torch

from sctool.core.backbones.architectures import KNOWN, Architecture
from sctool.core.errors import SctoolError, UsageError
from sctool.core.sites.attaching import TunedBackbone, attach, tuned
from sctool.core.sites.skips import skips
from sctool.core.sites.wiring import Wiring
from sctool.core.tuners.configs import SCEditConfig
from sctool.core.tuners.scedit import SCEdit

from ..tiny import unet

TEXT = {"prompt_embeds": torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))}


def call(net, size=(8, 8), **kwargs):
    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(2))
    return net(latents, torch.tensor([3, 7]), TEXT["prompt_embeds"], return_dict=False, **kwargs)[0]


def shaken(tuner):
    """The tuner away from the identity, so that it has an effect."""
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return tuner


def sc(net, **settings):
    return shaken(SCEdit.build(SCEditConfig(**settings), net, (), 4))


def csc(net, *names, **settings):
    return shaken(SCEdit.build(SCEditConfig(**settings), net, names, 4))


def hint(seed=0, batch=1, size=(32, 32)):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("base", "channels", "strided"),
    [
        ("sd15", [320] * 4 + [640] * 3 + [1280] * 5, [3, 6, 9]),
        ("sd21", [320] * 4 + [640] * 3 + [1280] * 5, [3, 6, 9]),
        ("sdxl", [320] * 4 + [640] * 3 + [1280] * 2, [3, 6]),
    ],
)
def test_skips_of_known_bases_on_the_meta_device(base, channels, strided):
    sites = skips(Architecture(base, {**KNOWN[base], "transformer_layers_per_block": 1}, 8).denoiser())
    assert [site.channels for site in sites] == channels
    assert [site.index for site in sites if site.stride2] == strided


def test_sites_name_the_tensors_that_the_decoder_receives():
    net, seen = unet(layers_per_block=2), {}
    for index, block in enumerate(net.up_blocks):
        block.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: seen.update({index: kwargs["res_hidden_states_tuple"]}),
            with_kwargs=True,
        )
    call(net)
    for site in skips(net):
        assert seen[site.block][site.position].shape[1] == site.channels


def test_a_model_without_skips_is_refused():
    with pytest.raises(SctoolError, match="no skip connections"):
        skips(torch.nn.Linear(2, 2))


def test_detaching_leaves_no_trace():
    net = unet()
    before, keys = call(net), list(net.state_dict())
    with tuned(net, sc(net), csc(net, "canny")):
        assert list(net.state_dict()) == keys
        assert not torch.equal(call(net), before)
    assert torch.equal(call(net), before)
    assert list(net.state_dict()) == keys
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in net.modules())


def test_an_error_inside_the_context_detaches_too():
    net = unet()
    with pytest.raises(ZeroDivisionError), tuned(net, sc(net)):
        raise ZeroDivisionError
    assert not net._forward_pre_hooks


def test_attaching_twice_is_an_error_and_attaches_nothing():
    net = unet()
    tuner = sc(net)
    with pytest.raises(SctoolError, match="already attached"):
        attach(net, tuner, tuner)
    assert not net._forward_pre_hooks


def test_nested_contexts_act_as_one():
    net = unet()
    a, b = sc(net), csc(net, "canny")
    channel = {"cross_attention_kwargs": {"hint": hint()}}
    with tuned(net, a, b):
        together = call(net, **channel)
    with tuned(net, a):
        alone = call(net)
        with tuned(net, b):
            assert torch.equal(call(net, **channel), together)
        assert torch.equal(call(net), alone)


def test_scales_are_of_any_size_and_linear_in_the_skip():
    net = unet()
    tuner = sc(net)
    base, edits = call(net), {}

    def note(_, args, kwargs):
        edits[scale] = kwargs["res_hidden_states_tuple"][0]

    for scale in (0, 1, -0.5, 1.7):
        with tuned(net, tuner, scales=scale):
            handle = net.up_blocks[0].register_forward_pre_hook(note, with_kwargs=True)
            out = call(net)
            handle.remove()
        assert torch.equal(out, base) == (scale == 0)
    step = edits[1] - edits[0]
    for scale in (-0.5, 1.7):
        torch.testing.assert_close(edits[scale], edits[0] + scale * step)


def test_without_a_hint_csc_is_the_base_bit_for_bit():
    net = unet()
    base = call(net)
    with tuned(net, csc(net, "canny")):
        assert torch.equal(call(net), base)
        assert torch.equal(call(net, cross_attention_kwargs={"hint": None}), base)
        assert torch.equal(call(net, cross_attention_kwargs={"hint": {"canny": None}}), base)


def test_missing_conditions_leave_the_others_their_full_weight():
    net = unet()
    both = csc(net, "canny", "color")
    only = {"cross_attention_kwargs": {"hint": {"color": hint()}}}
    with tuned(net, both):
        joint = call(net, **only)
    with tuned(net, both, normalize=False):
        torch.testing.assert_close(call(net, **only), joint)


def test_weights_are_shares_unless_told_otherwise():
    net = unet()
    tuner = csc(net, "canny", "color")
    channel = {"cross_attention_kwargs": {"hint": {"canny": hint(1), "color": hint(2)}}}

    def out(**options):
        with tuned(net, tuner, **options):
            return call(net, **channel)

    shares = out(weights={"canny": 3.0, "color": 1.0})
    torch.testing.assert_close(shares, out(weights={"canny": 0.75, "color": 0.25}, normalize=False))
    torch.testing.assert_close(out(), out(weights={"canny": 0.5, "color": 0.5}, normalize=False))
    with tuned(net, tuner):
        alone = call(net, cross_attention_kwargs={"hint": {"canny": hint(1)}})
    torch.testing.assert_close(out(weights={"color": 0.0}), alone)  # the end of an interpolation
    with pytest.raises(UsageError, match="sum to 0"):
        out(weights={"canny": 1.0, "color": -1.0})


def test_separately_trained_conditions_combine_like_jointly_trained_ones():
    net = unet()
    joint = csc(net, "canny", "color")
    parts = [SCEdit.build(SCEditConfig(), net, (name,), 4) for name in joint.conditions]
    for part in parts:
        part.csc.load_state_dict({k: v for k, v in joint.csc.state_dict().items() if k.startswith(part.conditions[0])})
    channel = {"cross_attention_kwargs": {"hint": {"canny": hint(1), "color": hint(2)}}}
    with tuned(net, joint, weights={"canny": 2.0}):
        expected = call(net, **channel)
    with tuned(net, *parts, weights={"canny": 2.0}):
        torch.testing.assert_close(call(net, **channel), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cany": hint()}, "Did you mean 'canny'"),
        ({"canny": hint(size=(64, 40))}, "40x64 pixels but the image is 32x32"),
        ({"canny": hint()[0]}, "RGB batch"),
        ({"canny": hint(batch=3)}, "3 maps for 2 latents"),
        (hint(), "without a name"),
    ],
)
def test_hints_that_do_not_fit_are_named(given, message):
    net = unet()
    with tuned(net, csc(net, "canny", "color")), pytest.raises(UsageError, match=message):
        call(net, cross_attention_kwargs={"hint": given})


def test_wrong_scales_and_weights_are_named():
    net = unet()
    with pytest.raises(UsageError, match="2 scales for 1 tuners"):
        attach(net, sc(net), scales=[1, 2])
    with pytest.raises(UsageError, match="Did you mean 'canny'"):
        attach(net, csc(net, "canny"), weights={"cany": 1.0})


def test_the_hint_batch_repeats_as_guidance_does():
    net = unet()
    with tuned(net, csc(net, "canny")):
        one = call(net, cross_attention_kwargs={"hint": hint()})
        torch.testing.assert_close(call(net, cross_attention_kwargs={"hint": hint().repeat(2, 1, 1, 1)}), one)
        as_bytes = (hint() * 255).round().to(torch.uint8)
        exact = call(net, cross_attention_kwargs={"hint": as_bytes.float() / 255})
        assert torch.equal(call(net, cross_attention_kwargs={"hint": as_bytes}), exact)


def test_other_keys_of_the_channel_pass():
    net, seen = unet(), []
    net.down_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["cross_attention_kwargs"]), with_kwargs=True
    )
    with tuned(net, csc(net, "canny")):
        call(net, cross_attention_kwargs={"hint": hint(), "gligen": None})
        call(net, cross_attention_kwargs={"hint": hint()})
    assert seen == [{"gligen": None}, None]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_hint_is_encoded_once_for_many_steps(mode):
    net = unet()
    with mode(), tuned(net, csc(net, "canny")):
        editor = Wiring.of(net)
        channel = {"cross_attention_kwargs": {"hint": {"canny": hint()}}}
        steps = [call(net, **channel) for _ in range(5)]
        assert editor.encodings == 1
        assert torch.equal(steps[0], steps[-1])
        call(net, cross_attention_kwargs={"hint": {"canny": hint(1)}})
        assert editor.encodings == 2


def test_a_changed_hint_or_weight_is_encoded_again():
    net = unet()
    tuner = csc(net, "canny")
    with torch.no_grad(), tuned(net, tuner):
        given = hint()
        channel = {"cross_attention_kwargs": {"hint": given}}
        first = call(net, **channel)
        given.mul_(0.5)
        second = call(net, **channel)
        assert not torch.equal(second, first)
        tuner.csc["canny"].stem[0].weight.mul_(2)
        third = call(net, **channel)
        assert not torch.equal(third, second)
    with tuned(net, tuner):
        assert torch.equal(call(net, **channel), third)  # with gradients: encoded every time


def test_tuned_backbone_trains_tuners_alone():
    net = unet()
    model = TunedBackbone(net, sc(net), csc(net, "canny")).train()
    assert not net.training
    assert model.tuners.training
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"tuners"}
    latents, hints = torch.randn(2, 4, 8, 8), {"canny": hint()}
    assert model(latents, torch.tensor([1, 2]), TEXT, hints).shape == latents.shape
    model.attachment.detach()
    model.attachment.detach()
    assert not net._forward_pre_hooks


def test_sdxl_extras_reach_the_denoiser():
    net = unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 10
    )
    model = TunedBackbone(net, SCEdit.build(SCEditConfig(), net, ("canny",), 4))
    assert model.tuners[0].csc["canny"].stem[-1].out_channels == 320
    text = {**TEXT, "pooled": torch.randn(2, 10), "time_ids": torch.ones(2, 6)}
    assert model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), text, {"canny": hint()}).shape == (2, 4, 8, 8)
