"""What all control scores share: how closely an image follows the hint that it was drawn from.

A score extracts the condition again from the drawn image and compares it with what the image was drawn from. Maps that
need no network are extracted by the annotator and settings that made the hint; maps of networks by default by another
network, so that no image is rewarded for the annotator's own mistakes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import cv2
import numpy as np

from ...annotators import annotator_like
from ...annotators.base import Annotator
from ...core.data.conditions import condition
from ...core.errors import SctoolError
from ..intervals import BOOTSTRAP, ImageFigures
from ..metrics import FigureInfo


class ControlScore(ImageFigures):
    """Adherence to one condition over a set of images; streaming and mergeable.

    Images with an empty hint are skipped and counted in `skipped`.
    """

    cond: ClassVar[str]
    metric: ClassVar[str] = ""
    """The metric with `hints="selected"` that selects this condition, e.g. "nmse"; --control selects all."""
    figure_info: Mapping[str, FigureInfo]
    """Name and direction of every figure, in the order of reports."""
    compares_with: ClassVar[Literal["hint", "map", "reference"]] = "hint"
    """What an image is compared with: its hint image, the raw map behind the hint, or the reference image."""
    independent: ClassVar[bool] = False
    """By default extracted by the condition's evaluator network, not by the network that made the hint."""

    def __init__(self, map_settings: Mapping[str, Any] | None = None, evaluator: Annotator | None = None) -> None:
        """`map_settings`: how the hint's map was made, as saved in tuner files; None for the annotator's defaults.

        `evaluator` extracts the condition in place of what follows from `map_settings`.
        """
        super().__init__()
        self._map_settings, self._annotator = map_settings or {}, evaluator
        self.skipped = 0

    @property
    def annotator(self) -> Annotator:
        """What extracts the condition from drawn images."""
        if self._annotator is None:
            settings = self._map_settings
            if self.independent:
                from ...annotators.networks.weights import default

                settings = {"model": default(self.cond, "evaluator").name}
            self._annotator = annotator_like(self.cond, settings)
        return self._annotator

    def ready(self) -> None:
        """Raises `SctoolError` with the remedy when weights that the annotator needs are not on this machine."""
        with evaluator_errors():
            self.annotator.ready()

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that determines the figures besides images and hints."""
        return {"annotator": self.annotator.id, "opencv": cv2.__version__, "interval": BOOTSTRAP}

    def check_size(self, image: np.ndarray, target: np.ndarray) -> None:
        """Raises `SctoolError` when an image and what it is compared with differ in size."""
        if image.shape[:2] != target.shape[:2]:
            raise SctoolError(
                f"its {self.cond} {self.compares_with} is {target.shape[1]}x{target.shape[0]} px, "
                f"the image {image.shape[1]}x{image.shape[0]} px"
            )

    def update(
        self,
        images: Sequence[np.ndarray],
        targets: Sequence[np.ndarray],
        keys: Sequence[str] | None = None,
        positions: Sequence[int] | None = None,
    ) -> None:
        """Adds drawn images, uint8 (H, W, 3), and what each is compared with, uint8 (H, W, 3), or (H, W) for a map.

        keys: seeds of random annotators; positions: in the set. Raises `SctoolError` when sizes differ.
        """
        for image, target in zip(images, targets, strict=True):
            self.check_size(image, target)
        keys = keys or [""] * len(images)
        with evaluator_errors():
            extracted = self.extract([np.ascontiguousarray(image) for image in images], keys)
            prepared = self.prepare_targets(targets, keys)
        for index, (map, target) in enumerate(zip(extracted, prepared, strict=True)):
            self.update_maps(map, target, None if positions is None else positions[index])

    def extract(self, images: list[np.ndarray], keys: Sequence[str]) -> list[Any]:
        """What is compared, for each image of a batch: by default its map (H, W)."""
        return [map for map, _ in self.annotator(images, list(keys))]

    def prepare_targets(self, targets: Sequence[np.ndarray], keys: Sequence[str]) -> Sequence[Any]:
        """What the extracted maps are compared with: by default the targets as they are."""
        return targets

    @abstractmethod
    def update_maps(self, extracted: Any, target: Any, position: int | None = None) -> None:
        """Adds what was extracted from one image, and what it should be."""

    def extracted_image(self, image: np.ndarray, key: str) -> np.ndarray:
        """The condition extracted from an image (H, W, 3), rendered as an image (H, W, 3)."""
        map = self.annotator([np.ascontiguousarray(image)], [key])[0][0]
        if map.shape[:2] != image.shape[:2]:
            map = cv2.resize(map, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        return condition(self.cond).render(map, image)

    def merge(self, other: ImageFigures) -> None:
        """Adds what another process counted."""
        assert isinstance(other, ControlScore)
        super().merge(other)
        self.skipped += other.skipped

    def compute(self) -> dict[str, float]:
        """The figures by key. Raises `SctoolError` if every hint was empty."""
        if not self.n:
            raise SctoolError(f"no image has a {self.cond} hint that is not empty ({self.skipped} are empty).")
        return super().compute()

    def notes(self) -> list[str]:
        """What the reader of the figures should know."""
        return [f"{self.cond}: {self.skipped} images with an empty hint were skipped."] if self.skipped else []


@contextmanager
def evaluator_errors() -> Iterator[None]:
    """Errors of annotators name the flag of `evaluate`: messages about weights know only `--cond`."""
    try:
        yield
    except SctoolError as error:
        raise type(error)(str(error).replace("--cond ", "--evaluator ")) from error


def grey(hint: np.ndarray) -> np.ndarray:
    """One channel (H, W) of a hint, (H, W) or (H, W, 3) with equal channels."""
    return hint if hint.ndim == 2 else hint.max(2)
