"""Training at each level: exact resume, two processes, the compiler, a level that fits a card, and the estimate."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sctool.annotators.training_sets import open_training_sets
from sctool.core.config import LEVELS, TrainConfig, card_bytes
from sctool.core.errors import UsageError
from sctool.core.resolving import build as resolved
from sctool.core.runs import Run, open_run
from sctool.core.training.memory import RESERVE, Estimate, Part, chosen_level, footprint
from sctool.core.training.model import build_model, compile_blocks
from sctool.core.training.plan import plan_run, show_plan
from sctool.core.training.train import train
from sctool.core.tuners import method_config, tuner_class

from ..tiny import unet
from ..training.crashing import crash_before_step

ROOT = Path(__file__).parents[3]
QUICK = {"steps": 4, "batch": 2, "save_every": 2, "validate_every": 0, "sample_every": 0, "lr": 1e-2}


def config(base: Path, data: Path, **more: object) -> TrainConfig:
    return TrainConfig(base=str(base), data=str(data), **{**QUICK, **more})  # pyright: ignore[reportArgumentType]


def trained(out: Path, settings: TrainConfig, quiet: bool = True) -> dict[str, torch.Tensor]:
    run = open_run(out, "run", settings)
    source, held_out, made = open_training_sets(settings, 32, quiet=True)
    train(settings, run, source, held_out=held_out, map_meta=made, quiet=quiet)
    return load_file(Run(out / "run").tuner)


@pytest.mark.parametrize(
    ("method", "memory", "cond"),
    [("scedit", "normal", ("canny",)), ("scedit", "lower", ("canny",)), ("lora", "low", ()), ("scedit", "minimum", ())],
    ids=str,
)
def test_a_crashed_run_ends_bit_identical(
    tiny_base: Path, edges: Path, tmp_path: Path, method: str, memory: str, cond: tuple[str, ...]
) -> None:
    settings = config(tiny_base, edges, method=method, memory=memory, cond=cond)
    straight = trained(tmp_path / "a", settings)
    with crash_before_step(3):
        trained(tmp_path / "b", settings)
    resumed = trained(tmp_path / "b", settings)
    plain = trained(tmp_path / "c", settings.model_copy(update={"memory": "plain"}))
    assert straight.keys() == resumed.keys() == plain.keys(), "a tuner file has the same names at every level"
    assert all(torch.equal(straight[name], value) for name, value in resumed.items())
    assert all(torch.allclose(straight[name], value, atol=1e-4) for name, value in plain.items())


PAIR = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[2])
from test_memory import model_and_inputs
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model, inputs = model_and_inputs(sys.argv[1])
latents, t, rows = inputs
own = slice(2 * rank, 2 * rank + 2)
net = DistributedDataParallel(model)
for _ in range(2):
    model.zero_grad()
    net(latents[own], t[own], {"prompt_embeds": rows["prompt_embeds"][own]}).square().mean().backward()
whole, (latents, t, rows) = model_and_inputs(sys.argv[1])
whole(latents, t, rows).square().mean().backward()
for one, other in zip(model.tuners.parameters(), whole.tuners.parameters(), strict=True):
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
torch.distributed.destroy_process_group()
"""


def model_and_inputs(level: Any, method: str = "scedit") -> tuple[Any, Any]:
    """A tuner on the tiny U-Net, the same at every call, and four samples."""
    net = unet()
    torch.manual_seed(1)
    tuner: Any = tuner_class(method).build(method_config(method, {}), net, (), vae_scale=4)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    latents, text = torch.randn(4, 4, 8, 8), torch.randn(4, 3, 8)
    model = build_model(net, tuner, level=level)
    return model, (latents, torch.tensor([3, 7, 500, 999]), {"prompt_embeds": text})


@pytest.mark.slow
@pytest.mark.parametrize("level", ["normal", "lower", "minimum"])
def test_two_processes_have_the_gradients_of_one(tmp_path: Path, level: str) -> None:
    package = tmp_path / "tests" / "core"
    (package / "lean").mkdir(parents=True)
    source = Path(__file__).read_text().replace("from ..tiny", "from tiny").replace("from ..training.", "from ")
    (package / "test_memory.py").write_text(source)
    for path in (Path(__file__).parents[1] / "tiny.py", Path(__file__).parents[1] / "training" / "crashing.py"):
        (package / path.name).write_text(path.read_text())
    script = tmp_path / "pair.py"
    script.write_text(PAIR)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    done = subprocess.run([*launch, str(script), level, str(package)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # the compiler's
@pytest.mark.parametrize("level", LEVELS)
def test_compiled_blocks_give_the_same(level: Any) -> None:
    model, inputs = model_and_inputs(level)
    out = model(*inputs)
    out.square().mean().backward()
    expected = [p.grad.clone() for p in model.tuners.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    assert compile_blocks(model.denoiser, backend="aot_eager") == sum(
        name.endswith("transformer_blocks.0") for name, _ in model.denoiser.named_modules()
    )
    compiled = model(*inputs)
    torch.testing.assert_close(compiled, out)
    compiled.square().mean().backward()
    for p, grad in zip(model.tuners.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------- a level for a card


def test_sizes_of_cards_and_wrong_levels() -> None:
    assert [card_bytes(text) for text in ("24GB", "7.5 gb", "low", "0GB")] == [24 * 10**9, 75 * 10**8, None, None]
    assert TrainConfig(memory="24GB").memory == "24GB"
    with pytest.raises(UsageError, match=r"memory=tiny.*minimum.*24GB"):
        TrainConfig(memory="tiny")


def test_the_setting_before_it_is_still_read() -> None:
    assert resolved(TrainConfig, {"checkpointing": True}).memory == "minimum"
    assert resolved(TrainConfig, {"checkpointing": False}).memory == "normal"
    assert resolved(TrainConfig, {"checkpointing": True, "memory": "low"}).memory == "low"
    assert "checkpointing" not in TrainConfig().model_dump()


def test_the_first_level_that_fits_is_chosen() -> None:
    needs = {"normal": 20e9, "low": 15e9, "lower": 12e9, "minimum": 8e9}
    asked = []

    def estimated(level: Any) -> Estimate:
        asked.append(level)
        return Estimate(level, {}, int(needs[level]))

    assert chosen_level("low", estimated) == ("low", None)
    assert not asked, "a level that is named needs no estimate"
    for card, level in ((20e9 + RESERVE, "normal"), (20e9 + RESERVE - 1e7, "low"), (12e9 + RESERVE, "lower")):
        chosen, found = chosen_level(f"{card / 1e9}GB", estimated)
        assert (chosen, found and found.level) == (level, level)
    assert chosen_level("24GB", estimated, extra=int(4e9))[0] == "low"
    with pytest.raises(UsageError, match=r"9\.5 GB even with memory=minimum. Lower batch"):
        chosen_level("9GB", estimated)


def test_a_dry_run_and_a_training_take_the_same_level(
    tiny_base: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = config(tiny_base, pictures, batch=2)
    source, held_out, _ = open_training_sets(settings, 32, quiet=True)
    totals = {}
    for level in LEVELS:
        figures = plan_run(settings.model_copy(update={"memory": level}), source, held_out)
        assert figures["memory_level"] == level
        assert f"memory     {level}, about" in show_plan(figures)
        totals[level] = figures["memory"]
    assert totals["plain"] > totals["normal"] > totals["low"] > totals["lower"]
    card = f"{(totals['low'] + RESERVE) / 1e9:.9f}GB"
    fitted = settings.model_copy(update={"memory": card, "steps": 1})
    assert plan_run(fitted, source, held_out)["memory_level"] == "low"
    trained(tmp_path, fitted, quiet=False)
    assert f"{card} of memory: training with memory=low, about 0.00 GB" in capfd.readouterr().err
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["step"] == 1


def test_a_footprint_is_that_of_real_tensors(tiny_base: Path) -> None:
    from sctool.core.backbones.loading import load_backbone
    from sctool.core.measure import LiveBytes, saved_bytes

    backbone = load_backbone(str(tiny_base), offline=True)
    tuner = tuner_class("scedit").build(method_config("scedit", {}), backbone.denoiser, (), backbone.vae_scale)
    side = 32 // backbone.vae_scale
    for level in LEVELS:
        found = footprint(Part(backbone, tuner, ()), 32, level)
        model = build_model(backbone.denoiser, tuner, level=level)
        rows = backbone.family.dummy_rows(backbone.denoiser.config, 1, "cpu")  # pyright: ignore[reportArgumentType]
        arguments = (torch.zeros(1, backbone.latent_channels, side, side), torch.zeros(1), rows)
        assert found.saved == pytest.approx(saved_bytes(model, partial(model, *arguments)), rel=0.02)
        with LiveBytes() as live:
            model(*arguments).square().mean().backward()
        grads = sum(p.grad.nbytes for p in tuner.parameters() if p.grad is not None)
        assert 0.98 * found.peak <= live.peak <= 1.02 * found.peak + grads
        tuner.zero_grad()
        model.attachment.detach()
    assert not list(backbone.denoiser.buffers())
