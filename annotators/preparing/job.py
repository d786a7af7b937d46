"""A job of `prepare`: one shard, or some images of a folder, and what is made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...core.data.conditions import ConditionSpec
from ...core.data.prompts import Prompt, PromptRule
from ...core.data.records import Record, Source
from ..engine.job import Job, blob_stamp
from ..engine.ondemand import name_single_map


@dataclass(frozen=True)
class Recipe:
    """What all jobs of a run share. Picklable, and without torch."""

    base: str = "mini"
    precision: str = "torch.float32"
    """That of the autoencoder."""
    size: int = 0
    dtype: str = "fp32"
    flip: bool = False
    conds: tuple[ConditionSpec, ...] = ()
    prompt: Prompt = field(default_factory=PromptRule)
    batch: int = 16
    offline: bool = False
    root: str | None = None
    """The folder that the images are in."""
    maps: str | None = None


@dataclass(frozen=True)
class PrepareJob(Job):
    """As an annotator's job, whose annotators make the maps that the images lack."""

    recipe: Recipe = field(default_factory=Recipe)

    @property
    def marker(self) -> Path:
        """The marker file, beside the prepared shard."""
        return self.out / f"{self.name}_stats.json"

    @property
    def marker_pattern(self) -> str:
        """Matches the markers of all jobs."""
        return "**/*_stats.json"

    def fingerprint(self) -> str:
        """Hash of what the job reads, maps included."""
        digest = hashlib.sha256(super().fingerprint().encode())
        for record in self.records:
            maps = {cond: blob_stamp(blob) for cond, blob in record.maps.items()}
            digest.update(json.dumps(maps, sort_keys=True).encode())
        return digest.hexdigest()

    def as_source(self, records: Sequence[Record]) -> Source:
        """The job's records as a set of their own."""
        root = Path(self.recipe.root) if self.recipe.root else None
        return name_single_map(Source(self.name, "shards", list(records), [], root), self.recipe.conds)
