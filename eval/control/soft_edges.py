"""Soft edge adherence: SSIM and MS-SSIM between the HED map of the drawn image and the hint.

SSIM: Wang et al. 2004 (IEEE TIP 13(4)), Gaussian window of 11 px, sigma 1.5. MS-SSIM: Wang, Simoncelli & Bovik 2003
(ACSSC), five scales, computed as torchmetrics does (the last scale's borders reflected), since published figures
of control methods use it. Maps in 0..1, data range 1.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor

from ...core.errors import SctoolError
from ..metrics import FigureInfo
from .base import ControlScore, grey

WINDOW, SIGMA = 11, 1.5
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the five scales, finest first
SMALLEST = WINDOW * 2 ** (len(WEIGHTS) - 1)
"""Shortest side in pixels of an image that has five scales."""
C1, C2 = 0.01**2, 0.03**2


class SoftEdgeScore(ControlScore):
    """Means over images; MS-SSIM over those that are large enough for its five scales."""

    cond = "hed"
    figure_info: ClassVar[dict[str, FigureInfo]] = {
        "ssim": FigureInfo("SSIM", "higher"),
        "ms_ssim": FigureInfo("MS-SSIM", "higher"),
    }

    def update_maps(self, extracted: np.ndarray, target: np.ndarray, position: int | None = None) -> None:
        """Adds an image's map (H, W) and its hint, uint8. Raises `SctoolError` below 11 px."""
        self.check_size(extracted, target)
        p, g = (grey(map).astype(np.float64) / 255 for map in (extracted, target))
        if min(p.shape) < WINDOW:
            raise SctoolError(f"SSIM needs images of at least {WINDOW} px per side; this one is {p.shape}.")
        ssim = structural_similarity(
            p, g, data_range=1, gaussian_weights=True, sigma=SIGMA, use_sample_covariance=False
        )
        large = min(p.shape) >= SMALLEST
        self.add((1, ssim, large, ms_ssim(p, g) if large else 0), position)

    def figures(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """ "ssim", "ms_ssim"."""
        return {"ssim": sums[..., 1] / sums[..., 0], "ms_ssim": sums[..., 3] / sums[..., 2]}

    def notes(self) -> list[str]:
        """As in the base class, and how many images are too small for MS-SSIM."""
        small = sum(not row[2] for row in self._rows)
        note = f"hed: MS-SSIM needs at least {SMALLEST} px per side; {small} images are smaller and have none."
        return super().notes() + ([note] if small else [])


def ms_ssim(p: np.ndarray, g: np.ndarray) -> float:
    """MS-SSIM of two maps (H, W) in 0..1, at least `SMALLEST` px per side. Negative terms count as 0."""
    x, y = (torch.from_numpy(map)[None, None] for map in (p, g))
    product = 1.0
    for scale, weight in enumerate(WEIGHTS):
        last = scale == len(WEIGHTS) - 1
        luminance, contrast = _terms(x, y, reflect=last)
        term = (luminance * contrast if last else contrast).mean()
        product *= max(float(term), 0.0) ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return product


def _terms(x: Tensor, y: Tensor, reflect: bool) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure terms of float64 (1, 1, H, W), with reflected borders or without."""
    reach = WINDOW // 2
    if reflect:
        x, y = (F.pad(map, (reach,) * 4, mode="reflect") for map in (x, y))
    line = torch.exp(-((torch.arange(WINDOW, dtype=x.dtype) - reach) ** 2) / (2 * SIGMA**2))
    line = line / line.sum()
    window = torch.outer(line, line)[None, None]
    mx, my, xx, yy, xy = (F.conv2d(map, window) for map in (x, y, x * x, y * y, x * y))
    luminance = (2 * mx * my + C1) / (mx**2 + my**2 + C1)
    spread = (xx - mx**2).clamp(min=0) + (yy - my**2).clamp(min=0)
    return luminance, (2 * (xy - mx * my) + C2) / (spread + C2)
