"""Students: low-rank layers that equal the original at full rank, exact sizes, folders that are bases."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sctool.core.backbones.architectures import KNOWN, architecture
from sctool.core.backbones.families import FAMILIES, family_of_denoiser
from sctool.core.backbones.loading import Backbone, load_backbone
from sctool.core.backbones.noising import Noising
from sctool.core.backbones.thin import THIN, ThinConv2d, ThinLinear, make_dense, make_thin, thin
from sctool.core.checkpoint import load_tuner, save_tuner
from sctool.core.config import StudentConfig
from sctool.core.distilling.calibrating import answers, calibrate, start_error
from sctool.core.distilling.factorising import (
    as_matrix,
    decompose,
    factorised,
    factors,
    input_moments,
    layers_to_divide,
    root,
    singular_values,
    svd,
    unwhitened,
    whitened,
)
from sctool.core.distilling.making import make, save_student
from sctool.core.distilling.pruning import SIZES, pruned
from sctool.core.distilling.ranks import TOLERANCE, by_energy, by_map, by_ratio, fixed_size, size
from sctool.core.errors import DoesNotFit, SctoolError, UsageError
from sctool.core.merging.measuring import fixed_batch, outputs
from sctool.core.sites.attaching import TunedBackbone
from sctool.core.tuners import TUNERS, method_config, tuner_class

from ..tiny import dit, unet

QUICK = StudentConfig(start="balanced")
"""The default size without calibration."""
LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(7, 5),
    "linear without bias": lambda: nn.Linear(5, 9, bias=False),
    "1x1": lambda: nn.Conv2d(6, 5, 1),
    "3x3": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "stride 2": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "oblong": lambda: nn.Conv2d(4, 3, (3, 5), stride=(2, 1), padding=(1, 2)),
}


@pytest.mark.parametrize("start", ["balanced", "paper", "whitened"])
@pytest.mark.parametrize("form", ["flat", "spatial"])
@pytest.mark.parametrize("kind", LAYERS)
def test_full_rank_is_the_original(kind: str, form: Any, start: Any) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    linear = isinstance(layer, nn.Linear)
    x = torch.randn(3, 4, layer.in_features) if linear else torch.randn(3, layer.in_channels, 9, 11)
    x = x.double()
    width = x.shape[-1] if linear else x.shape[1]
    root = torch.randn(width, width).double()
    moment = root @ root.T if start == "whitened" else None
    own = factorised(layer, min(layer.weight.shape) if linear else _full(layer, form), form, start, moment)
    torch.testing.assert_close(own(x), layer(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(own.weight, layer.weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(make_dense(nn.Sequential(own))[0](x), own(x), rtol=0, atol=1e-10)
    low = factorised(layer, 2, form, start, moment)
    expected = nn.functional.linear(x, low.weight, low.bias) if linear else nn.functional.conv2d(
        x, low.weight, low.bias, layer.stride, layer.padding
    )  # fmt: skip
    torch.testing.assert_close(low(x), expected, rtol=0, atol=1e-10)
    assert (low.weight - layer.weight).abs().max() > 1e-3


def _full(layer: nn.Conv2d, form: str) -> int:
    high, wide = layer.kernel_size
    flat = (layer.out_channels, layer.in_channels * high * wide)
    return min(flat if form == "flat" else (layer.out_channels * wide, layer.in_channels * high))


def test_the_start_is_the_best_of_its_rank_and_balanced() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 9).double()
    values = torch.linalg.svdvals(matrix)
    for start in ("balanced", "paper"):
        up, down = factors(matrix, 4, start)  # type: ignore[arg-type]
        torch.testing.assert_close((matrix - up @ down).norm(), values[4:].norm())
        lengths = up.norm(dim=0), down.norm(dim=1)
        torch.testing.assert_close(*(lengths if start == "balanced" else (lengths[1], torch.ones(4).double())))


def test_whitening_makes_the_output_s_error_smallest() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16).double()
    x = torch.randn(500, 16).double() * torch.logspace(0, -2, 16).double()
    moments = input_moments(nn.ModuleDict({"0": layer}), ["0"], lambda: layer(x))
    torch.testing.assert_close(moments["0"], x.T @ x / len(x), rtol=1e-5, atol=1e-7)
    plain, white = (factorised(layer, 4, "flat", start, moments["0"]) for start in ("balanced", "whitened"))
    plain = factorised(layer, 4)
    errors = [(own(x) - layer(x)).square().mean() for own in (plain, white)]
    assert errors[1] < 0.5 * errors[0]
    best = torch.linalg.svdvals(x @ layer.weight.T)[4:].square().sum() / x.shape[0] / 16
    torch.testing.assert_close(errors[1], best, rtol=2e-2, atol=0)


@pytest.mark.parametrize("form", ["flat", "spatial"])
def test_whitening_treats_the_taps_of_a_channel_alike(form: Any) -> None:
    torch.manual_seed(0)
    matrix = as_matrix(torch.randn(5, 4, 3, 3).double(), form)
    wide = torch.randn(4, 9).double()
    lower, taps = root(wide @ wide.T), 9 if form == "flat" else 3
    torch.testing.assert_close(lower @ lower.T, wide @ wide.T, rtol=1e-3, atol=0.05)
    expected = matrix @ torch.kron(lower.contiguous(), torch.eye(taps).double())
    torch.testing.assert_close(whitened(matrix, lower), expected)
    torch.testing.assert_close(unwhitened(expected, lower), matrix)


@pytest.mark.parametrize(("name", "most"), [("mini", 0.002), ("mini-dit", 0.02)])
def test_a_budget_by_the_outputs_energy_starts_next_to_its_teacher(name: str, most: float) -> None:
    base = load_backbone(name)
    _, ordinary = make(base, StudentConfig(ratio=0.4225, start="whitened"))
    denoiser, student = make(base, StudentConfig(budget=0.4225, start="whitened"))
    before, after = (sum(p.numel() for p in net.parameters()) for net in (base.denoiser, denoiser))
    assert (1 - TOLERANCE) * 0.4225 * before <= after <= 0.4225 * before
    assert student.start_error is not None
    assert ordinary.start_error is not None
    assert student.start_error < min(most, ordinary.start_error / 2)


def test_sdxl_is_told_the_size_of_what_is_drawn() -> None:
    extra = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 2,
        "projection_class_embeddings_input_dim": 16,
    }
    net = unet(**extra)

    class Base:
        """As much of a backbone as is asked for; it has no folder."""

        family, denoiser, device, vae_scale, latent_channels = FAMILIES[1], net, torch.device("cpu"), 4, 4
        resolution, labels = 32, ()

        def noising(self) -> Noising:
            return Noising({"prediction_type": "epsilon"})

        def with_classes(self, classes: Any) -> Base:
            return self

        def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
            return {"prompt_embeds": torch.randn(len(prompts), 3, 8), "pooled": torch.randn(len(prompts), 4)}

    base: Any = Base()
    names = layers_to_divide(net)
    moments = calibrate(base, names)
    assert moments.keys() == names.keys()
    student = decompose(copy.deepcopy(net), by_ratio(names, 0.5), "flat", "whitened", moments)
    assert start_error(base, student) > 0
    assert next(outputs(base, fixed_batch(base, ()), [], [])).shape == (4, 4, 8, 8)


@pytest.mark.parametrize("name", ["mini", "mini-dit"])
def test_calibration_goes_over_the_whole_schedule_and_starts_are_measured_on_other_draws(name: str) -> None:
    base = load_backbone(name)
    seen, again = (torch.cat([one.t for one in answers(base)]) for _ in range(2))
    assert torch.equal(seen, again)
    levels = base.noising().levels
    assert len(seen.unique()) > 100, "nearly every image has timesteps of its own"
    assert torch.histc(seen.float(), 8, 0, levels).min() >= 8
    assert start_error(base, base.denoiser) == 0
    nothing = copy.deepcopy(base.denoiser)
    with torch.no_grad():
        for parameter in nothing.parameters():
            parameter.zero_()
    assert start_error(base, nothing) == 1
    plain, white = (make(base, StudentConfig(start=start))[1].start_error for start in ("balanced", "whitened"))
    assert plain is not None
    assert white is not None
    assert white < 0.6 * plain


# ------------------------------------------------------------------------------------------------------------ sizes


def test_the_papers_sizes() -> None:
    known = architecture("sd21")
    denoiser = known.denoiser()
    rest = 340_387_840 + 83_653_863  # text encoder and autoencoder
    assert sum(p.numel() for p in denoiser.parameters()) + rest == 1_289_952_427
    for form in ("flat", "spatial"):
        layers = layers_to_divide(denoiser)
        ranks = by_ratio(layers, 0.4225, form)  # type: ignore[arg-type]
        total = fixed_size(denoiser, layers) + size(layers, ranks, form) + rest  # type: ignore[arg-type]
        assert abs(total - 790_000_000) < 0.001 * 790_000_000
    counted = make_thin(denoiser, by_ratio(layers_to_divide(denoiser), 0.4225))
    assert sum(p.numel() for p in counted.parameters()) == 365_597_764


@pytest.mark.parametrize(
    ("base", "counts"),
    [("sd21", (583_480_964, 485_787_524, 326_825_604)), ("sd15", (579_384_964, 482_346_884, 323_384_964))],
)
def test_bk_sdm_s_sizes(base: str, counts: tuple) -> None:
    known = architecture(base)
    denoiser = known.denoiser()
    students = [pruned(denoiser, known.family, size) for size in SIZES]
    assert tuple(sum(p.numel() for p in student.parameters()) for student in students) == counts


def test_a_budget_is_met_and_shared_out_by_energy() -> None:
    net = unet()
    layers = layers_to_divide(net)
    fixed, whole = fixed_size(net, layers), sum(p.numel() for p in net.parameters())
    for share in (0.5, 0.8):
        budget = int(share * whole)
        ranks = by_energy(layers, budget, fixed)
        small = decompose(unet(), ranks)
        count = sum(p.numel() for p in small.parameters())
        assert count == fixed + size(layers, ranks)
        assert budget * (1 - 0.01) < count <= budget, "the units of so small a net are coarse"
    energies = {}
    for name, rank in ranks.items():
        values = torch.linalg.svdvals(layers[name].weight.double().flatten(1)).square()
        values = values / values.sum()
        p, q = layers[name].weight.shape[0], layers[name].weight[0].numel()
        energies[name] = (values[rank - 1] / (p + q), values[rank] / (p + q) if rank < len(values) else torch.zeros(()))
    kept, left = (min(e[0] for e in energies.values()), max(e[1] for e in energies.values()))
    assert left < 3 * kept, "no layer keeps a weak value where another leaves out a much stronger one"
    budget = int(0.5 * whole)
    ranks = by_energy(layers, budget, fixed)
    with torch.no_grad():
        layers["mid_block.resnets.0.conv1"].weight.mul_(100)
    assert by_energy(layers, budget, fixed) == ranks, "a layer's scale does not say how much it matters"
    for wrong in (whole, fixed):
        with pytest.raises(UsageError, match="cannot be met"):
            by_energy(layers, wrong, fixed)


def test_the_budget_of_a_real_base_is_met_to_half_a_thousandth() -> None:
    net = load_backbone("mini").denoiser
    layers = layers_to_divide(net)
    whole = sum(p.numel() for p in net.parameters())
    ranks = by_energy(layers, int(0.42 * whole), fixed_size(net, layers))
    count = fixed_size(net, layers) + size(layers, ranks)
    assert (1 - TOLERANCE) * 0.42 * whole <= count <= 0.42 * whole


def test_ranks_written_down() -> None:
    layers = layers_to_divide(unet())
    ranks = by_map(layers, {"down_blocks.*conv1": 3, "mid_block.resnets.0.conv1": 2})
    assert ranks["mid_block.resnets.0.conv1"] == 2
    assert {rank for name, rank in ranks.items() if name.startswith("down_blocks")} == {3}
    for wanted, message in (({"nothing": 2}, "matches no layer"), ({"mid.*": 0}, "whole number"), ({"(": 1}, "valid"),
                            ({"mid_block.resnets.0.conv1": 1000}, "saves nothing")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            by_map(layers, wanted)
    for ratio in (0.0, 1.0, -1.0):
        with pytest.raises(UsageError, match="between 0 and 1"):
            by_ratio(layers, ratio)


# -------------------------------------------------------------------------------------------- what acts on students


def student_net(make_net: Any, form: Any = "flat") -> nn.Module:
    net = make_net()
    return decompose(net, by_ratio(layers_to_divide(net), 0.5, form), form).requires_grad_(False)


DEEP: Any = functools.partial(unet, layers_per_block=2, block_out_channels=(20, 40))
"""diffusers' ControlNet-XS is of U-Nets with two layers per block."""


@pytest.mark.parametrize("form", ["flat", "spatial"])
@pytest.mark.parametrize("method", TUNERS)
def test_every_method_trains_on_a_student(method: str, form: Any) -> None:
    net = student_net(DEEP if method == "controlnet-xs" else unet, form)
    names = ("canny",) if TUNERS[method].control == "required" else ()
    state, frozen = copy.deepcopy(net.state_dict()), list(net.parameters())
    torch.manual_seed(1)
    tuner = tuner_class(method).build(method_config(method, {}), net, names, 4)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), {"prompt_embeds": torch.randn(2, 3, 8)}
    hints = {name: torch.rand(2, 3, 32, 32) for name in names}
    family = family_of_denoiser(net.config)  # type: ignore[arg-type]
    base = family.output(net, *inputs)
    model = TunedBackbone(net, tuner)
    # ControlNet-XS copies the time embedding, multiplied out: another order of sums
    torch.testing.assert_close(model(*inputs, hints or None), base, rtol=0, atol=1e-5 * (method == "controlnet-xs"))
    optimizer = torch.optim.SGD(tuner.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(*inputs, hints or None).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert (model(*inputs, hints or None) - base).abs().max() > 1e-6
        for parameter in tuner.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    optimizer.zero_grad()
    model(*inputs, hints or None).square().mean().backward()
    assert [name for name, p in tuner.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in frozen)
    model.attachment.detach()
    assert torch.equal(family.output(net, *inputs), base)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert not any(name.endswith((".down", ".up")) for name, _ in net.named_modules()), "factors are no layers"


@pytest.mark.parametrize("method", ["full", "bitfit", "lora", "dora", "lokr", "diffscaler"])
def test_layer_methods_train_on_a_transformer_s_student(method: str) -> None:
    net = student_net(functools.partial(dit, tied=True))
    torch.manual_seed(1)
    tuner = tuner_class(method).build(method_config(method, {}), net, (), 4)
    family = family_of_denoiser({**net.config, "_class_name": type(net).__name__})  # type: ignore[dict-item]
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), {"label": torch.tensor([0, 3])}
    base = family.output(net, *inputs)
    model = TunedBackbone(net, tuner)
    assert torch.equal(model(*inputs), base)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model(*inputs).square().mean().backward()
    assert [name for name, p in tuner.named_parameters() if p.grad is None or not p.grad.any()] == []
    model.attachment.detach()
    assert torch.equal(family.output(net, *inputs), base)


def test_layers_have_the_teacher_s_names_and_widths() -> None:
    for make_net, form in itertools.product((unet, dit), ("flat", "spatial")):
        teacher, student = make_net(), student_net(make_net, form)
        ours, theirs = (
            {name: type(module).__mro__[-3:] for name, module in net.named_modules()} for net in (student, teacher)
        )
        assert ours.keys() == theirs.keys()
        assert any(isinstance(module, THIN) for module in student.modules())


def test_the_dense_student_is_the_student() -> None:
    for make_net in (unet, lambda: dit(tied=True)):
        net = student_net(make_net).double()
        family = family_of_denoiser({**net.config, "_class_name": type(net).__name__})  # type: ignore[arg-type]
        rows = {"label": torch.tensor([0, 3])} if family.by_class else {"prompt_embeds": torch.randn(2, 3, 8).double()}
        inputs = torch.randn(2, 4, 8, 8).double(), torch.tensor([3, 700]), rows
        expected = family.output(net, *inputs)
        stock = make_dense(net)
        assert not any(isinstance(module, THIN) for module in stock.modules())
        torch.testing.assert_close(family.output(stock, *inputs), expected, rtol=0, atol=1e-10)
        assert stock.state_dict().keys() == make_net().state_dict().keys()


# ---------------------------------------------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Backbone:
    return load_backbone(str(tiny_base))


SETTINGS = {
    "flat": {}, "spatial": {"form": "spatial"}, "whitened": {"start": "whitened"}, "budget": {"budget": 0.6},
    "ranks": {"ranks": {"mid_block.*conv1": 2}}, "kept": {"untouched": ("down_blocks",), "ratio": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_a_student_s_folder_is_a_base(case: str, base: Backbone, tmp_path: Path) -> None:
    denoiser, student = make(base, StudentConfig(**{"start": "balanced", **SETTINGS[case]}))  # type: ignore[arg-type]
    folder = save_student(tmp_path / "student", base, denoiser, student, "---\nlicense: mit\n---\n")
    loaded = load_backbone(str(folder))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), base.encode_prompts(["", "a photo"])
    expected = base.family.output(denoiser, *inputs)
    assert torch.equal(loaded.family.output(loaded.denoiser, *inputs), expected)
    assert loaded.ancestors == (base.hash,)
    assert loaded.licence == "mit"
    assert loaded.student == student
    assert student.start_error == pytest.approx(start_error(base, loaded.denoiser), abs=1e-6)
    count = sum(p.numel() for p in denoiser.parameters())
    assert sum(p.numel() for p in architecture(str(folder)).denoiser().parameters()) == count
    assert count < sum(p.numel() for p in base.denoiser.parameters())
    if case == "kept":
        assert not any(name.startswith("down_blocks") for name in student.ranks)


def test_a_teacher_s_tuner_is_taken_by_its_student_and_no_other(base: Backbone, tmp_path: Path) -> None:
    tuner = tuner_class("scedit").build(method_config("scedit", {}), base.denoiser, ("canny",), base.vae_scale)
    file = save_tuner(tmp_path / "tuner", tuner, base)
    denoiser, student = make(base, QUICK)
    folder = save_student(tmp_path / "student", base, denoiser, student, "")
    loaded = load_backbone(str(folder))
    load_tuner(file, loaded)
    smaller, second = make(loaded, StudentConfig(ratio=0.2, start="balanced"))
    grandchild = load_backbone(str(save_student(tmp_path / "second", loaded, smaller, second, "")))
    assert grandchild.ancestors == (loaded.hash, base.hash)
    load_tuner(file, grandchild)
    own = save_tuner(tmp_path / "own", tuner, loaded)
    with pytest.raises(SctoolError, match="was trained on base"):
        load_tuner(own, base)


def test_a_student_has_fewer_parameters_than_its_teacher(base: Backbone, tmp_path: Path) -> None:
    denoiser, student = make(base, StudentConfig(ratio=0.3, start="balanced"))
    loaded = load_backbone(str(save_student(tmp_path / "student", base, denoiser, student, "")))
    with pytest.raises(UsageError, match="a student is smaller"):
        make(loaded, StudentConfig(ratio=0.9, start="balanced"))


def test_a_damaged_student_is_refused_with_the_file_s_name(base: Backbone, tmp_path: Path) -> None:
    denoiser, student = make(base, QUICK)
    folder = save_student(tmp_path / "student", base, denoiser, student, "")
    file = folder / "student.json"
    good = json.loads(file.read_text())
    name = next(iter(good["ranks"]))
    wrong = [
        ("{", "student.json cannot be read"), (json.dumps({**good, "format": 9}), "another version"),
        (json.dumps({**good, "ranks": {**good["ranks"], name: good["ranks"][name] + 1}}), "do not fit student.json"),
        (json.dumps({**good, "ranks": {**good["ranks"], "down_blocks.7": 1}}), "'down_blocks.7', which is no linear"),
        (json.dumps({**good, "ranks": {**good["ranks"], "conv_norm_out": 1}}), "'conv_norm_out', which is no linear"),
        *((json.dumps({**good, "ranks": {name: rank}}), "not a whole number") for rank in (0, -1, "3")),
        (json.dumps({**good, "ranks": [1]}), "cannot be read"), (json.dumps({**good, "form": "x"}), "form 'x'"),
        (json.dumps({**good, "ancestors": ["abc"]}), "not SHA-256"),
    ]  # fmt: skip
    for text, message in wrong:
        file.write_text(text)
        with pytest.raises(SctoolError, match=message):
            load_backbone(str(folder))
        if "do not fit" not in message:  # shapes alone are built without weights
            with pytest.raises(UsageError, match=message):
                architecture(str(folder)).denoiser()


def test_a_student_of_half_precision_files_stands_alone(tiny_base: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(tiny_base, tmp_path / "teacher")
    for file in list(teacher.glob("*/*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    (teacher / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    base = load_backbone(str(teacher))
    denoiser, student = make(base, QUICK)
    folder = save_student(tmp_path / "student", base, denoiser, student, "")
    assert load_backbone(str(folder)).vae_hash == base.vae_hash
    assert not [file for file in folder.rglob("*") if ".fp16." in file.name or file.suffix == ".bin"]
    (teacher / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(
        (teacher / "vae" / "diffusion_pytorch_model.fp16.safetensors").read_bytes()
    )
    both = save_student(tmp_path / "both", base, denoiser, student, "")
    assert [file.name for file in (both / "vae").glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]


def test_embedders_that_differ_are_not_made_one(tmp_path: Path) -> None:
    base = load_backbone("mini-dit")
    block = base.denoiser.transformer_blocks[1]  # type: ignore[index]
    block.norm1.emb = copy.deepcopy(block.norm1.emb)
    with pytest.raises(DoesNotFit, match="embedders differ"):
        make(base, QUICK)


def test_a_low_rank_student_is_densified_before_it_is_pruned() -> None:
    base = load_backbone("mini")
    denoiser, _ = make(base, QUICK)
    with base.replaced(denoiser), pytest.raises(DoesNotFit, match="densify it first"):
        make(base, StudentConfig(prune="small"))


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (6, 200), (200, 6)])
def test_the_decomposition_by_a_triangular_factor_is_the_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    left, values, right = svd(matrix)
    torch.testing.assert_close(left * values @ right, matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(singular_values(matrix), values, rtol=1e-12, atol=1e-12)
    unit = torch.eye(min(shape)).double()
    torch.testing.assert_close(left.mT @ left, unit, rtol=0, atol=1e-12)
    torch.testing.assert_close(right @ right.mT, unit, rtol=0, atol=1e-12)


def test_pruning_fits_only_such_u_nets() -> None:
    family = family_of_denoiser(KNOWN["sd15"])
    for net in (dit(), unet()):  # no U-Net; a single layer per block
        with pytest.raises(DoesNotFit, match="two layers per encoder block"):
            pruned(net, family, "small")
    uneven = unet(layers_per_block=2, block_out_channels=(8, 16))
    assert sum(p.numel() for p in pruned(uneven, family, "small").parameters()) > 0
    with pytest.raises(DoesNotFit, match="two innermost stages of equal width"):
        pruned(uneven, family, "tiny")


def test_thin_layers_say_what_they_are() -> None:
    assert isinstance(thin(nn.Linear(8, 8), 2), ThinLinear)
    conv = thin(nn.Conv2d(8, 8, 3, padding=1), 2, "spatial")
    assert isinstance(conv, ThinConv2d)
    assert "rank=2, form=spatial" in repr(conv)
