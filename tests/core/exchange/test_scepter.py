"""Files of SCEdit's authors against their modules, restated in plain torch: equal edits, and equal bytes back."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sctool.core.backbones.architectures import architecture
from sctool.core.backbones.loading import load_backbone
from sctool.core.checkpoint import describe
from sctool.core.errors import DoesNotFit, UsageError
from sctool.core.exchange.adapters import ratio
from sctool.core.exchange.foreign import Foreign, read_foreign
from sctool.core.exchange.scepter import Scepter, _control_config
from sctool.core.sites.attaching import tuned
from sctool.core.sites.skips import skips
from sctool.core.tuners import method_config, tuner_class
from sctool.core.tuners.configs import SCEditConfig
from sctool.core.tuners.scedit import SCEdit

from ..tiny import dit, unet

FORMAT = Scepter()


# ----------------------------------------------------------------------------------- the authors' modules, restated


class SCEAdapter(nn.Module):
    """scepter/modules/model/tuner/sce/scetuning_component.py."""

    def __init__(self, dim, length):
        super().__init__()
        self.ln1, self.activate, self.ln2 = nn.Linear(dim, length), nn.GELU(), nn.Linear(length, dim)

    def forward(self, x, shortcut=None):
        rows = x.permute(0, 2, 3, 1)
        return (x if shortcut is None else shortcut) + self.ln2(self.activate(self.ln1(rows))).permute(0, 3, 1, 2)


class SCTuner(nn.Module):
    def __init__(self, dim, length):
        super().__init__()
        self.tuner_op = SCEAdapter(dim, length)

    def forward(self, x, shortcut=None):
        return self.tuner_op(x, shortcut)


class CSCTuners(nn.Module):
    """scepter/modules/model/tuner/sce/scetuning.py; layers as USE_LAYERS should be read, in encoder order."""

    def __init__(self, chans, down, kernel=3, down_ratio=1.0, out=256, widen=1.0, layers=None):
        super().__init__()
        widths = [3, *(int(w * widen) for w in (16, 16, 32, 32, 96, 96)), out]
        blocks = []
        for i, (a, b) in enumerate(pairwise(widths)):
            blocks += [nn.SiLU()] * (i > 0) + [nn.Conv2d(a, b, 3, 2 if i in (2, 4, 6) else 1, 1)]
        self.pre_hint_blocks = nn.Sequential(*blocks)
        self.dense_hint_blocks, self.lsc_tuner_blocks = nn.ModuleList(), nn.ModuleList()
        kept = range(len(chans)) if layers is None else layers
        for i, chan in enumerate(chans):
            conv = nn.Conv2d(out, chan, kernel, 2 if down[i] else 1, kernel // 2) if i in kept else None
            self.dense_hint_blocks.append(nn.Sequential(nn.SiLU(), conv) if conv else nn.Identity())
            out = chan if i in kept else out
        for i, chan in reversed(list(enumerate(chans))):
            self.lsc_tuner_blocks.append(SCTuner(chan, int(chan * down_ratio)) if i in kept else nn.Identity())

    def edits(self, hint, hs):
        """T(x + c) + c for every skip, by its place in the encoder, as `_forward_control` in unet_module.py."""
        levels = []
        hint = self.pre_hint_blocks(hint)
        for block in self.dense_hint_blocks:
            hint = block(hint)
            levels.append(hint)
        made, last = {}, len(levels) - 1
        for place, tuner in enumerate(self.lsc_tuner_blocks):
            c = levels[::-1][place]
            if isinstance(tuner, SCTuner):
                made[last - place] = tuner(hs[last - place] + c, c)
        return made


class Identities(nn.Module):
    """The U-Net's `lsc_identity`, in decoder order, as LatentDiffusionSCETuning fills it (ldm_sce.py)."""

    def __init__(self, chans, down_ratio=1.0, use_layers=None):
        super().__init__()
        tuners = [
            SCTuner(chan, int(chan * down_ratio)) if not use_layers or i in use_layers else nn.Identity()
            for i, chan in enumerate(chans[::-1])
        ]
        self.lsc_identity = nn.ModuleList(tuners)


# ------------------------------------------------------------------------------------------------------- helpers


def base(net, vae_scale=8, name="tiny"):
    """As much of a backbone as a format looks at."""
    parts = {"id": name, "hash": "0" * 64, "licence": "openrail", "family": SimpleNamespace(name="sd")}
    return SimpleNamespace(denoiser=net, vae_scale=vae_scale, **parts)


def shapes(net):
    """INPUT_BLOCK_CHANS and INPUT_DOWN_FLAG of their U-Net."""
    return [site.channels for site in skips(net)], [site.stride2 for site in skips(net)]


def randomised(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def saved(tmp_path, module, prefix="", config=None, drop=()):
    """What `torch.save` of their state makes, read as a foreign file."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    state = {prefix + key: value for key, value in module.state_dict().items() if not key.startswith(tuple(drop))}
    torch.save(state, folder / "pytorch_model.bin")
    if config is not None:
        (folder / "configuration.json").write_text(json.dumps(config))
    return read_foreign(folder)


def built(reading, backbone):
    tuner = tuner_class(reading.method).build(
        method_config(reading.method, reading.config), backbone.denoiser, reading.conditions, backbone.vae_scale
    )
    tuner.load_state_dict(reading.state)
    return tuner


def run(net, tuner=None, hint=None):
    generator = torch.Generator().manual_seed(2)
    dtype = net.dtype
    latents, embeds = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
    call = (latents.to(dtype), torch.tensor([7]), embeds.to(dtype))
    if tuner is None:
        return net(*call).sample
    with tuned(net, tuner):
        channel = {} if hint is None else {"cross_attention_kwargs": {"hint": {"canny": hint}}}
        return net(*call, **channel).sample


def edited(net, edit):
    """The U-Net's output where `edit` replaces all its skips, a list in encoder order, before the decoder has them."""
    held, handles = [], []

    def collect(block, args, out):
        held.extend(out[1])

    def replace(block, args, kwargs):
        if not done:
            done.extend(edit([first[0], *held]))
        count = len(kwargs["res_hidden_states_tuple"])
        taken, done[-count:] = tuple(done[-count:]), []
        return args, {**kwargs, "res_hidden_states_tuple": taken}

    first, done = [], []
    handles.append(net.conv_in.register_forward_hook(lambda module, args, out: first.append(out)))
    handles += [block.register_forward_hook(collect) for block in net.down_blocks]
    handles += [block.register_forward_pre_hook(replace, with_kwargs=True) for block in net.up_blocks]
    out = run(net)
    for handle in handles:
        handle.remove()
    return out


HINT = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)).double()


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(("down_ratio", "use_layers"), [(1.0, None), (0.3, None), (0.5, [0, 2])])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_text_to_image_file_edits_as_its_modules_do(tmp_path, down_ratio, use_layers, prefix):
    net = unet().double()
    theirs = randomised(Identities(shapes(net)[0], down_ratio, use_layers)).double()
    foreign = saved(tmp_path, theirs, prefix)
    assert FORMAT.fits(foreign)
    reading = FORMAT.read(foreign, base(net), None)
    assert reading.conditions == ()
    assert set(reading.used) == set(foreign.tensors)
    assert reading.used[f"{prefix}lsc_identity.0.tuner_op.ln2.bias"] == "sc.3.up.bias"
    expected = edited(net, lambda hs: [tuner(x) for tuner, x in zip(theirs.lsc_identity, hs[::-1], strict=True)][::-1])
    out = run(net, built(reading, base(net)).double())
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert (out - run(net)).abs().max() > 1e-3


@pytest.mark.parametrize("prefix", ["", "0.", "model.", "model.0.", "control_blocks.0.", "model.control_blocks.1."])
def test_the_prefixes_of_their_loaders_are_cut_off(tmp_path, prefix):
    net = unet()
    theirs = randomised(CSCTuners(*shapes(net)))
    foreign = saved(tmp_path, theirs, prefix)
    reading = FORMAT.read(foreign, base(net), "canny")
    assert set(reading.used) == set(foreign.tensors)
    assert torch.equal(reading.state["csc.canny.stem.6.weight"], theirs.pre_hint_blocks[12].weight)
    assert torch.equal(reading.state["csc.canny.dense.1.convs.0.bias"], theirs.dense_hint_blocks[1][1].bias)
    assert torch.equal(reading.state["csc.canny.tuner.3.down.weight"], theirs.lsc_tuner_blocks[0].tuner_op.ln1.weight)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (None, 1.0),
        ({"NAME": "CSCTuners", "SCALE": 0.6}, 0.6),
        ({"CONTROL_MODEL": {"SCALE": 0.6, "DOWN_RATIO": 0.5}}, 0.6),
        ({"CONTROL_MODEL": [{"SCALE": 0.6}]}, 0.6),
    ],
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_controller_edits_as_its_modules_do(tmp_path, config, scale, kernel):
    net = unet().double()
    theirs = randomised(CSCTuners(*shapes(net), kernel, down_ratio=0.5, out=24)).double()
    foreign = saved(tmp_path, theirs, "0.", config)
    reading = FORMAT.read(foreign, base(net), "canny")
    assert set(reading.used) == set(foreign.tensors)
    assert reading.config.get("gains", {}) == ({} if scale == 1 else {"canny": scale})

    def edit(hs):
        made = theirs.edits(HINT, hs)
        return [x + scale * made[i] for i, x in enumerate(hs)]

    out = run(net, built(reading, base(net)).double(), HINT)
    torch.testing.assert_close(out, edited(net, edit), rtol=1e-10, atol=1e-10)
    assert (out - run(net)).abs().max() > 1e-3


def test_a_controller_of_some_skips_edits_as_its_modules_do(tmp_path):
    net = unet().double()
    theirs = randomised(CSCTuners(*shapes(net), layers=(0, 2, 3))).double()
    foreign = saved(tmp_path, theirs)
    reading = FORMAT.read(foreign, base(net), "canny")
    assert reading.config["skips"] == (0, 2, 3)
    assert set(reading.used) == set(foreign.tensors)

    def edit(hs):
        made = theirs.edits(HINT, hs)
        return [x + made.get(i, 0) for i, x in enumerate(hs)]

    out = run(net, built(reading, base(net)).double(), HINT)
    torch.testing.assert_close(out, edited(net, edit), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "kernel", "out", "widen", "parameters"),
    [
        ("sd15", 1, 256, 1.0, 28_824_400),
        ("sd21", 3, 256, 1.0, 99_111_760),
        ("sdxl", 3, 320, 2.0, 45_930_080),
        ("sdxl", 1, 320, 2.0, 14_800_480),
    ],
)
def test_controllers_of_the_known_bases(name, kernel, out, widen, parameters):
    net = architecture(name).denoiser()
    with torch.device("meta"):
        state = CSCTuners(*shapes(net), kernel, out=out, widen=widen).state_dict()
    foreign = Foreign("x.bin", {f"0.{key}": value for key, value in state.items()})
    reading = FORMAT.read(foreign, base(net), "depth")
    assert set(reading.used) == set(foreign.tensors)
    assert sum(value.numel() for value in reading.state.values()) == parameters
    assert reading.config == {"ratio": 1.0, "kernel": kernel, "hint_channels": out, "normalize": False}
    tuner = SCEdit.build(method_config("scedit", reading.config), net, ("depth",))
    assert {n: v.shape for n, v in tuner.state_dict().items()} == {n: v.shape for n, v in reading.state.items()}


@pytest.mark.parametrize(
    ("name", "down_ratio", "parameters"),
    [
        ("sd15", 1.0, 19_680_000), ("sd21", 0.2, 3_943_680), ("sd15", 0.1, 1_976_640),
        ("sdxl", 1.0, 9_841_920), ("sdxl", 0.1, 989_376),
    ],
)  # fmt: skip
def test_sc_tuners_of_the_known_bases(name, down_ratio, parameters):
    net = architecture(name).denoiser()
    with torch.device("meta"):
        state = Identities(shapes(net)[0], down_ratio).state_dict()
    reading = FORMAT.read(Foreign("x.bin", {f"model.{key}": value for key, value in state.items()}), base(net), None)
    assert reading.config == {"ratio": down_ratio}
    assert len(reading.used) == len(state)
    assert sum(value.numel() for value in reading.state.values()) == parameters


def test_unequal_widths_become_ranks(tmp_path):
    net = unet()
    theirs = Identities(shapes(net)[0])
    theirs.lsc_identity[1] = SCTuner(8, 5)
    foreign = saved(tmp_path, theirs)
    reading = FORMAT.read(foreign, base(net), None)
    assert reading.config == {"ranks": {0: 8, 1: 8, 2: 5, 3: 16}}
    assert set(reading.used) == set(foreign.tensors)
    built(reading, base(net))


@pytest.mark.parametrize("chans", [(320, 640, 1280), (8, 16), (49, 50, 93)])
def test_every_ratio_gives_widths_that_are_found_again(chans):
    sites = [SimpleNamespace(channels=chan) for chan in chans]
    for thousandths in range(130, 4000, 7):
        widths = {i: int(chan * thousandths / 1000) for i, chan in enumerate(chans)}
        found = ratio(widths, sites)
        assert found is not None
        assert {i: int(chan * found) for i, chan in enumerate(chans)} == widths
        assert ratio(widths, sites, thousandths / 1000) in (thousandths / 1000, found)


# ----------------------------------------------------------------------------- what does not fit, or is not whole


def message(foreign, backbone, condition=None):
    with pytest.raises(UsageError) as caught:
        FORMAT.read(foreign, backbone, condition)
    text = str(caught.value)
    assert len(text) < 300
    assert "\n" not in text
    return text


def test_a_controller_needs_a_condition_and_an_sc_tuner_takes_none(tmp_path):
    net = unet()
    assert "add --cond" in message(saved(tmp_path, CSCTuners(*shapes(net))), base(net))
    (tmp_path / "b").mkdir()
    assert "leave out --cond" in message(saved(tmp_path / "b", Identities(shapes(net)[0])), base(net), "canny")


def test_several_controllers_in_one_file_are_refused(tmp_path):
    net = unet()
    both = nn.ModuleList([CSCTuners(*shapes(net)), CSCTuners(*shapes(net))])
    assert "2 controllers, 0., 1." in message(saved(tmp_path, both), base(net), "canny")


@pytest.mark.parametrize(
    ("drop", "named"),
    [
        (["pre_hint_blocks.12.weight"], "pre_hint_blocks.12.weight"),
        (["pre_hint_blocks.4.bias"], "pre_hint_blocks.4.bias"),
        (["dense_hint_blocks.2.1.bias"], "dense_hint_blocks.2.1.bias"),
        (["dense_hint_blocks.0.1.weight"], "dense_hint_blocks.0.1.weight"),
        (["lsc_tuner_blocks.1.tuner_op.ln1.weight"], "lsc_tuner_blocks.1.tuner_op.ln1.weight"),
        (["lsc_tuner_blocks.1.tuner_op.ln2"], "lsc_tuner_blocks.1.tuner_op.ln2"),
        (["lsc_tuner_blocks.1."], "adapters have [0, 1, 3]"),
        (["dense_hint_blocks.3."], "cascade has skips [0, 1, 2]"),
        (["dense_hint_blocks.", "lsc_tuner_blocks."], "cascade has skips []"),
        (["dense_hint_blocks.2.", "lsc_tuner_blocks.1."], "leaves out skip 2, where the base halves"),
    ],
)
def test_a_controller_that_is_not_whole_is_refused(tmp_path, drop, named):
    net = unet()
    assert named in message(saved(tmp_path, CSCTuners(*shapes(net)), drop=drop), base(net), "canny")


def test_an_sc_tuner_that_is_not_whole_is_refused(tmp_path):
    net = unet()
    key = "lsc_identity.2.tuner_op.ln2.bias"
    assert f"has no {key}" in message(saved(tmp_path, Identities(shapes(net)[0]), drop=[key]), base(net))
    (tmp_path / "b").mkdir()
    config = {"SC_TUNER_CFG": {"DOWN_RATIO": 1.0}}
    foreign = saved(tmp_path / "b", Identities(shapes(net)[0]), config=config, drop=["lsc_identity.2."])
    assert "has no lsc_identity.2" in message(foreign, base(net))


@pytest.mark.parametrize(
    ("made", "used"), [("sd15", "sdxl"), ("sdxl", "sd15")], ids=["sd15's on sdxl", "sdxl's on sd15"]
)
@pytest.mark.parametrize("kind", ["text", "control"])
def test_a_file_of_another_base_is_refused(made, used, kind):
    net = architecture(made).denoiser()
    with torch.device("meta"):
        module = Identities(shapes(net)[0]) if kind == "text" else CSCTuners(*shapes(net))
    other = base(architecture(used).denoiser(), name=used)
    condition = None if kind == "text" else "canny"
    text = message(Foreign("x.bin", module.state_dict()), other, condition)
    assert f"does not fit base '{used}', it was made for another base" in text


def test_more_skips_than_the_base_has_are_refused(tmp_path):
    chans, down = shapes(unet())
    assert "beyond" in message(saved(tmp_path, Identities([*chans, 16])), base(unet()))
    (tmp_path / "b").mkdir()
    foreign = saved(tmp_path / "b", CSCTuners([*chans, 16], [*down, False]))
    assert "the base has 4" in message(foreign, base(unet()), "hed")


def test_wrong_shapes_are_refused(tmp_path):
    net = unet()
    theirs = CSCTuners(*shapes(net))
    theirs.lsc_tuner_blocks[2].tuner_op.ln2 = nn.Linear(8, 9)
    text = message(saved(tmp_path, theirs), base(net), "canny")
    assert "lsc_tuner_blocks.2.tuner_op.ln2.weight is (9, 8) in the file and (8, 8) here" in text
    (tmp_path / "b").mkdir()
    theirs = CSCTuners(*shapes(net))
    theirs.lsc_tuner_blocks[2] = SCTuner(8, 5)
    assert "no one ratio" in message(saved(tmp_path / "b", theirs), base(net), "canny")
    (tmp_path / "c").mkdir()
    foreign = saved(tmp_path / "c", CSCTuners(*shapes(net), widen=2.0, out=320))
    assert "pre_hint_blocks.0.weight is (32, 3, 3, 3)" in message(foreign, base(net), "canny")


def test_a_base_of_another_kind_is_refused(tmp_path):
    net = unet()
    foreign = saved(tmp_path, CSCTuners(*shapes(net)))
    assert "reduced by 8, and the base's autoencoder reduces by 4" in message(foreign, base(net, 4), "canny")
    assert "DiTTransformer2DModel" in message(foreign, base(dit()), "canny")


def test_keys_of_anything_else_are_not_used(tmp_path):
    net = unet()
    foreign = saved(tmp_path, Identities(shapes(net)[0]), "model.")
    more = {"model.lsc_identity.0.tuner_op.scaling": torch.ones(1), "model.input_blocks.0.0.weight": torch.ones(1)}
    reading = FORMAT.read(Foreign(foreign.path, {**foreign.tensors, **more}), base(net), None)
    assert set(reading.used) == set(foreign.tensors)
    assert not FORMAT.fits(Foreign(foreign.path, {"up_blocks.0.resnets.0.conv1.weight": torch.ones(1)}))
    twice = {**foreign.tensors, "lsc_identity.0.tuner_op.ln1.bias": torch.ones(16)}
    assert "more than one tuner" in message(Foreign(foreign.path, twice), base(net))


# ------------------------------------------------------------------------------------------------------- writing


def ours(net, conditions=(), vae_scale=8, **settings):
    torch.manual_seed(0)
    return randomised(SCEdit.build(SCEditConfig(**settings), net, conditions, vae_scale))


def written(tmp_path, tuner, backbone):
    out = tmp_path / "out"
    files = FORMAT.write(out, tuner, backbone, describe(tuner, backbone, {"canny": {"low": 50}}))
    assert sorted(files) == sorted(out.iterdir())
    return read_foreign(out)


def same(tuner, again):
    state = tuner.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())


@pytest.mark.parametrize("settings", [{}, {"ratio": 0.3}, {"skips": (1, 3)}, {"ranks": {0: 4, 1: 4, 2: 4, 3: 8}}])
def test_an_sc_tuner_there_and_back(tmp_path, settings):
    net = unet()
    tuner = ours(net, **settings)
    foreign = written(tmp_path, tuner, base(net))
    use = foreign.config.get("USE_LAYERS")
    theirs = Identities(shapes(net)[0], foreign.config["SC_TUNER_CFG"]["DOWN_RATIO"], use)
    wrapped = nn.ModuleDict({"model": theirs})
    wrapped.load_state_dict(torch.load(foreign.path, weights_only=True), strict=True)
    assert torch.equal(theirs.lsc_identity[0].tuner_op.ln1.weight, tuner.sc["3"].down.weight)
    reading = FORMAT.read(foreign, base(net), None)
    same(tuner, built(reading, base(net)))
    assert use == ([0, 2] if "skips" in settings else None)
    if "ranks" not in settings:
        assert method_config("scedit", reading.config) == tuner.config
    assert all(value.dtype == torch.float32 for value in foreign.tensors.values())


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"kernel": 3, "ratio": 0.5, "hint_channels": 24}, 1.0),
        ({"normalize": False, "weights": {"canny": 0.5}, "gains": {"canny": 0.5}}, 0.25),
        ({"weights": {"canny": 0.5}, "gains": {"canny": 3.0}}, 3.0),
        ({"skips": (0, 1, 2, 3)}, 1.0),
    ],
)
def test_a_csc_tuner_there_and_back(tmp_path, settings, scale):
    net = unet()
    tuner = ours(net, ("canny",), **settings)
    foreign = written(tmp_path, tuner, base(net))
    model = foreign.config["CONTROL_MODEL"]
    theirs = CSCTuners(
        *shapes(net), model["DENSE_HINT_KERNAL"], model["DOWN_RATIO"], model["PRE_HINT_OUT_CHANNELS"],
        model["PRE_HINT_DIM_RATIO"],
    )  # fmt: skip
    theirs.load_state_dict(torch.load(foreign.path, weights_only=True), strict=True)
    assert model["SCALE"] == scale
    reading = FORMAT.read(foreign, base(net), None)  # the file names the condition
    assert reading.conditions == ("canny",)
    again = built(reading, base(net))
    same(tuner, again)
    hint = HINT.float()
    assert torch.equal(run(net, tuner, hint), run(net, again, hint))
    assert (run(net, tuner, hint) - run(net)).abs().max() > 1e-3
    assert "leave out --cond depth" in message(foreign, base(net), "depth")
    assert foreign.config["SCTOOL"]["licence"] == "openrail"
    assert foreign.config["SCTOOL"]["maps"] == {"canny": {"low": 50}}


def test_the_settings_of_a_controller_for_sdxl():
    net = architecture("sdxl").denoiser()
    tuner = SCEdit.build(SCEditConfig(kernel=3), net, ("canny",))
    model = _control_config(tuner, skips(net))["CONTROL_MODEL"]
    assert (model["PRE_HINT_OUT_CHANNELS"], model["PRE_HINT_DIM_RATIO"], model["DENSE_HINT_KERNAL"]) == (320, 2.0, 3)


def test_the_same_tuner_gives_the_same_bytes(tmp_path):
    net = unet()
    tuner = ours(net, ("canny",))
    files = [FORMAT.write(tmp_path / name, tuner, base(net), describe(tuner, base(net))) for name in "ab"]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_on_a_real_base(tmp_path, tiny_base):
    backbone = load_backbone(str(tiny_base))
    tuner = ours(backbone.denoiser, vae_scale=backbone.vae_scale, ratio=0.5)
    foreign = written(tmp_path, tuner, backbone)
    assert len(foreign.tensors) == 12 * 4
    assert foreign.config["SCTOOL"]["base"]["hash"] == backbone.hash
    same(tuner, built(FORMAT.read(foreign, backbone, None), backbone))
    controller = ours(backbone.denoiser, ("canny",), backbone.vae_scale)
    with pytest.raises(DoesNotFit, match="autoencoder reduces by 4"):
        FORMAT.write(tmp_path / "no", controller, backbone, describe(controller, backbone))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("conditions", "settings", "named"),
    [
        ((), {"operator": "conv"}, "operator=conv"),
        (("canny",), {"operator": "resprefix"}, "operator=resprefix"),
        ((), {"ranks": {0: 8, 1: 2, 3: 1}}, "ranks={0: 8, 1: 2, 3: 1}"),
        (("canny",), {"ranks": {0: 8}}, "SC-Tuner and a CSC-Tuner in one"),
        (("canny", "depth"), {}, "conditions=canny,depth"),
        (("canny",), {"dual": True}, "dual=true"),
        (("canny",), {"cascade": "zero-heads"}, "cascade=zero-heads"),
        (("canny",), {"skips": (0, 2)}, "skips=[0, 2]"),
        (("canny",), {"ratio": 0.07}, "ratio=0.07"),
    ],
)
def test_what_their_classes_cannot_load_is_refused(tmp_path, conditions, settings, named):
    net = unet()
    tuner = ours(net, conditions, **settings)
    with pytest.raises(DoesNotFit) as caught:
        FORMAT.write(tmp_path / "out", tuner, base(net), describe(tuner, base(net)))
    assert named in str(caught.value)
    assert "sctool's own file" in str(caught.value)
    assert not (tmp_path / "out").exists()
