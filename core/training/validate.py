"""Validation during training: held-out loss by timestep, control adherence, preview grids.

Noise, timesteps and seeds are the same every time, so that curves move because the tuner does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backbones.loading import Backbone
from ..backbones.noising import Noising
from ..config import SampleConfig, TrainConfig
from ..data.prepared import PreparedSet
from ..data.streaming.serving import StreamedSet
from ..progress import Progress
from ..runs import Run
from ..sampling import Request, sample_images
from ..sheets import save_png, sheet
from .batches import Draw, collate, validation_draw
from .lanes import Distance, Measures

BANDS = 4  # quarters of the noise schedule: from fine detail (0) to composition (3)
PREVIEWS = 4
ADHERENCE_IMAGES = 16
DISTANCE_IMAGES = 64
LOSS_BATCH = 16
SMALL_RESOLUTION = 128  # up to which 16 images are drawn at a time; larger ones 4

Losses = Callable[[Mapping[str, Any], Draw], Tensor]


class Validator:
    """Measures one run, or one of its tasks, on its held-out images; does nothing where there are none."""

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        backbone: Backbone,
        held_out: PreparedSet | StreamedSet | None,
        measures: Measures,
        progress: Progress,
        distance: Distance | None = None,
    ) -> None:
        self.config, self.run, self.backbone, self.held_out = config, run, backbone, held_out
        self.measures = {name: measures[name] for name in config.conditions if name in measures}
        self.progress, self.named = progress, f"val/{run.task}/" if run.task else "val/"
        at_once = 16 if backbone.resolution <= SMALL_RESOLUTION else 4
        self.sampling = SampleConfig(
            steps=config.preview_steps, guidance=config.guidance, size=config.size, batch=at_once
        )
        self.base: list[np.ndarray] = []
        self.distance, self.theirs = distance if config.validate_every else None, list[np.ndarray]()
        self.rows, self.requests = self._requests()

    def _requests(self) -> tuple[dict[str, dict[str, Tensor]], list[Request]]:
        """Cached conditioning rows by caption, and what is drawn: held-out captions with their hints."""
        if self.held_out is None:
            return {}, []
        count = DISTANCE_IMAGES if self.distance else ADHERENCE_IMAGES if self.measures else PREVIEWS
        items = [self.held_out[i] for i in range(min(count, len(self.held_out)))]
        rows = {"": self.held_out.null_rows, **{item["caption"]: item["text"] for item in items}}
        requests = []
        for seed, item in enumerate(items):
            hints = {name: hint.permute(1, 2, 0).numpy() for name, hint in item["hints"].items()}
            requests.append(Request(item["caption"], seed, hints, key=item["key"], task=self.run.task))
        return rows, requests

    def encode(self, captions: list[str]) -> dict[str, Tensor]:
        """Cached conditioning rows of held-out captions."""
        rows = [self.rows[caption] for caption in captions]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def images(self, requests: Sequence[Request], backbone: Backbone | None = None) -> list[np.ndarray]:
        """Draws requests with whatever is attached to the backbone now; uint8 (H, W, 3) each."""
        drawn = sample_images(backbone or self.backbone, requests, self.sampling, encode=self.encode)
        return [image for _, image in drawn]

    def draw_base(self, base: Backbone) -> None:
        """The images of `base` that ours are compared to; call before tuners are attached."""
        if self.requests and (self.config.sample_every or self.distance):
            self.progress.note("drawing the base model's previews")
            shown = self.requests if self.distance else self.requests[:PREVIEWS]
            self.theirs = self.images([Request(r.prompt, r.seed) for r in shown], base)
            self.base = self.theirs[:PREVIEWS]

    def __call__(self, step: int, losses: Losses, noising: Noising) -> dict[str, float]:
        """Figures named val/... or val/TASK/... after `step` steps; writes preview/step-N.png when previews are due.

        losses(batch, draw) is the unweighted loss of each sample, (B,).
        """
        if self.held_out is None:
            return {}
        figures = self.loss_by_band(losses, noising)
        previews, adherence = self._due(step)
        if self.requests and (previews or adherence):
            images = self.images(self.requests if adherence or self.distance else self.requests[:PREVIEWS])
            if self.distance:
                figures |= {self.named + key: value for key, value in self.distance(images, self.theirs).items()}
            for name, measure in self.measures.items() if adherence else ():
                hints = [request.hints[name] for request in self.requests]
                figures |= {f"{self.named}{name}_{key}": value for key, value in measure(images, hints).items()}
            if previews:
                self.grid(step, images)
        shown = {key: round(value, 4) for key, value in figures.items() if "/loss_" not in key}
        self.progress.note(f"step {step}: " + ", ".join(f"{key} {value}" for key, value in shown.items()))
        return figures

    def _due(self, step: int) -> tuple[bool, bool]:
        """Whether previews, and whether adherence, are wanted after `step` steps."""
        every, last = self.config.sample_every, step == self.config.steps
        previews = bool(every) and (last or step % every == 0)
        return previews, bool(self.measures or self.distance) and bool(self.config.validate_every)

    @torch.no_grad()
    def loss_by_band(self, losses: Losses, noising: Noising) -> dict[str, float]:
        """Mean held-out loss, in all and for each quarter of the schedule."""
        assert self.held_out is not None
        sums = torch.zeros(BANDS, dtype=torch.float64)
        size = min(self.config.batch, LOSS_BATCH)
        for first in range(0, len(self.held_out), size):
            batch = collate([self.held_out[i] for i in range(first, min(first + size, len(self.held_out)))])
            count, *latent = batch["mean"].shape
            for band in range(BANDS):
                draw = validation_draw(self.config, first, count, latent, noising, band, BANDS)
                sums[band] += losses(batch, draw).double().sum().cpu()
        means = sums / len(self.held_out)
        bands = {f"{self.named}loss_{band}": float(value) for band, value in enumerate(means)}
        return {f"{self.named}loss": float(means.mean()), **bands}

    def grid(self, step: int, images: Sequence[np.ndarray]) -> None:
        """samples/preview/step-N.png: base on the left, hints, tuned on the right."""
        rows, captions = [], []
        for base, request, image in zip(self.base, self.requests, images, strict=False):
            rows.append([base, *request.hints.values(), image])
            captions.append(request.prompt[:70])
        headings = ["base", *self.requests[0].hints, "tuned"]
        image = sheet(rows, headings, captions, f"{self.run.title}, step {step}")
        save_png(image, self.run.samples / "preview" / f"step-{step}.png")
