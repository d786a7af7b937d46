"""The real pictures that samples are compared to: the samples' own references, a folder, or a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.data.images import BadImage
from ...core.errors import UsageError
from ...core.files import sha256
from ...core.progress import Progress
from ..features.choosing import Extractor
from ..results import Column
from ..targets import PICTURES, SampleFolder, digest, inside, read_picture
from .feature_store import KeptFeatures
from .frechet import FrechetStats, Moments

BATCH = 16


@dataclass(frozen=True)
class Real:
    """What is known of the real pictures: moments, and their features (M, D) float32 where they were kept."""

    moments: Moments | None = None
    features: np.ndarray | None = None

    @property
    def n(self) -> int | None:
        """How many there are; None where a statistics file does not say."""
        return self.moments.n if self.moments else None


class References:
    """The real pictures under one extractor; looked at once for folders that share their references."""

    def __init__(
        self, extractor: Extractor, given: str | None, save: Path | None, progress: Progress, *, keep: bool = False
    ) -> None:
        """`given` is a folder of pictures or an .npz of moments; the folders' own references for None.

        `save` is where to keep the moments; `keep`: keep the features too. Raises `UsageError` where `given` is missing
        or of another extractor.
        """
        self.extractor, self.save, self.progress, self.keep = extractor, save, progress, keep
        self._found: dict[str, tuple[Real, dict[str, Any]]] = {}
        self.given = Path(given).expanduser() if given is not None else None
        self.fixed = self._from_file(self.given) if self.given is not None and self.given.is_file() else None
        if self.given is not None and not self.given.exists():
            raise UsageError(f"--reference {given}: no such folder or statistics file.")

    def _from_file(self, file: Path) -> tuple[Real, dict[str, Any]]:
        moments, extractor = Moments.load(file), self.extractor
        if len(moments.mu) != extractor.dim:
            raise UsageError(
                f"--reference {file} holds {len(moments.mu)} dimensions; {extractor.name} features have "
                f"{extractor.dim}. Statistics and --features must be of the same extractor."
            )
        return Real(moments), {"n": moments.n, "statistics_sha256": sha256(file)}

    def of(self, folder: SampleFolder, rows: Sequence[dict[str, Any]], column: Column) -> tuple[Real, dict[str, Any]]:
        """The real pictures for the samples `rows` of `folder`, and what identifies them.

        Pictures that cannot be read are listed in the column's faults.
        """
        if self.fixed:
            return self.fixed
        root = self.given or folder.path
        names = picture_names(root) if self.given else [row["reference"] for row in rows]
        if not names:
            raise UsageError(f"--reference {root} holds no pictures.")
        key = digest([file_hash(root, name) for name in names])
        if key not in self._found:
            real = self._measured(root, names, column)
            self._found[key] = real, {"n": real.n, "pictures_sha256": key}
            if self.save and real.moments:
                real.moments.save(self.save)
        return self._found[key]

    def _measured(self, root: Path, names: Sequence[str], column: Column) -> Real:
        stats, kept = FrechetStats(self.extractor.dim), KeptFeatures()
        with self.progress.counting(len(names), "measuring references") as advance:
            for start in range(0, len(names), BATCH):
                pictures, positions = [], []
                for position, name in enumerate(names[start : start + BATCH], start):
                    try:
                        pictures.append(read_picture(root, name))
                        positions.append(position)
                    except BadImage as error:
                        column.faults.append({"file": name, "reason": str(error)})
                for indices, tensor in same_size(pictures):
                    features = self.extractor(tensor)
                    stats.update(features)
                    if self.keep:
                        kept.update(features, [positions[i] for i in indices])
                advance(len(names[start : start + BATCH]))
        return Real(stats.compute(), kept.rows() if self.keep else None)


def picture_names(folder: Path) -> list[str]:
    """Pictures below `folder`, by relative path, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in PICTURES)


def same_size(pictures: Sequence[np.ndarray]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(indices, uint8 (B, 3, H, W)) of pictures (H, W, 3), one group a size."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(index)
    for indices in groups.values():
        yield indices, torch.from_numpy(np.stack([pictures[i] for i in indices])).permute(0, 3, 1, 2)


def file_hash(folder: Path, name: str) -> str:
    """SHA-256 of a picture's file; a word for one that is missing."""
    try:
        return sha256(inside(folder, name))
    except (OSError, BadImage):
        return "unreadable"
