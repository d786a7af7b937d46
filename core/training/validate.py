"""What a training run looks at on its way: held-out loss by time step, control adherence, preview grids.

Noise, time steps and seeds are the same at every look, so that curves move because the tuner does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..backbones.loading import Backbone
from ..config import SampleConfig, TrainConfig
from ..data.prepared import PreparedSet
from ..progress import Progress
from ..runs import Run
from ..sampling import Request, draw
from ..sheets import save_png, sheet
from . import diffusion
from .batches import Draw, collate

if TYPE_CHECKING:
    from ..sites.wiring import TunedBackbone

BANDS = 4  # quarters of the noise schedule: from fine detail (0) to composition (3)
PREVIEWS = 4
ADHERENCE_PICTURES = 16


class Validator:
    """Measures one run on its held-out set; does nothing where there is none."""

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        backbone: Backbone,
        val: PreparedSet | None,
        measures: Mapping[str, Callable[..., dict[str, float]]],
        progress: Progress,
    ) -> None:
        self.config, self.run, self.backbone, self.val = config, run, backbone, val
        self.measures = {name: measures[name] for name in config.conditions if name in measures}
        self.progress = progress
        self.sampling = SampleConfig(steps=config.preview_steps, guidance=config.guidance, size=config.size)
        self.base: list[np.ndarray] = []
        count = min(ADHERENCE_PICTURES if self.measures else PREVIEWS, len(val)) if val is not None else 0
        items = [val[i] for i in range(count)] if val is not None else []
        self.texts = {item["caption"]: item["text"] for item in items}
        if val is not None:
            self.texts[""] = val.null_rows
        self.requests = [
            Request(
                item["caption"],
                seed,
                {n: h.permute(1, 2, 0).numpy() for n, h in item["hints"].items()},
                key=item["key"],
            )
            for seed, item in enumerate(items)
        ]

    def encode(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Cached text rows for held-out captions: {"prompt_embeds": (B, L, D), ...}."""
        rows = [self.texts[caption] for caption in captions]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def pictures(self, requests: Sequence[Request], batch: int = 16) -> list[np.ndarray]:
        """Draws requests with whatever is attached to the backbone now; uint8 (H, W, 3) each."""
        config = self.sampling.model_copy(update={"batch": batch if self.backbone.resolution <= 128 else 4})
        return [picture for _, picture in draw(self.backbone, requests, config, encode=self.encode)]

    def draw_base(self) -> None:
        """The untouched base's pictures for the previews' left column; call before tuners are attached."""
        if self.requests and self.config.sample_every:
            self.progress.note("drawing the base model's previews")
            bare = [Request(r.prompt, r.seed) for r in self.requests[:PREVIEWS]]
            self.base = self.pictures(bare)

    def __call__(
        self,
        step: int,
        model: TunedBackbone,
        losses: Callable[[Mapping[str, Any], Any], torch.Tensor],
    ) -> dict[str, float]:
        """Figures named val/...; writes samples/preview/step-N.png when previews are due."""
        if self.val is None:
            return {}
        figures = self.loss_by_band(losses)
        done = step == self.config.steps
        previews = bool(self.config.sample_every) and (done or step % self.config.sample_every == 0)
        due = bool(self.measures) and bool(self.config.validate_every)
        if self.requests and (previews or due):
            drawn = self.pictures(self.requests if due else self.requests[:PREVIEWS])
            for name, measure in self.measures.items() if due else ():
                kept = [r.hints[name] for r in self.requests]
                figures |= {f"val/{name}_{key}": value for key, value in measure(drawn, kept).items()}
            if previews:
                self.grid(step, drawn)
        shown = {k: round(v, 4) for k, v in figures.items() if "/loss_" not in k}
        self.progress.note(f"step {step}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
        return figures

    @torch.no_grad()
    def loss_by_band(self, losses: Callable[[Mapping[str, Any], Any], torch.Tensor]) -> dict[str, float]:
        """Mean held-out loss, in all and for each quarter of the schedule; the noise is fixed by the run's seed."""
        assert self.val is not None
        levels = self.backbone.pipe.scheduler.config.num_train_timesteps
        sums = torch.zeros(BANDS, dtype=torch.float64)
        size = min(self.config.batch, 16)
        for first in range(0, len(self.val), size):
            indices = range(first, min(first + size, len(self.val)))
            batch = collate([self.val[i] for i in indices])
            count = len(indices)
            for band in range(BANDS):
                g = diffusion.generator(self.config.seed, "validation", first, band)
                noise = torch.randn((2, count, *batch["mean"].shape[1:]), generator=g)
                t = torch.randint(band * levels // BANDS, (band + 1) * levels // BANDS, (count,), generator=g)
                never = torch.zeros(count, dtype=torch.bool)
                d = Draw(noise[0], noise[1], t, never, dict.fromkeys(self.config.conditions, never))
                sums[band] += losses(batch, d).double().sum().cpu()
        means = sums / len(self.val)
        return {"val/loss": float(means.mean()), **{f"val/loss_{b}": float(m) for b, m in enumerate(means)}}

    def grid(self, step: int, drawn: Sequence[np.ndarray]) -> None:
        """samples/preview/step-N.png: base on the left, hints, tuned on the right."""
        rows, captions = [], []
        for i, base in enumerate(self.base):
            request = self.requests[i]
            rows.append([base, *request.hints.values(), drawn[i]])
            captions.append(request.prompt[:70])
        image: Image.Image = sheet(
            rows, ["base", *self.requests[0].hints, "tuned"], captions, f"{self.run.name}, step {step}"
        )
        save_png(image, self.run.samples / "preview" / f"step-{step}.png")
