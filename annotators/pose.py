"""Pose: persons detected by RT-DETR, keypoints by ViTPose (arXiv 2204.12484), drawn in OpenPose's style."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

from ..core.errors import UsageError
from .base import Params
from .networks.models import ModelAnnotator, ModelSettings, Transformer, load_transformer, to_device
from .networks.pose_drawing import JOINTS, draw_poses
from .networks.weights import LocalWeights, default, find_weights

PADDING = 1.25
"""A person's crop is this much larger than the box, as in ViTPose's training."""


class PoseSettings(ModelSettings):
    """Which networks detect persons and keypoints, and from which scores on."""

    model: str = Field(default("pose").name, description="vitpose, vitpose-plus, a folder or a hub id")
    detector: str = Field(default("pose", "detector").name, description="rtdetr, a folder or a hub id")
    threshold: float = Field(0.5, gt=0, lt=1, description="lowest score of a person")
    keypoint_threshold: float = Field(0.3, ge=0, lt=1, description="keypoints above this score are drawn")


class Pose(ModelAnnotator):
    """Drawing (H, W, 3) RGB on black; all black without persons. The params hold the 17 COCO keypoints per person."""

    name = "pose"
    version = "pose-1"
    Settings = PoseSettings

    @cached_property
    def detector(self) -> LocalWeights:
        """The detector's weights. Raises `SctoolError` as `ready` does."""
        return find_weights(self.name, self._settings.detector, "detector", "detector")

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
        detector = {"detector": self.detector.name, "detector_config_sha256": self.detector.config_sha256}
        return super().id | detector

    def maps(self, images: list[np.ndarray]) -> list[tuple[np.ndarray, Params]]:
        """As in the base class; the params hold `n_persons` and `persons`, in pixels, rounded to two decimals."""
        maps = []
        for image, persons in zip(images, self.persons(images), strict=True):
            people = [person["keypoints"] for person in persons]
            map = draw_poses(people, image.shape[0], image.shape[1], self._settings.keypoint_threshold)
            maps.append((map, {"n_persons": len(persons), "persons": persons}))
        return maps

    def persons(self, images: list[np.ndarray]) -> list[list[dict[str, Any]]]:
        """The persons of each image, highest score first.

        Each has `keypoints`, 17 of [x, y, score] in COCO's order, `bbox` [x0, y0, x1, y1] and `score`.
        """
        boxes = self.boxes(images)
        person_boxes = [(i, box) for i, image_boxes in enumerate(boxes) for box in image_boxes]
        persons: list[list[dict[str, Any]]] = [[] for _ in images]
        for (i, box), keypoints in zip(person_boxes, self.keypoints(images, person_boxes), strict=True):
            bbox, score = [round(float(v), 2) for v in box[:4]], round(float(box[4]), 2)
            points = [[round(float(v), 2) for v in point] for point in keypoints]
            persons[i].append({"keypoints": points, "bbox": bbox, "score": score})
        return persons

    def boxes(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """The boxes of each image, float32 (n, 5): corners x0, y0, x1, y1 inside the image, and score."""
        what = f"--cond pose:detector={self._settings.detector}"
        network = load_transformer(what, self.detector, self.dtype, ("RTDetrForObjectDetection",))
        names = {name: i for i, name in network.config.id2label.items()}
        person = names.get("person", 0)
        values = network.pixel_values(images)
        boxes: dict[int, np.ndarray] = {}
        for group in self.batches([value.shape for value in values]):
            outputs = network([values[i] for i in group])
            sizes = [images[i].shape[:2] for i in group]
            detected = network.processor.post_process_object_detection(
                outputs, threshold=self._settings.threshold, target_sizes=sizes
            )
            for i, (height, width), result in zip(group, sizes, detected, strict=True):
                is_person = result["labels"] == person
                corners = result["boxes"][is_person].cpu().numpy().clip(0, [width, height, width, height])
                scored = np.column_stack([corners, result["scores"][is_person].cpu().numpy()])
                boxes[i] = scored[(corners[:, 2:] - corners[:, :2] >= 1).all(1)]
        return [boxes[i] for i in range(len(images))]

    def keypoints(self, images: list[np.ndarray], person_boxes: list[tuple[int, np.ndarray]]) -> list[np.ndarray]:
        """float32 (17, 3), x, y and score, of each (image index, box). Raises `UsageError` for other keypoints."""
        import torch

        what = f"--cond pose:model={self.network_settings.model}"
        network = load_transformer(what, self.weights, self.dtype, ("VitPoseForPoseEstimation",))
        if not person_boxes:  # the library's processor fails if no image has a person
            return []
        values = crop_persons(network, images, person_boxes)
        experts = getattr(network.config.backbone_config, "num_experts", 1)
        coco = torch.zeros(len(values), dtype=torch.long, device=values.device)  # ViTPose+ has one expert per data set
        keypoints: list[np.ndarray] = []
        for group in self.batches([value.shape for value in values]):
            expert = {"dataset_index": coco[group]} if experts > 1 else {}
            outputs = network([values[i] for i in group], **expert)
            if outputs.heatmaps.shape[1] != JOINTS:
                raise UsageError(f"{what} predicts {outputs.heatmaps.shape[1]} keypoints; only COCO's 17 can be drawn.")
            boxes = [to_xywh(person_boxes[i][1]) for i in group]
            # Passed as one image with all persons: which image they are in makes no difference here.
            (people,) = network.processor.post_process_pose_estimation(outputs, boxes=[boxes])
            keypoints += [np.column_stack([p["keypoints"].numpy(), p["scores"].numpy()]) for p in people]
        return keypoints


def to_xywh(box: np.ndarray) -> list[float]:
    """Corners to corner, width and height, the box format of ViTPose's processor."""
    return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]


def crop_persons(network: Transformer, images: list[np.ndarray], person_boxes: list[tuple[int, np.ndarray]]) -> Any:
    """Each person as the pose network's input, float32 (N, 3, h, w), cropped on the device.

    The same as the processor (`box_to_center_and_scale`, then an unbiased affine map): the box is extended to the
    network's aspect ratio and by `PADDING`, corner pixel to corner pixel, bilinear, black outside the image.
    """
    import torch
    import torch.nn.functional as F

    processor = network.processor
    height, width = processor.size["height"], processor.size["width"]
    crops = []
    for i in dict.fromkeys(i for i, _ in person_boxes):
        image = to_device([images[i]]).float()
        boxes = torch.tensor([to_xywh(box) for j, box in person_boxes if j == i], device=image.device)
        x, y, w, h = boxes.unbind(1)
        wide, high = torch.maximum(w, h * width / height) * PADDING, torch.maximum(h, w * height / width) * PADDING
        columns = (x + w / 2 - wide / 2)[:, None] + torch.linspace(0, 1, width, device=x.device) * wide[:, None]
        rows = (y + h / 2 - high / 2)[:, None] + torch.linspace(0, 1, height, device=x.device) * high[:, None]
        last_x, last_y = max(1, image.shape[3] - 1), max(1, image.shape[2] - 1)
        grid = torch.stack(
            torch.broadcast_tensors((columns * 2 / last_x - 1)[:, None], (rows * 2 / last_y - 1)[:, :, None]), dim=3
        )
        crop = F.grid_sample(image.expand(len(boxes), -1, -1, -1), grid, align_corners=True)
        inside = (grid.abs() <= 1).all(3)[:, None]  # like the processor, no blending beyond the border
        crops.append((crop * inside).round())  # the processor's crops are uint8
    statistics = processor.image_mean, processor.image_std
    mean, std = (torch.tensor(values, device=crops[0].device).view(3, 1, 1) for values in statistics)
    return (torch.cat(crops) * processor.rescale_factor - mean) / std
