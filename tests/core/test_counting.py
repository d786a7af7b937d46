"""The paper's parameter counts, to the last digit, on meta devices."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sctool.cli import run
from sctool.cli.methods import methods
from sctool.core.backbones.architectures import Architecture, architecture
from sctool.core.counting import class_row, count, counts, parameters
from sctool.core.errors import UsageError
from sctool.core.tuners import TUNERS, method_config, tuner_class


@pytest.fixture(scope="module")
def sd15():
    return architecture("sd15")


@pytest.fixture(scope="module")
def unet(sd15):
    return sd15.denoiser()


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("full fine-tuning", 859_520_964),
        ("SC-Tuner", 19_680_000),
        ("SC-Tuner, ratio 1/5", 3_943_680),
        ("SC-Tuner, ratio 1/10", 1_976_640),
        ("SC-Tuner, skips 0,11", 3_484_800),
        ("SC-Tuner, skips 0,3,6,9,11", 7_790_080),
        ("SC-Tuner, conv", 22_129_200),
        ("SC-Tuner, ResPrefix", 21_636_480),
        ("CSC-Tuner, kernel 1", 28_824_400),
        ("CSC-Tuner, kernel 3", 99_111_760),
        ("CSC-Tuner, skips 0,3,4,6,7,9,11", 17_139_280),
        ("CSC-Tuner, dual conv", 37_821_136),
        ("CSC-Tuner, 2 conditions", 2 * 28_824_400),
        ("BitFit", 343_684),
        ("DiffFit", 443_844 + 37_440),  # biases and norms; scale factors
        ("LoRA", 1_594_368),
        ("LoRA, rank 64", 8 * 1_594_368),
        ("DoRA", 1_594_368 + 99_840),  # a magnitude for each row
        ("Uni-ControlNet, 7 conditions", 411_903_552),  # ELR-Diffusion's 1271M with the U-Net, see below
        ("Uni-ControlNet", 411_903_552 - 6 * 3 * 32 * 9),
    ],
)
def test_sd15(sd15, unet, label, expected):
    method, variant = next((m, v) for m, row in TUNERS.items() for v in row.variants if v.label == label)
    assert count(sd15, method, variant, unet) == expected


def test_uni_controlnets_figures_in_the_elr_paper(sd15, unet):
    variant = next(v for v in TUNERS["uni-controlnet"].variants if v.conditions == 7)
    tuner: Any = tuner_class("uni-controlnet").build(
        method_config("uni-controlnet", {}), unet, tuple(map(str, range(variant.conditions)))
    )
    whole = sum(p.numel() for p in unet.parameters()) + parameters(tuner)
    assert whole == 1_271_424_516, "1271M"
    assert parameters(tuner.extractor) == 8_211_392
    assert parameters(tuner.zero) == 11_479_680
    norms = [norm for block in tuner.copy.down_blocks for norm in (block.resnets[0].norm1, block.resnets[0].norm2)]
    assert sum(map(parameters, norms)) == 43_511_680
    assert parameters(tuner.copy) - 43_511_680 == 348_700_800


def test_elrs_updates_are_counted_by_their_formula(sd15, unet):
    copied = ("conv_in", "time_embedding", "down_blocks", "mid_block")
    layers = [
        (m.weight.shape[0], m.weight[0].numel())
        for name, m in unet.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and name.split(".")[0] in copied
    ]
    assert all(rows % 4 == 0 and columns % 4 == 0 for rows, columns in layers)
    of_rank = {rank: sum(4**3 + rank * (rows + columns) for rows, columns in layers) for rank in (1, 8, 32)}
    injection = 8_211_392 + 11_479_680 + 43_511_680
    full, low = TUNERS["elr"].variants[1:]
    assert count(sd15, "elr", full, unet) == of_rank[8] + injection == 66_655_584
    for rank, updates in of_rank.items():
        own = replace(full, settings={"rank": rank})
        assert count(sd15, "elr", own, unet) == updates + injection
    kept = count(sd15, "elr", low, unet) - of_rank[8]
    assert kept == pytest.approx(0.4225 * injection, rel=2e-3), "biases stay, ranks are rounded down"


def test_control_lora_on_sd21():
    base = architecture("sd21")
    small, large = TUNERS["controllora"].variants
    assert count(base, "controllora", large) == 21_524_288, "SCEdit's 21.52M"
    assert count(base, "controllora", small) < 7_000_000


def test_a_copied_encoder_that_is_shared_is_neither_stored_nor_counted(capsys):
    methods("sd15", as_json=True)
    rows = {row["variant"]: row for row in json.loads(capsys.readouterr().out)["methods"]}
    elr = rows["ELR stage II, 7 conditions"]
    assert elr["stored"] == elr["trainable"] == elr["total"] - 859_520_964
    assert rows["Uni-ControlNet, 7 conditions"]["total"] == 1_271_424_516
    assert rows["full fine-tuning"]["total"] == 859_520_964


def test_dit_xl_2():
    found = {row.variant.label: row.trainable for row in counts(architecture("dit-xl-2"))}
    blocks = 28 * 1152 * 15  # to_q, to_k, to_v, to_out: 1 each; ff: 4 and 1; norm1.linear: 6
    assert found["full fine-tuning"] == 674_834_720
    assert found["BitFit, DiT blocks only"] == blocks == 483_840
    assert found["BitFit"] == blocks + 1152 + 2 * 1152 + 2 * 1152 + 32  # patches, timestep, final norm, final layer
    assert found["DiffFit"] == found["BitFit"] + 28 * 2 * 1152
    assert found["LoRA, rank 64"] == 28 * 64 * 4 * 2 * 1152  # with q, k and v in one layer it is 12,386,304
    assert found["LoRA, rank 64, DiffScaler's layers"] == 51_830_784
    assert found["DoRA, rank 64, DiffScaler's layers"] == 51_830_784 + 486_144
    assert not [label for label in found if "Tuner" in label], "a DiT has no skip connections"


@pytest.mark.slow
def test_sdxl():
    found = {row.variant.label: row for row in counts(architecture("sdxl"))}
    assert found["full fine-tuning"].trainable == 2_567_463_684
    assert found["SC-Tuner"].trainable == 9_841_920
    assert found["SC-Tuner, ratio 1/10"].trainable == 989_376
    assert found["CSC-Tuner, kernel 1"].trainable == 14_800_480
    assert found["CSC-Tuner, kernel 3"].trainable == 45_930_080
    assert found["SC-Tuner"].percent == pytest.approx(0.3833, abs=1e-4)
    assert "SC-Tuner, skips 0,11" not in found  # SDXL has nine skips


def test_the_command_on_a_folder(tiny_base, capsys):
    methods(str(tiny_base), as_json=True)
    table = json.loads(capsys.readouterr().out)
    assert table["family"] == "sd"
    found = {row["variant"]: row["trainable"] for row in table["methods"]}
    assert found["SC-Tuner"] == sum(2 * c * c + 2 * c for c in [8] * 7 + [16] * 5)
    methods(str(tiny_base))
    assert f"{found['SC-Tuner']:,}" in capsys.readouterr().out


def test_unknown_bases_are_named(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'sdxl'"):
        architecture("sdx")
    with pytest.raises(UsageError, match="not a diffusers-format folder"):
        architecture(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UsageError, match=r"model_index\.json"):
        architecture(str(tmp_path))


def test_variants_that_a_base_does_not_allow_are_left_out_and_the_rest_counted():
    small = {
        "block_out_channels": (8, 16), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": 8, "attention_head_dim": 4,
    }  # fmt: skip
    base = Architecture("own", {"_class_name": "UNet2DConditionModel", **small}, 8)
    rows = {row.variant.label: row for row in counts(base)}
    variants = [variant for method in TUNERS.values() for variant in method.variants]
    others = {"ControlNet-XS"}  # is of U-Nets with two layers per block
    fitting = [
        v.label
        for v in variants
        if "skips" not in v.settings and "blocks" not in (v.settings.get("layers") or ()) and v.label not in others
    ]
    assert [label for label in rows if label in fitting] == fitting
    assert not [label for label in rows if "skips" in label], "this base has four skips"
    total = sum(p.numel() for p in base.denoiser().parameters())
    assert (rows["full fine-tuning"].trainable, rows["full fine-tuning"].percent) == (total, 100)
    skips = [8, 8, 8, 16]
    assert rows["SC-Tuner"].trainable == sum(2 * c * c + 2 * c for c in skips)
    assert rows["SC-Tuner"].percent == pytest.approx(100 * rows["SC-Tuner"].trainable / total)
    assert rows["CSC-Tuner, 2 conditions"].trainable == 2 * rows["CSC-Tuner, kernel 1"].trainable


def test_family():
    assert architecture("sdxl").family.name == "sdxl"
    assert Architecture("own", {}, 4).family.name == "sd"


@pytest.mark.slow
def test_a_step_of_sc_tuner_takes_at_most_61_percent_of_full_fine_tunings_flops(sd15):
    path = Path(__file__).parents[2] / "benchmarks" / "training.py"
    spec = importlib.util.spec_from_file_location("benchmark_training", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    full, tuner = (benchmark.counted(sd15, benchmark.METHODS[name], 64, memory=False) for name in ("full", "SC-Tuner"))
    assert full["gflop"] == pytest.approx(2469.8, abs=0.1)
    assert tuner["gflop"] <= 0.61 * full["gflop"]


def test_a_new_class_adds_a_row_of_each_table() -> None:
    assert class_row(architecture("dit-xl-2")) == 1152
    assert class_row(architecture("sd15")) == 0


def test_counts_are_per_task_and_are_never_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "--base", "dit-xl-2", "--tasks", "10"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.split()[:2] == ["DiffScaler", "diffscaler"])
    assert row.split()[2:] == ["48,674,445", "7.21", "486,744,450"]
    assert "adds 1,152" in out
    assert run(["methods", "--base", "dit-xl-2", "--tasks", "10", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["tasks"], shown["new_class"]) == (10, 1152)
    assert shown["methods"][0]["stored"] == 6_748_347_200
