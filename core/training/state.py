"""Resume states: everything that a training needs to continue as if it had never stopped.

All random draws are functions of the seed and the step, so a state is weights, optimizer moments and a step number.
safetensors and JSON only; written as a whole folder or not at all.
"""

from __future__ import annotations

import json
import shutil

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from ..errors import SctoolError
from ..files import replacing_folder, save_tensors
from ..runs import Run

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    run: Run,
    step: int,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    scaler: torch.amp.GradScaler,
    keep: int,
    recent: list[list[float]],
) -> None:
    """Writes state/step-N and then removes the oldest states beyond `keep`. Raises `SctoolError` on a full disk.

    `recent` are the losses of the steps since the last row of the log.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    moments = {
        f"{name}:{kind}": optimizer.state[p][kind]
        for name, p in named.items()
        if p in optimizer.state
        for kind in MOMENTS
    }
    with replacing_folder(run.path / "state" / f"step-{step}") as folder:
        save_tensors({name: p.detach() for name, p in named.items()}, folder / "weights.safetensors")
        save_tensors(moments, folder / "optimizer.safetensors")
        if ema is not None:
            save_tensors(dict(zip(named, ema.shadow_params, strict=True)), folder / "ema.safetensors")
        meta = {
            "step": step,
            "scaler": scaler.state_dict(),
            "ema_steps": ema.optimization_step if ema else 0,
            "recent_losses": recent,
        }
        (folder / "state.json").write_text(json.dumps(meta))
    for old in run.states()[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load_state(
    run: Run,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    scaler: torch.amp.GradScaler,
) -> tuple[int, list[list[float]]]:
    """Restores the newest complete state in place; returns its step and the losses since the last row of the log.

    (0, []) where there is none. Moments take their parameter's memory layout, by which the fused optimizer pairs them.
    Raises `SctoolError` when the state does not fit the tuner.
    """
    states = run.states()
    if not states:
        return 0, []
    folder = states[-1]
    meta = json.loads((folder / "state.json").read_text())
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    weights, moments = load_file(folder / "weights.safetensors"), load_file(folder / "optimizer.safetensors")
    if set(weights) != set(named):
        raise SctoolError(f"{folder} holds another tuner's state; choose another --name or remove the folder.")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
            if f"{name}:exp_avg" in moments:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(meta["step"]), device=parameter.device if parameter.is_cuda else "cpu"),
                    **{kind: torch.empty_like(parameter).copy_(moments[f"{name}:{kind}"]) for kind in MOMENTS},
                }
        if ema is not None:
            averages = load_file(folder / "ema.safetensors")
            for name, average in zip(named, ema.shadow_params, strict=True):
                average.copy_(averages[name])
            ema.optimization_step = meta["ema_steps"]
    scaler.load_state_dict(meta["scaler"]) if meta["scaler"] else None
    return meta["step"], meta.get("recent_losses", [])
