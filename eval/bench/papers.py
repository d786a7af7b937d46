"""The papers' own tables, as printed, for orientation: their protocols are other ones. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Paper:
    """One table of a paper: its columns after the method's name, a row of printed values per method, its protocol."""

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    note: str

    def to_json(self) -> dict[str, Any]:
        """Everything as one JSON value."""
        return asdict(self)


def _note(protocol: str) -> str:
    return f"Another protocol, so not comparable with the figures above: {protocol}."


DIFFSCALER_TRANSFER = Paper(
    "DiffScaler's own table 1 (FID)",
    ("parameters", "CUB", "Flowers", "FFHQ", "Caltech"),
    {
        "Fine-Tuning": ("674M", "18.30", "20.07", "15.50", "45.99"),
        "LoRA": ("47.7M", "30.97", "18.75", "22.46", "52.42"),
        "DiffFit": ("0.48M", "19.75", "23.94", "30.00", "54.93"),
        "DiffScaler": ("48.7M", "20.19", "18.07", "15.13", "51.46"),
    },
    _note("FID at 256 px with DiT-XL/2, 50,000 steps, 5,000 samples, one seed, no intervals"),
)

SCEDIT_CONTROL = Paper(
    "SCEdit's own table 2",
    ("FID", "parameters", "training time"),
    {
        "ControlNet": ("74.86", "364.23M", "x 1.00"),
        "T2I-Adapter": ("73.37", "77.37M", "x 0.92"),
        "ControlNet-XS": ("75.63", "55.30M", "x 0.97"),
        "ControlLoRA": ("74.14", "21.52M", "x 1.34"),
        "SCEdit, kernel 1": ("73.18", "28.82M", "x 0.87"),
        "SCEdit, kernel 3": ("71.78", "99.11M", "x 0.87"),
    },
    _note("Stable Diffusion 2.1 at 512 px on images of LAION, one seed, no intervals, adherence not measured"),
)

DIFFSCALER_CONTROL = Paper(
    "DiffScaler's own table 2 (FID, CLIP)",
    ("parameters", "HED", "depth", "segmentation", "canny"),
    {
        "ControlNet": ("361.2M", "20.99, 152.03", "22.09, 151.15", "27.56, 76.18", "19.22, 150.59"),
        "DiffFit": ("11.07M", "21.20, 148.06", "19.51, 155.17", "23.58, 148.98", "20.62, 153.00"),
        "DiffScaler": ("6.85M", "16.82, 155.26", "17.82, 153.34", "19.30, 144.21", "15.80, 149.46"),
    },
    _note(
        "Stable Diffusion 1.5 at 512 px on COCO, 10,000 steps of 4, one seed, no intervals; the paper does not define "
        "the scale of its CLIP column"
    ),
)

ELR_CONTROL = Paper(
    "ELR-Diffusion's own tables 2 and 3",
    ("FID", "sketch, CLIP", "edges, NMSE", "segmentation, IoU", "parameters", "memory", "time per step"),
    {
        "Uni-ControlNet": ("27.7", "0.49", "0.60", "0.70", "1271M", "20 GB", "5.72 s"),
        "ELR-Diffusion, stage II": ("27.5", "0.45", "0.60", "0.74", "750M", "14 GB", "2.15 s"),
        "stages I and II, not distilled": ("84.0", "0.40", "0.54", "0.40", "536M", "11 GB", "–"),
        "stages I and II, distilled": ("43.7", "0.46", "0.57", "0.74", "536M", "11 GB", "–"),
    },
    _note(
        "Stable Diffusion at 512 px, one epoch of 5 million images, one seed, no intervals; its parameters are those "
        "of U-Net and adapter together, the locked U-Net among them"
    ),
)

ELR_STUDENTS = Paper(
    "ELR-Diffusion's own table 1",
    ("FID", "CLIP score", "parameters"),
    {
        "Stable Diffusion": ("27.7", "0.824", "1290M"),
        "U-Net trained without distillation": ("66.7", "0.670", "1290M"),
        "low-rank U-Net, not distilled": ("84.3", "0.610", "790M"),
        "low-rank U-Net, distilled": ("45.0", "0.768", "790M"),
    },
    _note(
        "Stable Diffusion 2.1 at 512 px, one epoch of 5 million images, one seed, no intervals; parameters are those "
        "of U-Net, text encoder and autoencoder together"
    ),
)

BK_STUDENTS = Paper(
    "BK-SDM's own figures",
    ("FID", "Inception score", "CLIP cosine", "U-Net"),
    {
        "SD 2.1-base": ("13.93", "35.93", "0.3075", "865.9M"),
        "BK-SDM-v2-Base": ("15.85", "31.70", "0.2868", "583.5M"),
        "BK-SDM-v2-Small": ("16.61", "31.73", "0.2901", "485.8M"),
        "BK-SDM-v2-Tiny": ("15.68", "31.64", "0.2897", "326.8M"),
        "SD 1.4": ("13.05", "36.76", "0.2958", "859.5M"),
        "BK-SDM-Base": ("15.76", "33.79", "0.2878", "579.4M"),
        "BK-SDM-Small": ("16.98", "31.68", "0.2677", "482.3M"),
        "BK-SDM-Tiny": ("17.12", "30.09", "0.2653", "323.4M"),
    },
    _note(
        "30,000 captions of COCO at 256 px, 25 steps of PNDM, CLIP ViT-g/14, students trained 50,000 steps of 256 on "
        "0.22 million images, one seed, no intervals"
    ),
)
