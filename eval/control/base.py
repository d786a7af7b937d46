"""What every control metric is: how far a picture keeps to the hint that it was drawn from.

A metric extracts the condition again from the drawn picture and compares it with what the picture was drawn from.
Weight-free maps are extracted by the annotator and settings that made the hint; where a network makes them, by default
by another network, so that no picture is rewarded for the annotator's own mistakes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import cv2
import numpy as np

from ...annotators import ANNOTATORS
from ...annotators.base import Annotator
from ...core.data.conditions import condition
from ...core.errors import SctoolError
from ..intervals import BOOTSTRAP, PictureFigures


class ControlScore(PictureFigures):
    """One condition's adherence over a set of pictures; streaming and mergeable.

    Pictures whose hint is empty are skipped and counted in `skipped`.
    """

    cond: ClassVar[str]
    better: Mapping[str, str]
    """Which way each figure is better: "lower", "higher", or "" for neither."""
    reads: ClassVar[str] = "hint"
    """What a picture is compared with: its "hint" as drawn, the raw "map" behind it, or the "reference" picture."""
    judged: ClassVar[bool] = False
    """By default extracted by the table's evaluator network, not by the one that made the hint."""

    def __init__(self, made: Mapping[str, Any] | None = None, evaluator: Annotator | None = None) -> None:
        """`made` says how the hint was made, as tuner files keep it; the annotator's defaults when it does not.

        `evaluator` extracts in the place of what follows from `made`.
        """
        super().__init__()
        self._made, self._annotator = made or {}, evaluator
        self.skipped = 0

    @property
    def annotator(self) -> Annotator:
        """What extracts the condition again."""
        if self._annotator is None:
            cls = ANNOTATORS[self.cond]
            known = {key: value for key, value in self._made.items() if key in cls.Settings.model_fields}
            if self.judged:
                from ...annotators.networks.weights import default

                known = {"model": default(self.cond, "evaluator").name}
            self._annotator = cls(cls.Settings.model_validate(known))
        return self._annotator

    def ready(self) -> None:
        """Raises `SctoolError`, naming the remedy, when what extracts needs weights that are not at hand."""
        with as_evaluator():
            self.annotator.ready()

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that decides the figures besides pictures and hints."""
        return {"annotator": self.annotator.id, "opencv": cv2.__version__, "interval": BOOTSTRAP}

    def fits(self, picture: np.ndarray, wanted: np.ndarray) -> None:
        """Raises `SctoolError` when the sizes of a picture and of what it is compared with differ."""
        if picture.shape[:2] != wanted.shape[:2]:
            raise SctoolError(
                f"its {self.cond} {self.reads} is {wanted.shape[1]}x{wanted.shape[0]} px, "
                f"the picture {picture.shape[1]}x{picture.shape[0]} px"
            )

    def update(
        self,
        pictures: Sequence[np.ndarray],
        wanted: Sequence[np.ndarray],
        keys: Sequence[str] | None = None,
        positions: Sequence[int] | None = None,
    ) -> None:
        """Adds drawn pictures, uint8 (H, W, 3), and what `reads` names of each, uint8 (H, W, 3), or (H, W) for a map.

        keys: by which random annotators draw; positions: in the set. Raises `SctoolError` when sizes differ.
        """
        for picture, there in zip(pictures, wanted, strict=True):
            self.fits(picture, there)
        keys = keys or [""] * len(pictures)
        with as_evaluator():
            found = self.extract([np.ascontiguousarray(picture) for picture in pictures], keys)
            targets = self.targets(wanted, keys)
        for index, (map, there) in enumerate(zip(found, targets, strict=True)):
            self.update_maps(map, there, None if positions is None else positions[index])

    def extract(self, pictures: list[np.ndarray], keys: Sequence[str]) -> list[Any]:
        """What is compared, of each picture: its map (H, W), one call a batch."""
        return [map for map, _ in self.annotator(pictures, list(keys))]

    def targets(self, wanted: Sequence[np.ndarray], keys: Sequence[str]) -> Sequence[Any]:
        """What the extracted is compared with, of each picture."""
        return wanted

    @abstractmethod
    def update_maps(self, found: Any, wanted: Any, position: int | None = None) -> None:
        """Adds what was extracted from one picture and what it should be."""

    def drawn(self, picture: np.ndarray, key: str) -> np.ndarray:
        """The condition extracted from a picture (H, W, 3), as a picture of its own (H, W, 3)."""
        map = self.annotator([np.ascontiguousarray(picture)], [key])[0][0]
        if map.shape[:2] != picture.shape[:2]:
            map = cv2.resize(map, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        return condition(self.cond).render(map, picture)

    def merge(self, other: PictureFigures) -> None:
        """Adds what another process has counted."""
        assert isinstance(other, ControlScore)
        super().merge(other)
        self.skipped += other.skipped

    def compute(self) -> dict[str, float]:
        """The figures by name. Raises `SctoolError` when every hint was empty."""
        if not self.n:
            raise SctoolError(f"no picture has a {self.cond} hint that is not empty ({self.skipped} empty ones).")
        return super().compute()

    def notes(self) -> list[str]:
        """What the reader of the figures should know."""
        return [f"{self.cond}: {self.skipped} pictures with an empty hint were skipped."] if self.skipped else []


@contextmanager
def as_evaluator() -> Iterator[None]:
    """Errors of annotators name the flag that the user of `evaluate` has."""
    try:
        yield
    except SctoolError as error:
        raise type(error)(str(error).replace("--cond ", "--evaluator ")) from error


def grey(hint: np.ndarray) -> np.ndarray:
    """One channel (H, W) of a hint, (H, W) or (H, W, 3) with equal channels."""
    return hint if hint.ndim == 2 else hint.max(2)
