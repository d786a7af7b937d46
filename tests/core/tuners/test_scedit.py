"""SCEdit against an independent restatement of eqs. 5-8 in float64, and the promises around it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from sctool.core.errors import UsageError
from sctool.core.sites.attaching import TunedBackbone, tuned
from sctool.core.sites.skips import skips
from sctool.core.sites.wiring import Wiring
from sctool.core.tuners.configs import SCEditConfig
from sctool.core.tuners.scedit import SCEdit, Stem

SCALES = {"canny": 0.3, "color": 0.7}


def unet(dtype=torch.float32, **more):
    torch.manual_seed(0)
    options = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**options | more).requires_grad_(False).eval().to(dtype)


def build(net, conditions=(), vae_scale=4, **settings):
    """A tuner away from the identity."""
    torch.manual_seed(1)
    tuner = SCEdit.build(SCEditConfig(**settings), net, conditions, vae_scale)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return tuner


def inputs(dtype=torch.float32, size=(8, 8), batch=2):
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(batch, 4, *size, generator=generator).to(dtype)
    embeds = torch.randn(batch, 3, 8, generator=generator).to(dtype)
    hints = {name: torch.rand(1, 3, size[0] * 4, size[1] * 4, generator=generator).to(dtype) for name in SCALES}
    return latents, torch.tensor([3, 7, 11, 2][:batch]), embeds, hints


# ------------------------------------------------------------------------------- the restatement, in plain torch


def cascade(weights, prefix, hint, levels):
    """Fig. 4c: the stem, then c_i = zero_conv_i(silu(c_{i-1})), for an autoencoder of factor 4."""
    c = hint
    for i, stride in enumerate((1, 1, 2, 1, 2, 1, 1)):
        c = F.conv2d(c, weights[f"{prefix}.stem.{i}.weight"], weights[f"{prefix}.stem.{i}.bias"], stride, 1)
        c = F.silu(c) if i < 6 else c
    made = {}
    for level, stride in levels:
        kernel = weights[f"{prefix}.dense.{level}.convs.0.weight"]
        bias = weights[f"{prefix}.dense.{level}.convs.0.bias"]
        c = made[level] = F.conv2d(F.silu(c), kernel, bias, stride, kernel.shape[-1] // 2)
        if f"{prefix}.heads.{level}.weight" in weights:  # not in the paper: c_i = W_i trunk_i + b_i
            head, shift = (weights[f"{prefix}.heads.{level}.{name}"] for name in ("weight", "bias"))
            made[level] = torch.einsum("oc,bchw->bohw", head.flatten(1), c) + shift[:, None, None]
    return made


def adapter(weights, prefix, x):
    """Eq. 6 on (B, hw, C)."""
    rows = x.flatten(2).transpose(1, 2)
    inner = F.gelu(F.linear(rows, weights[f"{prefix}.down.weight"], weights[f"{prefix}.down.bias"]))
    out = F.linear(inner, weights[f"{prefix}.up.weight"], weights[f"{prefix}.up.bias"])
    return out.transpose(1, 2).reshape(x.shape)


def restated(net, weights, latents, t, embeds, hints, levels, edit_sc):
    """Eqs. 3, 4 and 8 as an own loop over the U-Net's public submodules; eqs. 5 and 7 in between."""
    temb = net.time_embedding(net.time_proj(t).to(latents.dtype))
    x = net.conv_in(latents)
    states = [x]
    for down in net.down_blocks:
        for i, resnet in enumerate(down.resnets):
            x = resnet(x, temb)
            if hasattr(down, "attentions"):
                x = down.attentions[i](x, encoder_hidden_states=embeds, return_dict=False)[0]
            states.append(x)
        for sampler in down.downsamplers or ():
            x = sampler(x)
            states.append(x)
    g = net.mid_block(x, temb, encoder_hidden_states=embeds)
    cs = {name: cascade(weights, f"csc.{name}", hint, levels) for name, hint in hints.items()}

    def edited(level, x):
        if level not in dict(levels):
            return x
        if edit_sc:
            return adapter(weights, f"sc.{level}", x) + x  # eq. 5
        parts = [
            SCALES[name] * (adapter(weights, f"csc.{name}.tuner.{level}", x + c[level]) + c[level])
            for name, c in cs.items()
        ]
        return sum(parts) + x  # eq. 7

    level = len(states)
    for up in net.up_blocks:
        for i, resnet in enumerate(up.resnets):
            level -= 1
            g = resnet(torch.cat([g, edited(level, states[level])], 1), temb)
            if hasattr(up, "attentions"):
                g = up.attentions[i](g, encoder_hidden_states=embeds, return_dict=False)[0]
        for sampler in up.upsamplers or ():
            g = sampler(g)
    return net.conv_out(F.silu(net.conv_norm_out(g)))


@pytest.mark.parametrize(
    ("conditions", "settings"),
    [
        ((), {}),
        ((), {"skips": (1, 5), "ratio": 0.5}),
        (("canny", "color"), {}),
        (("canny", "color"), {"kernel": 3, "skips": (0, 2, 3, 5)}),
        (("canny", "color"), {"cascade": "zero-heads", "skips": (0, 2, 3, 5)}),
    ],
)
def test_output_and_gradients_equal_the_paper_in_float64(conditions, settings):
    net = unet(torch.float64)
    tuner = build(net, conditions, **settings).double()
    latents, t, embeds, hints = inputs(torch.float64)
    levels, halvings = [], 0
    for site in skips(net):
        halvings += site.stride2
        if not settings.get("skips") or site.index in settings["skips"]:
            levels.append((site.index, 2**halvings))
            halvings = 0
    weights = {name: p.detach().clone().requires_grad_() for name, p in tuner.named_parameters()}
    expected = restated(net, weights, latents, t, embeds, hints if conditions else {}, levels, not conditions)
    channel = {"cross_attention_kwargs": {"hint": hints}} if conditions else {}
    with tuned(net, tuner, weights=SCALES if conditions else None):
        out = net(latents, t, embeds, **channel).sample
    assert (out - net(latents, t, embeds).sample).abs().max() > 1e-3
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    out.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in tuner.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-8, atol=1e-10, msg=name)


# ---------------------------------------------------------------------------------------------- the ablations


@pytest.mark.parametrize("operator", ["linear", "conv", "resprefix"])
@pytest.mark.parametrize("conditions", [(), ("canny",)])
def test_every_operator_starts_at_the_identity_and_learns(operator, conditions):
    net = unet()
    torch.manual_seed(0)
    tuner = SCEdit.build(SCEditConfig(operator=operator, dual=bool(conditions)), net, conditions, 4)
    latents, t, embeds, hints = inputs()
    given = {name: hints[name] for name in conditions} or None
    base = net(latents, t, embeds).sample
    model = TunedBackbone(net, tuner)
    optimizer = torch.optim.SGD(tuner.parameters(), 0.1)
    for step in range(12):
        out = model(latents, t, {"prompt_embeds": embeds}, given)
        assert torch.equal(out, base) or step
        optimizer.zero_grad()
        (out - latents).square().mean().backward()
        optimizer.step()
    assert (out - latents).square().mean() < (base - latents).square().mean()


def test_resprefix_is_attention_to_the_prefix():
    net = unet()
    operation = build(net, operator="resprefix", ratio=4.0).sc["4"]
    x = torch.randn(2, 16, 3, 5)
    query = operation.query(x.flatten(2).transpose(1, 2))
    rows = F.scaled_dot_product_attention(query, operation.key.expand(2, -1, -1), operation.value.expand(2, -1, -1))
    torch.testing.assert_close(operation(x), operation.out(rows).transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16, 32])
def test_the_stem_ends_on_the_latents_grid(factor):
    with torch.device("meta"):
        stem = Stem(256, 1.0, factor)
        out = stem(torch.empty(1, 3, 5 * factor, 7 * factor))
    assert out.shape == (1, 256, 5, 7)
    assert sum(p.numel() for p in stem.parameters()) == 348_880


@pytest.mark.parametrize("settings", [{}, {"dual": True}, {"kernel": 3}])
def test_heads_start_at_the_identity_and_every_level_sees_the_map_at_the_second_step(settings):
    net = unet()
    latents, t, embeds, hints = inputs()
    base, reached = net(latents, t, embeds).sample, {}
    for cascade in ("zero-chain", "zero-heads"):
        torch.manual_seed(0)
        tuner = SCEdit.build(SCEditConfig(cascade=cascade, **settings), net, ("canny",), 4)
        model = TunedBackbone(copy.deepcopy(net), tuner)
        optimizer = torch.optim.SGD(tuner.parameters(), 1.0)
        for step in range(2):
            out = model(latents, t, {"prompt_embeds": embeds}, {"canny": hints["canny"]})
            assert torch.equal(out, base) or step
            optimizer.zero_grad()
            (out - latents).square().mean().backward()
            optimizer.step()
        features = tuner.encode({"canny": torch.rand(2, 3, 32, 32)})["canny"]
        reached[cascade] = [not torch.equal(c[0], c[1]) for c in features.values()]
    assert reached["zero-heads"] == [True] * 6
    assert not all(reached["zero-chain"])


def test_the_stem_under_heads_keeps_the_variance():
    torch.manual_seed(0)
    tuner = SCEdit.build(SCEditConfig(cascade="zero-heads"), unet(), ("canny",), 4)
    edges = (torch.rand(16, 1, 64, 64) < 0.2).float().expand(-1, 3, -1, -1)
    assert 0.2 < tuner.csc["canny"].stem(edges).std(0).mean() < 2


def test_wrong_settings_are_named():
    net = unet()
    for chosen in ((), (0, 8), (1, 1)):
        with pytest.raises(UsageError, match=r"skips=.*0\.\.5"):
            SCEdit.build(SCEditConfig(skips=chosen), net)
    with pytest.raises(UsageError, match="factor is 6"):
        SCEdit.build(SCEditConfig(), net, ("canny",), 6)
    with pytest.raises(UsageError, match="Did you mean 'canny'"):
        SCEdit.build(SCEditConfig(weights={"cany": 1}), net, ("canny",), 4)


# -------------------------------------------------------------------------------------- what it costs and keeps


def saved_bytes(run):
    """Bytes kept for backward by `run`, each storage once, parameters excluded; and its output."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor._base is None:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sum(storages.values()), out


@pytest.mark.parametrize("conditions", [(), ("canny", "color")])
def test_nothing_before_the_first_edit_records_a_graph(conditions):
    net = unet()
    first = max(site.index for site in skips(net)) - 2
    model = TunedBackbone(net, build(net, conditions, skips=tuple(range(first + 1))))
    latents, t, embeds, hints = inputs()
    recorded = []
    for part in [net.conv_in, net.time_embedding, *net.down_blocks, net.mid_block]:
        part.register_forward_hook(lambda _, args, out: recorded.append(out))
    entry = next(site for site in skips(net) if site.index == first)
    for block in list(net.up_blocks)[: entry.block]:
        block.register_forward_hook(lambda _, args, out: recorded.append(out))
    out = model(latents, t, {"prompt_embeds": embeds}, {name: hints[name] for name in conditions})
    flat = [tensor for each in recorded for tensor in (each if isinstance(each, tuple) else (each,))]
    flat = [tensor for each in flat for tensor in (each if isinstance(each, tuple) else (each,))]
    assert len(flat) > 5
    assert not any(tensor.requires_grad for tensor in flat)
    assert out.requires_grad


def test_saved_bytes_equal_an_encoder_without_gradients():
    net = unet()
    model = TunedBackbone(net, build(net))
    latents, t, embeds, _ = inputs()
    plain, _ = saved_bytes(lambda: model(latents, t, {"prompt_embeds": embeds}))

    def stop(module, args, kwargs=None):
        torch.set_grad_enabled(False)

    def go(module, args, out):
        torch.set_grad_enabled(True)

    for part in [net.conv_in, *net.down_blocks, net.mid_block]:
        part.register_forward_pre_hook(stop)
        part.register_forward_hook(go)
    explicit, _ = saved_bytes(lambda: model(latents, t, {"prompt_embeds": embeds}))
    assert explicit == plain > 0
    net.requires_grad_(True)
    assert saved_bytes(lambda: model(latents, t, {"prompt_embeds": embeds}))[0] > plain


@pytest.mark.parametrize("size", [(9, 11), (7, 8), (13, 5)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_latents_of_odd_sizes(size, kernel):
    net = unet()
    latents, t, embeds, hints = inputs(size=size)
    model = TunedBackbone(net, build(net, ("canny", "color"), kernel=kernel))
    out = model(latents, t, {"prompt_embeds": embeds}, hints)
    assert out.shape == latents.shape
    out.sum().backward()


def test_odd_sizes_where_the_downsampler_rounds_down():
    net = unet(downsample_padding=0, block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2,
               up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    latents, t, embeds, hints = inputs(size=(9, 11))
    model = TunedBackbone(net, build(net, ("canny", "color"), kernel=3))
    assert model(latents, t, {"prompt_embeds": embeds}, hints).shape == latents.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_base_with_float32_tuners(dtype):
    net = unet(dtype)
    tuner = build(net, ("canny", "color"))
    model = TunedBackbone(net, tuner)
    latents, t, embeds, hints = inputs()
    out = model(latents, t, {"prompt_embeds": embeds}, hints)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert {p.dtype for p in tuner.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in tuner.parameters())
    exact = TunedBackbone(unet(), tuner)(latents, t, {"prompt_embeds": embeds}, hints)
    assert (out.float() - exact).norm() < 0.05 * exact.norm()


def test_a_copy_has_its_own_tuners():
    net = unet()
    model = TunedBackbone(net, build(net, ("canny", "color")))
    latents, t, embeds, hints = inputs()
    out = model(latents, t, {"prompt_embeds": embeds}, hints)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(latents, t, {"prompt_embeds": embeds}, hints), out)
    twin.attachment.detach()
    assert not twin.denoiser._forward_pre_hooks
    assert net._forward_pre_hooks


# ------------------------------------------------------------------------------------------------- the pipeline


def test_an_unmodified_pipeline_with_guidance_and_two_conditions(tiny_base, recwarn):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(str(tiny_base), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    net = pipe.unet.requires_grad_(False)
    tuner = build(net, ("canny", "color"))
    hints = {
        name: torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(SCALES)
    }
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def draw(prompts, start, hints=None):
        channel = {"hint": hints} if hints else None
        return pipe(
            prompts, latents=start, num_inference_steps=3, guidance_scale=3.0, height=32, width=32,
            output_type="latent", cross_attention_kwargs=channel,
        ).images  # fmt: skip

    base = draw(["a", "b"], start)
    with tuned(net, tuner):
        both = draw(["a", "b"], start, hints)
        assert Wiring.of(net).encodings == 1
        for i, prompt in enumerate(["a", "b"]):  # each picture has its own hint, in both halves of guidance
            alone = draw([prompt], start[i : i + 1], {name: hint[i : i + 1] for name, hint in hints.items()})
            torch.testing.assert_close(alone, both[i : i + 1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(both, base)
    assert torch.equal(draw(["a", "b"], start), base)
    assert not [w for w in recwarn if "not expected" in str(w.message)]


@pytest.mark.parametrize(
    ("factor", "strides"),
    [(1, "1111111"), (2, "1121111"), (4, "1121211"), (8, "1121212"), (16, "1221212"), (128, "2222222")],
)
def test_the_stem_halves_where_the_paper_does_first(factor, strides):
    stem = Stem(24, 1.0, factor)
    assert "".join(str(layer.stride[0]) for layer in stem) == strides
    assert [layer.in_channels for layer in stem] == [3, 16, 16, 32, 32, 96, 96]
    assert stem[-1].out_channels == 24
    assert stem(torch.rand(1, 3, 128, 128)).shape == (1, 24, 128 // factor, 128 // factor)


@pytest.mark.parametrize("factor", [3, 6, 256])
def test_a_factor_that_is_no_small_power_of_two_is_refused(factor):
    with pytest.raises(UsageError, match=f"factor is {factor}"):
        Stem(24, 1.0, factor)
