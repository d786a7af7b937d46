"""A folder's images in batches, and the contract of what is measured on them in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from .results import Figure, FolderResults
from .targets import SampleFolder, read_image

BATCH = 16


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of a folder with their decoded images."""

    folder: SampleFolder
    rows: Sequence[dict[str, Any]]
    images: Sequence[np.ndarray]
    """uint8 (H, W, 3) each; sizes may differ."""
    first: int
    """Position of the first sample in the set."""

    @cached_property
    def by_size(self) -> list[tuple[list[int], torch.Tensor]]:
        """(indices in the batch, uint8 (B, 3, H, W)), one pair per image size."""
        return list(by_size(self.images))

    def positions(self, indices: Sequence[int]) -> list[int]:
        """Positions in the set of samples of the batch."""
        return [self.first + index for index in indices]


def batches(folder: SampleFolder, rows: Sequence[dict[str, Any]]) -> Iterator[Batch]:
    """The samples `rows` of `folder` in batches of `BATCH`. Raises `BadImage` for an image that cannot be read."""
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        yield Batch(folder, part, [read_image(folder.path, row["file_name"]) for row in part], start)


def by_size(images: Sequence[np.ndarray]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(indices, uint8 (B, 3, H, W)) of images (H, W, 3), one group per size."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.shape, []).append(index)
    for indices in groups.values():
        yield indices, torch.from_numpy(np.stack([images[i] for i in indices])).permute(0, 3, 1, 2)


class Measurement(Protocol):
    """Metrics that are computed together in one pass over a folder's images."""

    def meters(self) -> Any:
        """Fresh meters for one folder."""
        ...

    def update(self, meters: Any, batch: Batch, results: FolderResults) -> None:
        """Adds a batch; what cannot be used is listed in the results' faults."""
        ...

    def figures(
        self, meters: Any, folder: SampleFolder, rows: list[dict[str, Any]], results: FolderResults
    ) -> Iterable[Figure]:
        """The figures of the samples `rows` of `folder`."""
        ...
