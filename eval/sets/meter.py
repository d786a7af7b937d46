"""The contract of a metric of image sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch

from ..features.choosing import Extractor
from ..intervals import Estimate


class SetMeter(ABC):
    """One metric over the streamed features of an image set."""

    protocol: ClassVar[dict[str, Any]]
    """What determines the figures besides features and references."""

    @classmethod
    def for_extractor(cls, extractor: Extractor) -> Self:
        """An empty meter for the features of `extractor`."""
        return cls()

    @staticmethod
    def inputs(extractor: Extractor, features: torch.Tensor) -> torch.Tensor:
        """What the meter takes of the features (B, D): by default the features themselves."""
        return features

    @property
    @abstractmethod
    def n(self) -> int:
        """Images counted."""

    @abstractmethod
    def update(self, features: torch.Tensor | np.ndarray, positions: Sequence[int] | None = None) -> None:
        """Adds features (B, D) of the images at `positions` of the set; the next ones by default."""

    @abstractmethod
    def compute(self, real: Any) -> dict[str, Estimate]:
        """The figures against `real`: moments, features (M, D) or None, by what the table says the metric needs."""

    def caveat(self, extractor: Extractor, references: int | None) -> str | None:
        """What the reader should know; `references` is the number of reference images, None where unknown."""
        return None
