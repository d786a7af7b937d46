"""DiffScaler: counts, equation 5 restated, groups, conditions, stacking, and the backward of less memory."""

import copy
import types

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from sctool.core.backbones.architectures import architecture
from sctool.core.backbones.loading import load_backbone
from sctool.core.checkpoint import load_tuner, save_tuner
from sctool.core.config import TrainConfig
from sctool.core.counting import counts
from sctool.core.errors import DoesNotFit, SctoolError, UsageError
from sctool.core.measure import saved_bytes
from sctool.core.sites.attaching import TunedBackbone, tuned
from sctool.core.sites.layers import layer_site, layers
from sctool.core.sites.parts import chosen_layers, family_of
from sctool.core.sites.site import Call
from sctool.core.sites.wiring import Wiring
from sctool.core.training.setup import build_tuner
from sctool.core.tuners.affiner import Affiner, Branch
from sctool.core.tuners.configs import DiffScalerConfig
from sctool.core.tuners.diffscaler import DiffScaler, key, near_zero

from ..tiny import unet


def dit():
    """Two blocks of width 8, 8x8 latents in 16 patches; the same weights at every call, frozen."""
    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=3, norm_num_groups=4,
    )  # fmt: skip
    return net.requires_grad_(False).eval()


NETS = {"unet": unet, "dit": dit}
both = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


def build(net, conditions=(), shaken=True, seed=1, **settings):
    torch.manual_seed(seed)
    tuner = DiffScaler.build(DiffScalerConfig(**settings), net, conditions, 4).to(net.dtype)
    if shaken:
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return tuner


def call(net, hint=None, **tensors):
    """The denoiser's output (2, C, 8, 8), in its own precision."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    rows = {"label": torch.tensor([0, 2]), "prompt_embeds": torch.randn(2, 3, 8, generator=generator)}
    channel = {"hint": {name: one.to(net.dtype) for name, one in hint.items()}} if hint else None
    return family_of(net).output(net, latents, torch.tensor([3, 7]), rows, channel)


def maps(*names):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(2, 3, 32, 32, generator=generator) for name in names}


# ----------------------------------------------------------------------------------------------------------- counts

XL_2, SD15, SD21 = (architecture(name) for name in ("dit-xl-2", "sd15", "sd21"))


def test_variants_have_the_papers_counts_on_dit_xl_2():
    """Tables 1 and 3: 47.7M for the low-rank part, 0.48M for a and for b, 48.7M for all, 11.9M for d = 16."""
    rows = {row.variant.label: row.trainable for row in counts(XL_2) if row.method == "diffscaler"}
    blocks = 483_840
    assert rows["DiffScaler, low-rank only, d = 64"] == 47_702_016 == 64 * 745_344
    assert [rows[f"DiffScaler, low-rank only, d = {d}"] for d in (1, 4, 16)] == [745_344, 2_981_376, 11_925_504]
    assert rows["DiffScaler, scale only, blocks"] == rows["DiffScaler, shift only, blocks"] == blocks
    assert rows["DiffScaler"] == 48_674_445
    assert rows["DiffScaler, q, k, v separate"] == 52_803_269


def test_variants_have_the_papers_counts_on_sd15():
    """Table 2: 6.85M, met with branch biases and shifts where the base has a bias. Variants of blocks are left out."""
    rows = {row.variant.label: row.trainable for row in counts(SD15) if row.method == "diffscaler"}
    assert rows == {
        "DiffScaler": 6_762_213,
        "DiffScaler, whole denoiser": 20_244_898,
        "DiffScaler, branch biases": 6_848_965,
        "DiffScaler, 1 condition": 6_779_366,
        "DiffScaler, 1 condition by its latent": 6_773_350,
    }


@pytest.mark.parametrize(
    ("base", "parts", "count", "expected"),
    [
        (SD15, ("down_blocks", "mid_block"), 119, 8_677_623),
        (SD15, ("up_blocks",), 159, 11_407_647),
        (SD21, ("down_blocks",), 101, 6_860_517),
    ],
)
def test_parts_have_their_counts(base, parts, count, expected):
    tuner = DiffScaler.build(DiffScalerConfig(layers=parts), base.denoiser())
    assert sum(p.numel() for p in tuner.parameters()) == expected
    assert tuner.describe_sites() == [f"{count} layers of {', '.join(parts)}, d = 32"]
    meta = tuner.site_metadata()
    assert (meta["dim"], meta["sites"]["layers"], meta["sites"]["parts"]) == (32, count, list(parts))


# ------------------------------------------------------------------------------------------- equation 5, restated


def restated(tuner, site, module, x):
    """Equation 5 of one layer as the paper writes it, from the layer's weights and input; float64 in, float64 out."""
    own, branch = tuner.affiners[key(site.name)], tuner.branches[key(tuner.branch_of[site.name])]
    if site.linear:
        wx, low = x @ module.weight.T, (x @ branch.down.T).relu() @ own.up.T
        wide = (slice(None),)
    else:
        wx = F.conv2d(x, module.weight, None, module.stride, module.padding)
        patches = module.kernel_size == module.stride
        seen = (
            x if patches or module.padding in ("same", (1, 1)) or module.kernel_size == (1, 1) else x[..., 1:, 1:]
        )  # unpadded 3x3: the middle of the window
        h = F.conv2d(seen, branch.down, None, module.stride)[..., : wx.shape[-2], : wx.shape[-1]].relu()
        low = F.conv2d(h, own.up[..., None, None])
        wide = (slice(None), None, None)
    fixed = 0 if module.bias is None else module.bias[wide]
    return (1 + own.scale[wide]) * wx + branch.gate * low + fixed + own.shift[wide]


class OneLayer(nn.Module):
    """A denoiser of one layer, with the config of a U-Net, so that a tuner can be built for it."""

    dtype = torch.float64

    def __init__(self, layer):
        super().__init__()
        self.config, self.layer = unet().config, layer
        self.requires_grad_(False)

    def forward(self, sample):
        return self.layer(sample)


OneLayer.__name__ = "UNet2DConditionModel"

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 7, 6)),
    "linear, no bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "conv": (lambda: nn.Conv2d(4, 5, 3, padding=1), (2, 4, 8, 8)),
    "conv, no bias": (lambda: nn.Conv2d(4, 5, 3, padding=1, bias=False), (2, 4, 8, 8)),
    "strided": (lambda: nn.Conv2d(4, 5, 3, 2, 1), (2, 4, 8, 8)),
    "strided, odd": (lambda: nn.Conv2d(4, 5, 3, 2, 1), (2, 4, 9, 9)),
    "unpadded": (lambda: nn.Conv2d(4, 5, 3, 2), (2, 4, 9, 9)),
    "unpadded, odd": (lambda: nn.Conv2d(4, 5, 3, 2), (2, 4, 10, 8)),
    "patches": (lambda: nn.Conv2d(4, 5, 2, 2), (2, 4, 8, 8)),
    "patches, odd": (lambda: nn.Conv2d(4, 5, 2, 2), (2, 4, 9, 9)),
    "same": (lambda: nn.Conv2d(4, 5, 3, padding="same"), (2, 4, 5, 6)),
    "1x1": (lambda: nn.Conv2d(4, 5, 1), (2, 4, 3, 3)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def one_layer(name, **settings):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    net = OneLayer(make().double())
    return net, build(net, layers=("layer",), dim=3, **settings), torch.randn(shape, dtype=torch.float64)


@every_layer
def test_equation_5(name):
    net, tuner, x = one_layer(name)
    expected = restated(tuner, tuner.sites[0], net.layer, x)
    with tuned(net, tuner):
        torch.testing.assert_close(net(x), expected, rtol=1e-13, atol=1e-13)
        with torch.no_grad():
            torch.testing.assert_close(net(x), expected, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(net(x), expected)


def test_the_branch_starts_with_variance_2():
    """Kaiming-normal W_down and W_up, s = 1 and inputs of variance 1: std sqrt(2)."""
    torch.manual_seed(0)
    site = layer_site("layer", nn.Linear(512, 512))
    branch, own = Branch(site, 256, True, False, {}), Affiner(site, 256, True, True, True, False)
    out = own(torch.zeros(64, 512), branch(torch.randn(64, 512), own.up), torch.ones(()), None)
    assert out.std().item() == pytest.approx(2**0.5, rel=0.05)


def test_scale_and_shift_fold_into_the_weights():
    """W' = diag(1 + a) W and b' = b_hat + b."""
    for name in ("linear, no bias", "strided"):
        net, _, x = one_layer(name)
        tuner = build(net, layers=("layer",), dim=0)
        own, folded = tuner.affiners["layer"], copy.deepcopy(net.layer)
        with torch.no_grad():
            folded.weight.mul_((1 + own.scale).view(-1, *[1] * (folded.weight.dim() - 1)))
        folded.bias = nn.Parameter(own.shift.detach() + (0 if folded.bias is None else folded.bias))
        with tuned(net, tuner):
            torch.testing.assert_close(net(x), folded(x), rtol=1e-13, atol=1e-13)


@both
@pytest.mark.parametrize("conditions", [(), ("canny",)])
@pytest.mark.parametrize(
    "settings", [{}, {"gate": False}, {"layers": ["whole"], "branch_bias": True}, {"dim": 0}], ids=str
)
def test_starts_at_the_identity(make, conditions, settings):
    net = make()
    if conditions and settings.get("dim") == 0:
        with pytest.raises(UsageError, match="conditions enter through the branch"):
            build(net, conditions, **settings)
        return
    base = call(net)
    with tuned(net, build(net, conditions, shaken=False, **settings)):
        assert torch.equal(call(net, maps(*conditions)), base)
        with torch.no_grad():
            assert torch.equal(call(net, maps(*conditions)), base)


@both
def test_every_chosen_layer_is_its_own_equation_5(make):
    net = make().double()
    tuner = build(net, layers=["whole"])
    seen = {}
    with tuned(net, tuner):
        for site in tuner.sites:
            module = net.get_submodule(site.name)
            module.register_forward_hook(lambda module, args, out, site=site: seen.update({site: (args[0], out)}))
        call(net)
    assert set(seen) == set(layers(net)) == set(tuner.sites)
    for site, (x, out) in seen.items():
        expected = restated(tuner, site, net.get_submodule(site.name), x)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11, msg=site.name)


# ----------------------------------------------------------------------------------------------------------- groups


def test_grouped_layers_are_one_fused_layer():
    """q, k and v with one W_down and s are an Affiner on the fused layer: the same numbers."""
    net = dit().double()
    tuner = build(net)
    names = [f"transformer_blocks.0.attn1.to_{part}" for part in "qkv"]
    parts, own = [net.get_submodule(name) for name in names], [tuner.affiners[key(name)] for name in names]
    assert len({tuner.branch_of[name] for name in names}) == 1
    fused, x = OneLayer(nn.Linear(8, 24).double()), torch.randn(2, 5, 8, dtype=torch.float64)
    whole = build(fused, layers=("layer",), dim=64)
    with torch.no_grad():
        fused.layer.weight.copy_(torch.cat([part.weight for part in parts]))
        fused.layer.bias.copy_(torch.cat([part.bias for part in parts]))
        for field in ("scale", "shift", "up"):
            getattr(whole.affiners["layer"], field).copy_(torch.cat([getattr(one, field) for one in own]))
        whole.branches["layer"].load_state_dict(tuner.branches[key(tuner.branch_of[names[0]])].state_dict())
        with tuned(fused, whole), tuned(net, tuner):
            assert (fused(x) - torch.cat([part(x) for part in parts], -1)).abs().max() < 1e-14


def test_a_group_computes_its_branch_once_for_the_same_input():
    net = dit()
    grouped, separate = build(net), build(net, qkv="separate")
    for tuner, runs in ((grouped, 15 - 4), (separate, 15)):
        assert len(tuner.sites) == 15
        count = []
        for branch in tuner.branches.values():
            branch.register_forward_hook(lambda *_, count=count: count.append(1))
        with tuned(net, tuner):
            call(net)
        assert len(count) == runs
    q, k = (net.get_submodule(f"transformer_blocks.0.attn1.to_{part}") for part in "qk")
    with tuned(net, grouped):
        x = torch.randn(2, 3, 8)
        q(torch.randn(2, 3, 8))
        after, alone = k(x), restated(grouped, grouped.sites[2], k, x)
    assert grouped.sites[2].name.endswith("0.attn1.to_k")
    torch.testing.assert_close(after, alone)


def test_only_families_of_fused_layers_are_grouped():
    tuner = build(unet())
    assert all(name == branch for name, branch in tuner.branch_of.items())
    assert len(tuner.branches) == len(tuner.affiners) == len(tuner.sites)


# --------------------------------------------------------------------------------------------------------- stacking


@both
def test_tuners_of_unequal_widths_add_per_layer(make):
    """Layer by layer: base + sum w_i Delta_i, also for negative weights."""
    net = make().double()
    tuners, weights = [build(net, dim=3, seed=4), build(net, dim=5, seed=5, layers=["whole"])], [0.7, -1.3]
    seen = {}
    with tuned(net, *tuners, scales=weights):
        for site in tuners[0].sites:
            module = net.get_submodule(site.name)
            module.register_forward_hook(lambda module, args, out, site=site: seen.update({site: (args[0], out)}))
        call(net)
    for site, (x, out) in seen.items():
        module = net.get_submodule(site.name)
        base = module.forward(x)
        deltas = [restated(tuner, site, module, x) - base for tuner in tuners]
        torch.testing.assert_close(out, base + weights[0] * deltas[0] + weights[1] * deltas[1], rtol=1e-11, atol=1e-11)


@both
def test_one_hot_weights_give_one_task(make):
    net = make().double()
    one, other = build(net, dim=3, seed=4), build(net, dim=5, seed=5)
    with tuned(net, one):
        alone = call(net)
    with tuned(net, one, other, scales=[1, 0]):
        assert torch.equal(call(net), alone)
    with tuned(net, one, other, scales=[0, 1]):
        assert not torch.allclose(call(net), alone)


# ------------------------------------------------------------------------------------------------------- conditions


@both
@pytest.mark.parametrize("layers", [None, ["whole"]])
def test_conditions_are_columns_of_the_input_layers_branch(make, layers):
    """h = relu(D z + sum alpha_c D_c e(c)); the base's W sees z alone, and a condition without a hint adds nothing."""
    net = make().double()
    tuner = build(net, ("canny", "color"), layers=layers)
    name = "conv_in" if make is unet else "pos_embed.proj"
    module, seen = net.get_submodule(name), []
    hint = maps("canny", "color")
    for given, alphas in (
        ({}, {}),
        ({"color": 1.0}, {}),
        ({"canny": 0.75, "color": 0.25}, {"canny": 3.0, "color": 1.0}),
    ):
        seen.clear()
        with tuned(net, tuner, weights=alphas):
            handle = module.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
            call(net, {name: hint[name] for name in given})
            handle.remove()
        [(z, out)] = seen
        branch, own = tuner.branches[key(name)], tuner.affiners[key(name)]
        h = F.conv2d(z, branch.down, None, module.stride)
        for condition, alpha in given.items():
            pixels = F.pixel_unshuffle(hint[condition].double(), 4)
            h = h + alpha * F.conv2d(pixels, branch.columns[condition], None, module.stride)
        wide = (slice(None), None, None)
        wx = F.conv2d(z, module.weight, None, module.stride, module.padding)
        low = branch.gate * F.conv2d(h.relu(), own.up[..., None, None])
        expected = (1 + own.scale[wide]) * wx + low + module.bias[wide] + own.shift[wide]
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@both
def test_gradients_reach_every_weight_with_conditions(make):
    net = make()
    tuner = build(net, ("canny", "color"))
    with tuned(net, tuner):
        call(net, maps("canny", "color")).square().mean().backward()
    assert [name for name, p in tuner.named_parameters() if p.grad is None or not p.grad.any()] == []
    name = "conv_in" if make is unet else "pos_embed.proj"
    count = len(chosen_layers(net))
    assert len(tuner.sites) == count + 1
    assert tuner.describe_sites()[0].startswith(f"{count} layers of ")
    assert tuner.describe_sites()[1:] == [f"{name} with 48 channels a condition (pixels)"]
    whole = build(net, ("canny",), layers=["whole"])
    assert whole.describe_sites()[0].startswith(f"{len(whole.sites)} layers of whole")


def test_hints_by_their_latent(tmp_path):
    """e(c) is the mean of the map's latent, also after training has put the autoencoder aside; a copy can do it too."""
    backbone = load_backbone("mini")
    scale, channels = backbone.vae_scale, backbone.latent_channels
    torch.manual_seed(0)
    tuner = DiffScaler.build(DiffScalerConfig(hint="vae"), backbone.denoiser, ("canny",), scale)
    hint = {"canny": torch.rand(2, 3, 8 * scale, 8 * scale)}
    with pytest.raises(SctoolError, match="autoencoder"):
        tuner.encode(hint)
    save_tuner(tmp_path, tuner, backbone)
    loaded = load_tuner(tmp_path, backbone)
    expected = backbone.encode_images(2 * hint["canny"] - 1)[0]
    assert expected.shape == (2, channels, 8, 8)
    backbone.free_encoders()
    config = TrainConfig(method="diffscaler", tuner={"hint": "vae"}, cond=("canny",))
    assert copy.deepcopy(loaded)._latent is loaded._latent, "the base is not copied"
    for one in (loaded, copy.deepcopy(loaded), build_tuner(config, backbone)):
        features = one.encode({"canny": hint["canny"].bfloat16().float()})["canny"]
        torch.testing.assert_close(features, expected, rtol=0.05, atol=0.05)
        assert not features.requires_grad
        assert one.encode({"canny": hint["canny"].bfloat16()})["canny"].dtype == torch.bfloat16
        assert "autoencoder" not in " ".join(one.state_dict())
    shapes = tuner.encode({"canny": torch.empty(2, 3, 8 * scale, 8 * scale, device="meta")})["canny"]
    assert shapes.shape == expected.shape


def test_the_autoencoder_is_moved_to_where_the_maps_are():
    moved, tuner = [], build(unet(), ("canny",), hint="vae")
    vae = types.SimpleNamespace(to=moved.append)
    tuner.use(types.SimpleNamespace(vae=vae, encode_images=lambda pixels: (pixels[:, :1, ::4, ::4], None)))
    features = tuner.encode(maps("canny"))["canny"]
    assert moved == [torch.device("cpu")]
    torch.testing.assert_close(features, 2 * maps("canny")["canny"][:, :1, ::4, ::4] - 1)


# ------------------------------------------------------------------------------------------------------ less memory


def gradients(tuner, x, run, lean):
    """Output and the gradients of x and of every weight, by `edited` or by adding `delta`."""
    x = x.clone().requires_grad_()
    tuner.zero_grad()
    out = run(x, lean)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.dtype))
    return [out.detach(), x.grad, *(p.grad.clone() for p in tuner.parameters())]


def both_ways(net, tuner, x):
    site = tuner.sites[0]

    def run(x, lean):
        made = Call(given=x, module=net.layer)
        y = net.layer(x)
        return tuner.edited(site, y, made) if lean else y + tuner.delta(site, y, made)

    return [gradients(tuner, x, run, lean) for lean in (True, False)]


SETTINGS = [
    {},
    {"scale": False},
    {"shift": "none"},
    {"gate": False},
    {"branch_bias": True},
    {"branch_bias": True, "gate": False, "shift": "none"},
    {"dim": 0},
    {"dim": 0, "scale": False},
]


@every_layer
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_less_memory_gives_the_same_values_and_gradients(name, settings):
    net, _, x = one_layer(name)
    tuner = build(net, **{"layers": ("layer",), "dim": 3, **settings})
    lean, plain = both_ways(net, tuner, x)
    assert torch.equal(lean[0], plain[0])
    for ours, autograds in zip(lean, plain, strict=True):
        torch.testing.assert_close(ours, autograds, rtol=1e-12, atol=1e-12)


@every_layer
def test_rows_near_zero_have_the_same_gradients(name):
    net, tuner, x = one_layer(name)
    with torch.no_grad():
        tuner.affiners["layer"].scale[:4] = torch.tensor([-1.0, -1.0 + 1e-9, -1.2, 0.0])
    assert near_zero({"layer": tuner.affiners["layer"].scale})["layer"].tolist()[:3] == [0, 1, 2]
    lean, plain = both_ways(net, tuner, x)
    for ours, autograds in zip(lean, plain, strict=True):
        torch.testing.assert_close(ours, autograds, rtol=1e-12, atol=1e-12)


@every_layer
def test_less_memory_in_float32_and_bfloat16(name):
    """float32 within 1e-6 of the largest gradient; bfloat16 no further from the truth than twice autograd's error."""
    net, tuner, x = one_layer(name)
    truth = both_ways(net, tuner, x)[1]
    tuner.float()
    for dtype in (torch.float32, torch.bfloat16):
        net.to(dtype)
        for ours, autograds, true in zip(*both_ways(net, tuner, x.to(dtype)), truth, strict=True):
            size = true.abs().max()
            if dtype == torch.float32:
                assert (ours - autograds).abs().max() <= 2e-6 * size
            else:
                assert (ours.double() - true).abs().max() <= 2 * (autograds.double() - true).abs().max() + 0.02 * size


@both
def test_a_training_step_is_that_of_added_deltas(make, monkeypatch):
    """Through the hooks of a whole network, with conditions; near-zero rows included."""
    net = make().double()
    tuner = build(net, ("canny",), layers=["whole"])
    with torch.no_grad():
        tuner.affiners[key(tuner.sites[3].name)].scale[0] = -1
    grads = []
    for lean in (True, False):
        if not lean:
            monkeypatch.setattr(DiffScaler, "edited", lambda *_: None)
        tuner.zero_grad()
        with tuned(net, tuner):
            call(net, maps("canny")).square().mean().backward()
        grads.append([p.grad.clone() for p in tuner.parameters()])
    for ours, autograds in zip(*grads, strict=True):
        torch.testing.assert_close(ours, autograds, rtol=1e-9, atol=1e-12)


@both
@pytest.mark.parametrize("autocast", [False, True])
def test_reduced_precision(make, autocast):
    """A bfloat16 base, or a float32 one under autocast: gradients near float32's, weights stay float32."""
    net = make()
    tuner = build(net, ("canny",))
    grads = []
    for reduced in (False, True):
        tuner.zero_grad()
        if reduced and not autocast:
            net.to(torch.bfloat16)
        with tuned(net, tuner), torch.autocast("cpu", torch.bfloat16, enabled=reduced and autocast):
            out = call(net, maps("canny"))
        assert reduced == (out.dtype == torch.bfloat16)
        out.float().square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in tuner.parameters()]))
    assert grads[0].dtype == grads[1].dtype == torch.float32
    assert F.cosine_similarity(*grads, dim=0) > 0.99


def test_a_layer_keeps_less(monkeypatch):
    """y, h and x (128 x (48 + 4 + 16) numbers) instead of y_0 - b_hat as well."""
    torch.manual_seed(0)
    net = OneLayer(nn.Linear(16, 48))
    net.dtype = torch.float32
    tuner, x = build(net, layers=("layer",), dim=4, shaken=False), torch.randn(128, 16)
    model = nn.ModuleList([net, tuner])
    with tuned(net, tuner):
        lean = saved_bytes(model, lambda: net(x).square().sum())
        monkeypatch.setattr(DiffScaler, "edited", lambda *_: None)
        plain = saved_bytes(model, lambda: net(x).square().sum())
    assert lean == 4 * 128 * (48 + 4 + 16)
    assert plain >= lean + 4 * 128 * 48


def test_the_lean_way_is_for_one_tuner_at_scale_1_in_training(monkeypatch):
    net, asked = unet(), []
    monkeypatch.setattr(DiffScaler, "edited", lambda self, *_: asked.append(self))
    one, other = build(net), build(net, seed=2)

    def asks(*tuners, scales=1.0):
        asked.clear()
        with tuned(net, *tuners, scales=scales):
            call(net)
        return set(asked)

    assert asks(one) == {one}
    assert asks(one, scales=0.5) == asks(one, other) == set()
    assert asks(one, other, scales=[0, 1]) == {other}
    with torch.no_grad():
        assert asks(one) == set()


def test_a_layer_that_is_trained_too_gets_all_its_gradient():
    net = OneLayer(nn.Linear(6, 5).double())
    tuner, x = build(net, layers=("layer",), dim=3), torch.randn(4, 6, dtype=torch.float64)
    net.layer.requires_grad_(True)
    with tuned(net, tuner):
        net(x).sum().backward()
    scale = 1 + tuner.affiners["layer"].scale
    torch.testing.assert_close(net.layer.bias.grad, torch.full((5,), 4.0, dtype=torch.float64))
    torch.testing.assert_close(net.layer.weight.grad, scale[:, None] * x.sum(0))


def test_rows_near_zero_are_looked_for_once_per_call(monkeypatch):
    """Also after a step of a fused optimizer, which leaves the versions of the weights as they are."""
    net, looks = unet(), []

    def look(scales):
        looks.append(near_zero(scales))
        return looks[-1]

    monkeypatch.setattr("sctool.core.tuners.diffscaler.near_zero", look)
    tuner = build(net, shaken=False)
    optimizer = torch.optim.AdamW(tuner.parameters(), 1.0, fused=True)
    with tuned(net, tuner):
        for _ in range(2):
            call(net).square().mean().backward()
            optimizer.step()
    assert len(looks) == 2
    assert looks[0] == {}
    assert set(looks[1]) <= set(tuner.branch_of)
    assert looks[1], "a step of size 1 takes some 1 + a to 0"


def test_values_that_are_not_known_are_not_near_zero():
    near = {"a": torch.full((3,), -1.0)}
    assert near_zero(near)["a"].tolist() == [0, 1, 2]
    assert near_zero({"a": near["a"].to("meta")}) == {} == near_zero({"a": None}) == near_zero({"a": torch.zeros(3)})
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert near_zero({"a": fake.from_tensor(near["a"])}) == {}


@both
def test_a_deep_copy_on_another_device_computes_with_the_copys_layers(make):
    net = make()
    model = TunedBackbone(net, build(net))
    twin = copy.deepcopy(model).double()
    rows = {"label": torch.tensor([0, 2]), "prompt_embeds": torch.randn(2, 3, 8)}
    latents, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 7])
    out = model(latents, t, rows)
    torch.testing.assert_close(twin(latents, t, rows), out.double(), rtol=1e-3, atol=1e-4)
    meta = TunedBackbone(*(copy.deepcopy(one).to("meta") for one in (make(), build(make()))))
    assert (
        meta(*(one.to("meta") for one in (latents, t)), {n: r.to("meta") for n, r in rows.items()}).shape == out.shape
    )
    model.attachment.detach()
    assert Wiring.of(net) is None


# ------------------------------------------------------------------------------------------------- what is refused


def test_settings_that_leave_nothing_to_train():
    with pytest.raises(UsageError, match="nothing to train"):
        build(unet(), dim=0, scale=False, shift="none")


@both
def test_parts_of_other_bases_do_not_fit(make):
    with pytest.raises(DoesNotFit, match="no such part"):
        build(make(), layers=["blocks" if make is unet else "down_blocks"])
    with pytest.raises(DoesNotFit, match="matches 'nowhere'"):
        build(make(), layers=["nowhere"])


@pytest.mark.parametrize("more", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "reflect", "padding": 1}], ids=str)
def test_convolutions_of_other_kinds_do_not_fit(more):
    net = OneLayer(nn.Conv2d(4, 4, 3, **more))
    with pytest.raises(DoesNotFit, match="layer is grouped, dilated"):
        build(net, layers=("layer",))


def test_convolutions_with_much_padding_do_not_fit():
    with pytest.raises(DoesNotFit, match="more padding"):
        build(OneLayer(nn.Conv2d(4, 4, 1, padding=1)), layers=("layer",))


def test_conditions_need_a_known_input_layer():
    with pytest.raises(DoesNotFit, match="none of the input layers"):
        build(OneLayer(nn.Linear(4, 4)), ("canny",), layers=("layer",))


def test_a_file_of_another_width_is_refused(tmp_path):
    net = unet()
    backbone = types.SimpleNamespace(id="tiny", hash="0" * 64, family=family_of(net), licence="none", denoiser=net)
    save_tuner(tmp_path, build(net, dim=3), backbone)
    other = unet(block_out_channels=(16, 16))
    with pytest.raises(SctoolError, match="does not fit"):
        load_tuner(tmp_path, other)
