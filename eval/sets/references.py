"""The reference images that samples are compared with: the samples' own references, a folder, or a statistics file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.data.images import BadImage
from ...core.errors import UsageError
from ...core.files import sha256
from ...core.progress import Progress
from ..batches import BATCH, by_size
from ..features.choosing import Extractor
from ..metadata import read_rows
from ..results import FolderResults
from ..targets import SampleFolder, digest, file_hash, image_names, read_image
from .feature_store import FeatureStore
from .frechet import FrechetStats, Moments


@dataclass(frozen=True)
class ReferenceFeatures:
    """What is known of the reference images: moments, and their features (M, D) float32 where they were stored."""

    moments: Moments | None = None
    features: np.ndarray | None = None

    @property
    def n(self) -> int | None:
        """The number of images; None where a statistics file does not say."""
        return self.moments.n if self.moments else None


def drawn_names(folder: Path) -> list[str]:
    """The images in a folder; of one with a metadata.jsonl those that it lists, without their hints and references."""
    listed = folder / "metadata.jsonl"
    return [row["file_name"] for row in read_rows(listed)] if listed.is_file() else image_names(folder)


class References:
    """The reference images under one extractor; measured once for folders that share them."""

    def __init__(
        self, extractor: Extractor, given: str | None, save: Path | None, progress: Progress, *, store: bool = False
    ) -> None:
        """`given` is a folder of images or an .npz of moments; None for the samples' own references.

        save: where to write the moments; store: store the features too. Raises `UsageError` where `given` is missing
        or belongs to another extractor.
        """
        self.extractor, self.save, self.progress, self.store = extractor, save, progress, store
        self._measured: dict[str, tuple[ReferenceFeatures, dict[str, Any]]] = {}
        self.given = Path(given).expanduser() if given is not None else None
        self.fixed = self._from_file(self.given) if self.given is not None and self.given.is_file() else None
        if self.given is not None and not self.given.exists():
            raise UsageError(f"--reference {given}: no such folder or statistics file.")

    def _from_file(self, file: Path) -> tuple[ReferenceFeatures, dict[str, Any]]:
        moments, extractor = Moments.load(file), self.extractor
        if len(moments.mu) != extractor.dim:
            raise UsageError(
                f"--reference {file} has {len(moments.mu)} dimensions; {extractor.name} features have "
                f"{extractor.dim}. Statistics and --features must belong to the same extractor."
            )
        return ReferenceFeatures(moments), {"n": moments.n, "statistics_sha256": sha256(file)}

    def of(
        self, folder: SampleFolder, rows: Sequence[dict[str, Any]], results: FolderResults
    ) -> tuple[ReferenceFeatures, dict[str, Any]]:
        """The references for the samples `rows` of `folder`, and what identifies them.

        Images that cannot be read are listed in the results' faults.
        """
        if self.fixed:
            return self.fixed
        root = self.given or folder.path
        names = drawn_names(root) if self.given else [row["reference"] for row in rows]
        if not names:
            raise UsageError(f"--reference {root} contains no images.")
        key = digest([file_hash(root, name) for name in names])
        if key not in self._measured:
            reference = self._measure(root, names, results)
            self._measured[key] = reference, {"n": reference.n, "pictures_sha256": key}
            if self.save and reference.moments:
                reference.moments.save(self.save)
        return self._measured[key]

    def _measure(self, root: Path, names: Sequence[str], results: FolderResults) -> ReferenceFeatures:
        stats, stored = FrechetStats(self.extractor.dim), FeatureStore()
        with self.progress.counting(len(names), "measuring references") as advance:
            for start in range(0, len(names), BATCH):
                images, positions = [], []
                for position, name in enumerate(names[start : start + BATCH], start):
                    try:
                        images.append(read_image(root, name))
                        positions.append(position)
                    except BadImage as error:
                        results.faults.append({"file": name, "reason": str(error)})
                for indices, tensor in by_size(images):
                    features = self.extractor(tensor)
                    stats.update(features)
                    if self.store:
                        stored.update(features, [positions[i] for i in indices])
                advance(len(names[start : start + BATCH]))
        return ReferenceFeatures(stats.compute(), stored.rows() if self.store else None)
