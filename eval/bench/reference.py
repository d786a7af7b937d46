"""The real images that all rows are compared with: the whole set, whatever the split, as the trainer crops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...core.data.images import BadImage, Geometry, decode_rgb
from ..batches import BATCH, by_size
from ..sets.extraction import metrics_by_extractor
from ..sets.frechet import FrechetStats
from ..sets.references import References
from ..targets import digest
from .measuring import options
from .pieces import Piece
from .workshop import Workshop

IMAGES = "all images of the set, training and held out"


def real_statistics(shop: Workshop) -> Path:
    """The file of mean and covariance of the real images' features, measured once.

    The features are those that `sctool evaluate --fid` takes for this base.
    """
    path = shop.out / "real.npz"
    config, how = shop.settings.first, shop.settings.measuring
    stamps = digest([(record.key, record.image.stamp()) for record in shop.source])

    def work() -> dict[str, Any]:
        shop.progress.note("measuring the real images")
        return {"n": _measure(shop, shop.settings.base, path)}

    identity = {"base": shop.settings.base, "data": config.data, "size": shop.size, "set": stamps}
    identity |= {"features": how.features, "weights": how.weights}
    piece = Piece(shop.out / "real.json", identity)
    if not path.is_file():
        piece.path.unlink(missing_ok=True)
    piece.do(work)
    return path


def _measure(shop: Workshop, base: str, path: Path) -> int:
    asked, note = options(shop, ("fid",), quiet=shop.quiet), shop.progress.note
    (metrics,) = metrics_by_extractor(
        {"fid"}, asked, base, shop.device, lambda names, work: work(), note,
        lambda extractor, save, store: References(extractor, None, None, shop.progress),
    )  # fmt: skip
    extractor, geometry, records = metrics.extractor, Geometry(shop.size), list(shop.source)
    stats = FrechetStats(extractor.dim)
    with shop.progress.counting(len(records), "measuring real images") as advance:
        for start in range(0, len(records), BATCH):
            part = records[start : start + BATCH]
            for _, images in by_size(_readable(part, geometry)):
                stats.update(extractor(images))
            advance(len(part))
    moments = stats.compute()
    moments.save(path)
    return stats.n


def _readable(records: list, geometry: Geometry) -> list[np.ndarray]:
    """The images at the table's size, without those that cannot be read; training leaves the same ones out."""
    images = []
    for record in records:
        try:
            images.append(geometry.apply(decode_rgb(record.image, record.image.name)))
        except BadImage:
            continue
    return images
