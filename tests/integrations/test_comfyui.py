"""The ComfyUI nodes against sctool's own tuned U-Net on the same weights.

They run on a stand-in of ComfyUI's model interface, and on a real checkout where SCTOOL_TEST_COMFYUI is its folder.
"""

import importlib.util
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from sctool.core.backbones.families import FAMILIES
from sctool.core.backbones.loading import load_backbone
from sctool.core.checkpoint import load_tuner, save_tuner, tuner_file
from sctool.core.sites.attaching import tuned
from sctool.core.tuners import TUNERS, method_config

from . import checkout, standin

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
NODES = "custom_nodes_of_sctool"
CHECKOUT = os.environ.get("SCTOOL_TEST_COMFYUI")
real = pytest.param("checkout", marks=pytest.mark.skipif(not CHECKOUT, reason="SCTOOL_TEST_COMFYUI is not set"))


@pytest.fixture(params=["standin", real])
def comfy(request, tmp_path, monkeypatch):
    """The nodes as ComfyUI imports them, and ComfyUI's side of the interface; models/ is tmp_path."""
    side = {"standin": standin, "checkout": checkout}[request.param]
    made = standin.modules(tmp_path) if side is standin else checkout.modules(tmp_path, CHECKOUT)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    package = imported()
    (tmp_path / "sctool").mkdir()
    load, hint = (package.NODE_CLASS_MAPPINGS[name]() for name in ("LoadSctoolTuner", "SctoolHint"))
    yield types.SimpleNamespace(load=load.load, hint=hint.hint, node=load, patcher=side.patcher, run=side.run)
    for name in [name for name in sys.modules if name.partition(".")[0] == NODES]:
        del sys.modules[name]


def imported():
    """The folder as a package, under a name of its own as ComfyUI gives it."""
    spec = importlib.util.spec_from_file_location(NODES, FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules[NODES] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def unet(dtype=torch.float64, **more):
    """SD 1.5's layout of 12 skips in small; the same weights at every call."""
    torch.manual_seed(0)
    options = {
        "block_out_channels": (32, 64, 64, 64), "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 8,
        "cross_attention_dim": 8, "attention_head_dim": 8,
    }  # fmt: skip
    return UNet2DConditionModel(**options | more).requires_grad_(False).eval().to(dtype)


def sdxl():
    """SDXL's layout of 9 skips, with its embedding of sizes."""
    return unet(
        block_out_channels=(32, 64, 64), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 + 6 * 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def build(net, method="scedit", conditions=(), seed=1, **settings):
    """A tuner away from the identity."""
    torch.manual_seed(seed)
    tuner = TUNERS[method].load().build(method_config(method, settings), net, conditions, 8)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return tuner


def saved(folder, tuner, name="t.safetensors"):
    """The tuner's file in models/sctool."""
    base = types.SimpleNamespace(id="base-a", hash="a" * 64, family=FAMILIES[0], licence="openrail")
    save_tuner(folder / "sctool" / name, tuner, base)
    return name


def inputs(net, batch=2, size=(8, 8), seed=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, *size, generator=generator).to(net.dtype)
    context = torch.randn(batch, 3, 8, generator=generator).to(net.dtype)
    return x, torch.tensor([3, 7, 11, 2][:batch]), context


def added(net, batch=2):
    """SDXL's further inputs; None for other nets."""
    if net.config["addition_embed_type"] is None:
        return None
    generator = torch.Generator().manual_seed(5)
    return {
        "text_embeds": torch.randn(batch, 8, generator=generator).to(net.dtype),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * batch),
    }


def images(seed, count=1, size=(64, 64)):
    """ComfyUI's images (B, H, W, 3)."""
    return torch.rand(count, *size, 3, generator=torch.Generator().manual_seed(seed))


def hinted(comfy, *given):
    """What a row of hint nodes gives: (condition, image) or (condition, image, weight) each."""
    hints = None
    for name, image, *weight in given:
        [hints] = comfy.hint(image, name, *(weight or [1.0]), hints)
    return hints


def expected(net, x, t, context, *tuners, hints=None, **how):
    """What sctool makes of it; hints as ComfyUI's images."""
    channel = {"hint": {name: image.movedim(-1, 1) for name, image in hints.items()}} if hints else None
    with torch.no_grad(), tuned(net, *tuners, **how):
        more = {"added_cond_kwargs": added(net, len(x)), "cross_attention_kwargs": channel}
        return net(x, t, encoder_hidden_states=context, **more).sample


def close(ours, theirs, far=None):
    """Equal up to rounding; and `far`, what it was without the tuner, is not."""
    tolerance = 1e-9 if ours.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    if far is not None:
        assert (theirs - far).abs().max() > 1e-2


def parity(comfy, folder, net, tuner, hints=None, strength=1.0, **how):
    x, t, context = inputs(net)
    base = comfy.patcher(net)
    more = {"hints": hinted(comfy, *hints.items())} if hints else {}
    [model] = comfy.load(base, saved(folder, tuner), strength, **more)
    plain = comfy.run(base, x, t, context, added(net))
    close(plain, expected(net, x, t, context))
    wanted = expected(net, x, t, context, tuner, hints=hints, scales=strength, **how)
    close(comfy.run(model, x, t, context, added(net)), wanted, plain)
    assert torch.equal(comfy.run(base, x, t, context, added(net)), plain)  # the model before the node is as it was


# ------------------------------------------------------------------------------------------------ equal to sctool


SC = {
    "linear": {}, "ratio": {"ratio": 0.2}, "two skips": {"skips": (0, 11)}, "conv": {"operator": "conv"},
    "resprefix": {"operator": "resprefix"}, "ranks": {"ranks": {2: 3, 7: 5}},
}  # fmt: skip
CSC = {
    "kernel 1": {}, "kernel 3": {"kernel": 3}, "dual": {"dual": True}, "heads": {"cascade": "zero-heads"},
    "some skips": {"skips": (1, 4, 9)}, "beside an SC-Tuner": {"ranks": {0: 4, 5: 4}},
    "gain": {"gains": {"canny": 0.4}},
}  # fmt: skip
AFFINERS = {
    "default": {}, "whole": {"layers": ("whole",)}, "no gate": {"gate": False}, "no branch": {"dim": 0},
    "biases": {"branch_bias": True, "shift": "biased"}, "branch alone": {"scale": False, "shift": "none"},
}  # fmt: skip


@pytest.mark.parametrize("settings", SC.values(), ids=SC)
def test_sc_tuner(comfy, tmp_path, settings):
    net = unet()
    parity(comfy, tmp_path, net, build(net, **settings), strength=0.7)


@pytest.mark.parametrize("settings", CSC.values(), ids=CSC)
def test_csc_tuner(comfy, tmp_path, settings):
    net = unet()
    parity(comfy, tmp_path, net, build(net, "scedit", ("canny",), **settings), {"canny": images(1)}, 1.3)


@pytest.mark.parametrize("settings", AFFINERS.values(), ids=AFFINERS)
def test_diffscaler(comfy, tmp_path, settings):
    net = unet()
    parity(comfy, tmp_path, net, build(net, "diffscaler", **settings), strength=-0.6)


@pytest.mark.parametrize("method", ["scedit", "diffscaler"])
def test_sdxl(comfy, tmp_path, method):
    net = sdxl()
    settings = {"layers": ("whole",)} if method == "diffscaler" else {}
    hints = {"canny": images(1)} if method == "scedit" else None
    parity(comfy, tmp_path, net, build(net, method, tuple(hints or ()), **settings), hints)


@pytest.mark.parametrize("normalize", [True, False])
def test_two_conditions_share_a_weight_of_one_unless_the_file_says_otherwise(comfy, tmp_path, normalize):
    net = unet()
    tuner = build(net, "scedit", ("canny", "color"), weights={"color": 2.0}, normalize=normalize)
    x, t, context = inputs(net)
    given = {"canny": images(1), "color": images(2)}
    hints = hinted(comfy, ("canny", given["canny"], 0.5), ("color", given["color"], 1.5))
    [model] = comfy.load(comfy.patcher(net), saved(tmp_path, tuner), 1.0, hints)
    wanted = expected(net, x, t, context, tuner, hints=given, weights={"canny": 0.5, "color": 3.0})
    close(comfy.run(model, x, t, context), wanted, expected(net, x, t, context))
    [model] = comfy.load(comfy.patcher(net), saved(tmp_path, tuner), 1.0, hinted(comfy, ("color", given["color"])))
    close(comfy.run(model, x, t, context), expected(net, x, t, context, tuner, hints={"color": given["color"]}))


def test_nodes_in_a_row_add_up_as_tuners_attached_together(comfy, tmp_path):
    net = unet()
    made = {
        "sc": build(net, seed=1),
        "canny": build(net, "scedit", ("canny",), seed=2, weights={"canny": 3.0}),
        "color": build(net, "scedit", ("color",), seed=3),
        "one": build(net, "diffscaler", seed=4),
        "two": build(net, "diffscaler", seed=5, layers=("whole",)),
    }
    scales = {"sc": 0.5, "canny": 1.1, "color": 0.8, "one": 0.7, "two": -0.4}
    given = {"canny": images(1), "color": images(2)}
    x, t, context = inputs(net)
    wanted = expected(net, x, t, context, *made.values(), hints=given, scales=list(scales.values()))
    base = comfy.patcher(net)
    for order in (list(made), ["two", "color", "one", "sc", "canny"]):
        model = base
        for name in order:
            hints = hinted(comfy, ("", given[name])) if name in given else None
            [model] = comfy.load(model, saved(tmp_path, made[name], f"{name}.safetensors"), scales[name], hints)
        close(comfy.run(model, x, t, context), wanted, expected(net, x, t, context))
    close(comfy.run(base, x, t, context), expected(net, x, t, context))


def test_guidance_repeats_the_hints_for_each_prompt(comfy, tmp_path):
    """Two prompts over two latents, a hint for each latent."""
    net = unet()
    tuner, hints = build(net, "scedit", ("canny",)), images(1, count=2)
    x, t, context = inputs(net, batch=4)
    [model] = comfy.load(comfy.patcher(net), saved(tmp_path, tuner), 1.0, hinted(comfy, ("", hints)))
    close(comfy.run(model, x, t, context, prompts=2), expected(net, x, t, context, tuner, hints={"canny": hints}))
    with pytest.raises(ValueError, match="2 hint images for 1 latents"):
        comfy.run(model, x, t, context, prompts=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_compute_as_sctool_does(comfy, tmp_path, dtype):
    net = unet(dtype)
    x, t, context = inputs(net)
    base, given = comfy.patcher(net), {"canny": images(1)}
    far = comfy.run(base, x, t, context)
    for method, conditions in (("scedit", ("canny",)), ("diffscaler", ())):
        tuner = build(net, method, conditions)
        hints = {name: given[name] for name in conditions}
        name = saved(tmp_path, tuner)
        [model] = comfy.load(base, name, 1.0, hinted(comfy, *hints.items()))
        ours, tuner = comfy.run(model, x, t, context), load_tuner(tmp_path / "sctool" / name, net)
        channel = {"hint": {name: image.movedim(-1, 1) for name, image in hints.items()}} if hints else None
        with torch.no_grad(), tuned(net, tuner):
            wanted = net(x, t, encoder_hidden_states=context, cross_attention_kwargs=channel).sample
        assert ours.dtype == dtype
        tolerance = 0.06 if dtype == torch.bfloat16 else 1e-4
        assert (ours - wanted).norm() < tolerance * (wanted - far).norm()


def test_a_shipped_file_on_its_own_base(tmp_path, comfy):
    if comfy.patcher is checkout.patcher:
        pytest.skip("ComfyUI's groups of 32 channels do not divide mini's")
    backbone = load_backbone("mini")
    net, tuner = backbone.denoiser, load_tuner("mini-canny", backbone)
    (tmp_path / "sctool" / "canny.safetensors").symlink_to(tuner_file("mini-canny").resolve())
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(2, 6, 16, 16, generator=generator), torch.randn(2, 9, 128, generator=generator)
    t, hints = torch.tensor([500, 20]), {"canny": images(1).round()}
    [model] = comfy.load(comfy.patcher(net), "canny.safetensors", 1.0, hinted(comfy, ("canny", hints["canny"])))
    close(comfy.run(model, x, t, context), expected(net, x, t, context, tuner, hints=hints))


@pytest.mark.skipif(not CHECKOUT, reason="SCTOOL_TEST_COMFYUI is not set")
@pytest.mark.parametrize("comfy", ["checkout"], indirect=True)
def test_whole_images_by_comfyuis_sampler(comfy, tmp_path):
    """Two latents with guidance: each step moves and patches the model as ComfyUI does for its users."""
    net = unet()
    made = {"sc": build(net), "csc": build(net, "scedit", ("canny",), seed=2), "ds": build(net, "diffscaler", seed=3)}
    given = images(1, count=2)
    noise, _, prompts = inputs(net)
    noise = noise.float()
    model = base = comfy.patcher(net)
    for name, tuner in made.items():
        hints = hinted(comfy, ("", given)) if name == "csc" else None
        [model] = comfy.load(model, saved(tmp_path, tuner, f"{name}.safetensors"), 0.5, hints)
    ours = checkout.sample(model, noise, *prompts[:, None])
    plain = checkout.sample(base, noise, *prompts[:, None])
    other = comfy.patcher(net)
    other.model.diffusion_model = checkout.Diffusers(net, {"hint": {"canny": given.movedim(-1, 1)}})
    with tuned(net, *made.values(), scales=0.5):
        wanted = checkout.sample(other, noise, *prompts[:, None])
    close(ours, wanted, plain)


# --------------------------------------------------------------------------------------------- strength and hints


def test_strength_zero_is_the_same_model(comfy):
    model = object()
    assert comfy.load(model, "not read", 0.0) == (model,)


def test_hooks_are_gone_after_a_call_and_after_an_error(comfy, tmp_path):
    net = unet()
    x, t, context = inputs(net)
    [model] = comfy.load(comfy.patcher(net), saved(tmp_path, build(net, "diffscaler")), 1.0)
    for given in (context, context[..., :3]):
        try:
            comfy.run(model, x, t, given)
        except RuntimeError:
            assert given is not context
        assert not any(module._forward_hooks for module in model.model.diffusion_model.modules())


def test_hints_are_encoded_once_for_each_size(comfy, tmp_path, monkeypatch):
    net = unet()
    tuner = build(net, "scedit", ("canny",))
    [model] = comfy.load(comfy.patcher(net), saved(tmp_path, tuner), 1.0, hinted(comfy, ("", images(1))))
    [loaded] = model.model_options["transformer_options"]["patches"]["sctool"]
    encode, calls = loaded.encode, []
    monkeypatch.setattr(loaded, "encode", lambda *args: calls.append(args) or encode(*args))
    for _ in range(3):
        comfy.run(model, *inputs(net))
    assert len(calls) == 1
    comfy.run(model, *inputs(net, size=(16, 8)))
    comfy.run(model, *inputs(net, size=(16, 8)))
    assert len(calls) == 2
    model.model_patches_to(torch.device("cpu"))
    comfy.run(model, *inputs(net))
    assert len(calls) == 2


def test_comfyui_moves_the_weights_of_one_clone(comfy, tmp_path):
    net = unet()
    tuner = build(net, "scedit", ("canny",))
    [model] = comfy.load(comfy.patcher(net), saved(tmp_path, tuner), 1.0, hinted(comfy, ("", images(1))))
    clone = model.clone()
    [one], [other] = (m.model_options["transformer_options"]["patches"]["sctool"] for m in (model, clone))
    comfy.run(model, *inputs(net))
    model.model_patches_to(torch.float16)
    assert {weight.dtype for weight in one.weights.values()} == {torch.float32}
    model.model_patches_to(torch.device("meta"))
    assert all(weight.is_meta for weight in one.weights.values())
    assert one.encoded == {}
    assert not any(weight.is_meta for weight in other.weights.values())
    one.weights = other.weights  # nothing can be moved away from the meta device, which the end of a model does


def test_a_hint_of_another_size_is_cut_to_shape_and_scaled(comfy, tmp_path):
    net = unet()
    tuner = build(net, "scedit", ("canny",))
    x, t, context = inputs(net)
    wide = images(1, size=(128, 192))
    [model] = comfy.load(comfy.patcher(net), saved(tmp_path, tuner), 1.0, hinted(comfy, ("", wide)))
    middle = torch.nn.functional.interpolate(wide[:, :, 32:160].movedim(-1, 1), size=(64, 64), mode="nearest-exact")
    wanted = expected(net, x, t, context, tuner, hints={"canny": middle.movedim(1, -1)})
    close(comfy.run(model, x, t, context), wanted)


def test_the_nodes_need_no_sctool():
    imports = [line for file in FOLDER.glob("*.py") for line in file.read_text().splitlines() if "import" in line]
    assert imports
    assert not any(re.match(r"\s*(from|import) sctool\b", line) for line in imports)


def test_the_list_has_the_tuners_of_models_sctool(comfy, tmp_path):
    saved(tmp_path, build(unet()))
    assert (tmp_path / "sctool" / "t.json").exists()
    assert comfy.node.INPUT_TYPES()["required"]["tuner"] == (["t.safetensors"],)


# ---------------------------------------------------------------------------------------------------------- errors


def refused(comfy, folder, tuner, match, net=None, hints=None):
    with pytest.raises(ValueError, match=match):
        comfy.load(comfy.patcher(net or unet()), saved(folder, tuner), 1.0, hints)


def test_hints_that_are_missing_or_unknown(comfy, tmp_path):
    net = unet()
    both = build(net, "scedit", ("canny", "color"))
    refused(comfy, tmp_path, both, r"needs a condition image \(canny, color\); connect a node 'sctool hint'")
    refused(comfy, tmp_path, both, "hint 'depth': t.safetensors has the conditions: canny, color", hints={"depth": 1})
    refused(comfy, tmp_path, build(net), "has the conditions: none", hints={"canny": 1})
    refused(comfy, tmp_path, build(net, "diffscaler", ("canny",)), "without conditions, hints or classes")
    with pytest.raises(ValueError, match="condition 'canny' has two images"):
        hinted(comfy, ("canny", images(1)), (" canny", images(2)))
    none = hinted(comfy, ("canny", images(1), 0.0))
    [model] = comfy.load(comfy.patcher(net), saved(tmp_path, both), 1.0, none)
    with pytest.raises(ValueError, match="weights of the sctool hints sum to 0"):
        comfy.run(model, *inputs(net))


def test_a_tuner_of_another_base(comfy, tmp_path):
    wide = unet(block_out_channels=(32, 64, 96, 96))
    message = "t.safetensors was made for base-a and does not fit this model: "
    refused(comfy, tmp_path, build(wide), f"{message}skip 7 is 96 in the file and 64 here")
    refused(comfy, tmp_path, build(unet()), f"{message}skip 9 is 64 in the file and absent here", sdxl())
    text = unet(cross_attention_dim=16)
    whole = {"layers": ("whole",)}
    refused(
        comfy, tmp_path, build(text, "diffscaler", **whole), f"{message}.*attn2.to_k is 16 to 32 in .* 8 to 32 here"
    )
    last = build(unet(), "diffscaler", layers=(r"^down_blocks\.3",))
    refused(comfy, tmp_path, last, f"{message}down_blocks.3.* is 64 to 64 in the file and absent here", sdxl())
    model = comfy.patcher(unet())
    model.model.model_config = types.SimpleNamespace(unet_config={"image_model": "flux"})
    with pytest.raises(ValueError, match=r"t\.safetensors is for U-Nets .* this model is a UNetModel"):
        comfy.load(model, saved(tmp_path, build(unet())), 1.0)


def test_files_that_are_not_for_this_node(comfy, tmp_path):
    net = unet()
    model = comfy.patcher(net)
    export = "method lora; this node takes scedit, diffscaler. .*Load LoRA reads it after `sctool export --to comfyui`"
    refused(comfy, tmp_path, build(net, "lora"), export)
    refused(comfy, tmp_path, build(net, "bitfit"), "method bitfit; .*sctool merge --into-base")
    file = tmp_path / "sctool" / "t.safetensors"
    file.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"t\.safetensors is not a safetensors file, or is damaged"):
        comfy.load(model, file.name, 1.0)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="was not written by sctool"):
        comfy.load(model, file.name, 1.0)


def test_skips_that_another_node_resizes(comfy, tmp_path):
    net = unet()
    tuner = build(net, "scedit", ("canny",))
    [model] = comfy.load(comfy.patcher(net), saved(tmp_path, tuner), 1.0, hinted(comfy, ("", images(1))))
    [edit] = model.model_options["transformer_options"]["patches"]["output_block_patch"]
    options = {**model.model_options["transformer_options"], "original_shape": [1, 4, 8, 8], "block": ("output", 11)}
    skip = torch.zeros(1, 32, 4, 4)
    with pytest.raises(ValueError, match="another node resizes the U-Net"):
        edit(skip, skip, options)
