"""The interface of annotators: from RGB images to maps in their smallest lossless form and the parameters used.

The same pixels, key and seed give the same map in any batch, shard or worker.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from ..core.data.conditions import condition
from ..core.resolving import Config, build

Params = dict[str, Any]


class NoParams(Config):
    """An annotator without settings."""


class Annotator(ABC):
    """One condition. Subclasses define its name, the version of its algorithm, and how its map is stored."""

    name: ClassVar[str]
    version: ClassVar[str]
    """Identity of the algorithm; increased whenever the same image would give another map."""
    Settings: ClassVar[type[Config]] = NoParams
    bilevel: ClassVar[bool] = False
    """The map holds only 0 and 255 and is stored as a 1-bit PNG."""

    def __init__(self, settings: Config | None = None, seed: int = 0) -> None:
        self.settings = settings if settings is not None else self.Settings()
        self.seed = seed

    @classmethod
    def parse(cls, text: str = "", seed: int = 0) -> Annotator:
        """An annotator from settings written as `low=50,high=150`; `Settings` defines the types of the values.

        Raises `UsageError` that names the condition, the key and the nearest known key.
        """
        values = {}
        for pair in filter(None, (part.strip() for part in text.split(","))):
            key, _, value = pair.partition("=")
            values[key.strip()] = value.strip()
        return cls(build(cls.Settings, values, where=f"{cls.name} "), seed)

    @property
    def needs_weights(self) -> bool:
        """Whether a network makes the map, so that its weights must be on this machine; `ready` checks that."""
        return condition(self.name).network

    @property
    def id(self) -> dict[str, Any]:
        """Everything that determines the map besides pixels, key and seed: name, version, settings."""
        return {"name": self.name, "version": self.version, **self.settings.model_dump(mode="json")}

    def ready(self) -> None:  # noqa: B027 - most annotators need nothing
        """Raises `SctoolError` with the remedy if weights that the annotator needs are not on this machine."""

    def made_with_same_settings(self, params: Params) -> bool:
        """Whether `params`, recorded with a map, show that it was made with exactly these settings."""
        missing = object()
        return all(params.get(key, missing) == value for key, value in self.settings.model_dump(mode="json").items())

    def generator(self, key: str) -> np.random.Generator:
        """The random generator of one image; it depends only on the seed, the condition and the image's key."""
        digest = hashlib.sha256(f"{self.seed}\0{self.name}\0{key}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "little"))

    def __call__(self, images: list[np.ndarray], keys: list[str]) -> list[tuple[np.ndarray, Params]]:
        """Maps of a batch.

        images: uint8 (H, W, 3) RGB, sizes may differ. keys: one per image.
        Returns for each image a uint8 map, (h, w) or (h, w, 3), and the parameters that made it.
        """
        return [self.annotate(image, key) for image, key in zip(images, keys, strict=True)]

    @abstractmethod
    def annotate(self, image: np.ndarray, key: str) -> tuple[np.ndarray, Params]:
        """The map of one uint8 (H, W, 3) RGB image and the parameters that made it."""
