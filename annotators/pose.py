"""Pose: persons found by RT-DETR, their keypoints by ViTPose (arXiv 2204.12484), drawn as OpenPose draws them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

from ..core.errors import UsageError
from .base import Params
from .networks.models import ModelAnnotator, ModelSettings, Transformer, load_transformer, on_device
from .networks.pose_drawing import JOINTS, drawing
from .networks.weights import Found, default, locate

PADDING = 1.25
"""A person's crop over the box, as ViTPose was trained."""


class PoseSettings(ModelSettings):
    """Which networks find persons and keypoints, and what counts as found."""

    model: str = Field(default("pose").name, description="vitpose, vitpose-plus, a folder or a hub id")
    detector: str = Field(default("pose", "detector").name, description="rtdetr, a folder or a hub id")
    threshold: float = Field(0.5, gt=0, lt=1, description="least score of a person")
    keypoint_threshold: float = Field(0.3, ge=0, lt=1, description="keypoints above this score are drawn")


class Pose(ModelAnnotator):
    """Drawing (H, W, 3) RGB on black; black where nobody is. The params hold every person's 17 COCO keypoints."""

    name = "pose"
    version = "pose-1"
    Settings = PoseSettings

    @cached_property
    def detector(self) -> Found:
        """The detector's weights. Raises `SctoolError` as `ready` does."""
        return locate(self.name, self._settings.detector, "detector", "detector")

    @property
    def _settings(self) -> PoseSettings:
        assert isinstance(self.settings, PoseSettings)
        return self.settings

    def ready(self) -> None:
        """Both networks' weights are needed."""
        super().ready()
        _ = self.detector

    @property
    def made_by(self) -> dict[str, Any]:
        """As in the base class, with the detector and its hash."""
        return super().made_by | {"detector": self.detector.source, "detector_sha256": self.detector.sha256}

    @property
    def id(self) -> dict[str, Any]:
        """As in the base class, with the detector's content."""
        found = self.detector
        return super().id | {"detector": found.name, "detector_config_sha256": found.config_sha256}

    def maps(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, Params]]:
        """As in the contract; the params hold `n_persons` and `persons`, in pixels, rounded to a hundredth."""
        made = []
        for image, persons in zip(images, self.persons(images), strict=True):
            people = [person["keypoints"] for person in persons]
            map = drawing(people, image.shape[0], image.shape[1], self._settings.keypoint_threshold)
            made.append((map, {"n_persons": len(persons), "persons": persons}))
        return made

    def persons(self, images: list[np.ndarray]) -> list[list[dict[str, Any]]]:
        """Of each picture its persons, surest first.

        Each has `keypoints`, 17 of [x, y, score] in COCO's order, `bbox` [x0, y0, x1, y1] and `score`.
        """
        boxes = self.boxes(images)
        whose = [(i, box) for i, found in enumerate(boxes) for box in found]
        persons: list[list[dict[str, Any]]] = [[] for _ in images]
        for (i, box), keypoints in zip(whose, self.keypoints(images, whose), strict=True):
            bbox, score = [round(float(v), 2) for v in box[:4]], round(float(box[4]), 2)
            points = [[round(float(v), 2) for v in point] for point in keypoints]
            persons[i].append({"keypoints": points, "bbox": bbox, "score": score})
        return persons

    def boxes(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Of each picture float32 (n, 5): corners x0, y0, x1, y1 inside the picture, and score."""
        what = f"--cond pose:detector={self._settings.detector}"
        network = load_transformer(what, self.detector, self.dtype, ("RTDetrForObjectDetection",))
        names = {name: i for i, name in network.config.id2label.items()}
        person = names.get("person", 0)
        values = network.pixel_values(images)
        found: dict[int, np.ndarray] = {}
        for group in self.passes([value.shape for value in values]):
            outputs = network([values[i] for i in group])
            sizes = [images[i].shape[:2] for i in group]
            detected = network.processor.post_process_object_detection(
                outputs, threshold=self._settings.threshold, target_sizes=sizes
            )
            for i, (height, width), one in zip(group, sizes, detected, strict=True):
                chosen = one["labels"] == person
                corners = one["boxes"][chosen].cpu().numpy().clip(0, [width, height, width, height])
                whole = np.column_stack([corners, one["scores"][chosen].cpu().numpy()])
                found[i] = whole[(corners[:, 2:] - corners[:, :2] >= 1).all(1)]
        return [found[i] for i in range(len(images))]

    def keypoints(self, images: list[np.ndarray], whose: list[tuple[int, np.ndarray]]) -> list[np.ndarray]:
        """float32 (17, 3), x, y and score, of each (picture's index, box). Raises `UsageError` for other joints."""
        import torch

        what = f"--cond pose:model={self.network_settings.model}"
        network = load_transformer(what, self.weights, self.dtype, ("VitPoseForPoseEstimation",))
        if not whose:  # the library's processor fails where no picture has a person
            return []
        values = crops(network, images, whose)
        experts = getattr(network.config.backbone_config, "num_experts", 1)
        first = torch.zeros(len(values), dtype=torch.long, device=values.device)  # ViTPose+ has one a data set: COCO
        made: list[np.ndarray] = []
        for group in self.passes([value.shape for value in values]):
            expert = {"dataset_index": first[group]} if experts > 1 else {}
            outputs = network([values[i] for i in group], **expert)
            if outputs.heatmaps.shape[1] != JOINTS:
                raise UsageError(f"{what} finds {outputs.heatmaps.shape[1]} keypoints; poses are drawn of COCO's 17.")
            boxes = [xywh(whose[i][1]) for i in group]
            # As one picture with all the persons: how many are in which makes no difference.
            (people,) = network.processor.post_process_pose_estimation(outputs, boxes=[boxes])
            made += [np.column_stack([p["keypoints"].numpy(), p["scores"].numpy()]) for p in people]
        return made


def xywh(box: np.ndarray) -> list[float]:
    """Corners to corner, width and height, as ViTPose's processor takes boxes."""
    return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]


def crops(network: Transformer, images: list[np.ndarray], whose: list[tuple[int, np.ndarray]]) -> Any:
    """Each person as the pose network's float32 (N, 3, h, w), cut on the device.

    The processor's own rule (`box_to_center_and_scale`, then an unbiased affine map): the box grown to the network's
    proportions and by a quarter, corner pixel to corner pixel, bilinear, black outside the picture.
    """
    import torch
    import torch.nn.functional as F

    processor = network.processor
    height, width = processor.size["height"], processor.size["width"]
    made = []
    for i in dict.fromkeys(i for i, _ in whose):
        picture = on_device([images[i]]).float()
        boxes = torch.tensor([xywh(box) for j, box in whose if j == i], device=picture.device)
        x, y, w, h = boxes.unbind(1)
        wide, high = torch.maximum(w, h * width / height) * PADDING, torch.maximum(h, w * height / width) * PADDING
        columns = (x + w / 2 - wide / 2)[:, None] + torch.linspace(0, 1, width, device=x.device) * wide[:, None]
        rows = (y + h / 2 - high / 2)[:, None] + torch.linspace(0, 1, height, device=x.device) * high[:, None]
        last_x, last_y = max(1, picture.shape[3] - 1), max(1, picture.shape[2] - 1)
        grid = torch.stack(
            torch.broadcast_tensors((columns * 2 / last_x - 1)[:, None], (rows * 2 / last_y - 1)[:, :, None]), dim=3
        )
        cut = F.grid_sample(picture.expand(len(boxes), -1, -1, -1), grid, align_corners=True)
        inside = (grid.abs() <= 1).all(3)[:, None]  # the processor blends nothing beyond the edge
        made.append((cut * inside).round())  # and its crops are of whole levels
    statistics = processor.image_mean, processor.image_std
    mean, std = (torch.tensor(values, device=made[0].device).view(3, 1, 1) for values in statistics)
    return (torch.cat(made) * processor.rescale_factor - mean) / std
