"""Semantic segmentation by a transformers model: class ids, those of ADE20K (0..149) with the listed weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from ..core.errors import UsageError
from .base import Params
from .networks.models import ModelAnnotator, ModelSettings, Transformer, load_once, load_transformer
from .networks.weights import default

ARCHITECTURES = (
    "UperNetForSemanticSegmentation",
    "SegformerForSemanticSegmentation",
    "Mask2FormerForUniversalSegmentation",
    "OneFormerForUniversalSegmentation",
)
IGNORE = 255
"""The id of pixels without a class; no network predicts it."""


class SegSettings(ModelSettings):
    """Which network segments the image."""

    model: str = Field(
        default("seg").name, description="upernet, segformer-b5, oneformer, mask2former, ..., a folder or a hub id"
    )


class Seg(ModelAnnotator):
    """Class ids (H, W), one byte per pixel. Colours are used only for rendering, because two classes share one."""

    name = "seg"
    version = "seg-1"
    Settings = SegSettings

    @property
    def network(self) -> Transformer:
        """The segmentation network, loaded once per process. Raises `UsageError` for more classes than a byte holds."""
        what = f"--cond seg:model={self.network_settings.model}"
        # OneFormer's processor would look on the hub for class names, which only its training needs.
        options = {"class_info_file": None} if _is_oneformer(self.weights.path) else {}
        network = load_transformer(what, self.weights, self.dtype, ARCHITECTURES, **options)
        if network.config.num_labels > IGNORE:
            raise UsageError(f"{what} predicts {network.config.num_labels} classes; a map can store at most {IGNORE}.")
        return network

    def maps(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, Params]]:
        """As in the base class; the params say how many classes the network knows."""
        network = self.network
        values = network.pixel_values(images)
        maps: dict[int, np.ndarray] = {}
        for group in self.batches([value.shape for value in values]):
            outputs = network([values[i] for i in group], **self._task_inputs(network, len(group)))
            sizes = [images[i].shape[:2] for i in group]
            results = network.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            maps.update({i: map.byte().cpu().numpy() for i, map in zip(group, results, strict=True)})
        return [(maps[i], {"classes": network.config.num_labels}) for i in range(len(images))]

    def _task_inputs(self, network: Transformer, count: int) -> dict[str, Any]:
        """OneFormer's extra input: the task as token ids (count, 77); nothing for other networks."""
        if network.config.model_type != "oneformer":
            return {}

        def load() -> Any:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(network.folder), local_files_only=True)
            length = network.config.task_seq_len
            return tokenizer(
                "the task is semantic", padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )

        tokens = load_once(load, self.weights, "task")
        ids = tokens["input_ids"] * tokens["attention_mask"]
        return {"task_inputs": ids.to(network.network.device).expand(count, -1)}


def _is_oneformer(folder: Any) -> bool:
    import json

    try:
        return json.loads((folder / "config.json").read_text()).get("model_type") == "oneformer"
    except OSError:
        return False
