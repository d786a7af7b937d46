"""The paper's parameter counts, to the last digit, on meta devices."""

import importlib.util
import json
from pathlib import Path

import pytest

from sctool.cli import run
from sctool.cli.methods import methods
from sctool.core.backbones.architectures import Architecture, architecture
from sctool.core.counting import class_row, count, counts
from sctool.core.errors import UsageError
from sctool.core.tuners import TUNERS


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
    ],
)
def test_sd15(sd15, unet, label, expected):
    method, variant = next((m, v) for m, row in TUNERS.items() for v in row.variants if v.label == label)
    assert count(sd15, method, variant, unet) == expected


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
    fitting = [
        v.label for v in variants if "skips" not in v.settings and "blocks" not in (v.settings.get("layers") or ())
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
