"""Annotators that run a network, on tiny random ones: against transformers' steps, restatements, controlnet_aux."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from safetensors.torch import save_file
from skimage import data

from sctool.annotators import annotator
from sctool.annotators.depth import NEAREST, normalise
from sctool.annotators.networks.edge_networks import Hed as HedNetwork
from sctool.annotators.networks.edge_networks import PiDiNet, _folded, load_edges, soft_edges
from sctool.annotators.networks.models import load_transformer
from sctool.annotators.networks.pose_drawing import COLOURS, draw_pose, draw_poses, to_openpose
from sctool.annotators.pose import crop_persons, to_xywh
from sctool.annotators.sketch import scribble
from sctool.core.errors import SctoolError, UsageError

# Two of one size between which lies another: batches must keep order and mix no sizes.
IMAGES = [
    np.ascontiguousarray(image)
    for image in (data.astronaut()[:100, :150], data.chelsea()[:90, :60], data.astronaut()[200:300, :150])
]
KEYS = ["a", "b", "c"]
DEPTHS = ("dpt", "anything", "zoe")
SEGS = ("upernet", "segformer", "mask2former", "oneformer")


def oracle(module: str):
    """controlnet_aux where it is installed; it warns a lot while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"controlnet_aux.{module}")


# ------------------------------------------------------------------------------------------------ tiny networks


def depth_networks():
    stages = ["stage1", "stage2", "stage3", "stage4"]
    neck = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8}
    dino = tf.Dinov2Config(
        image_size=28, patch_size=14, num_hidden_layers=4, hidden_size=16, num_attention_heads=2, out_features=stages,
        apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    beit = tf.BeitConfig(
        image_size=64, patch_size=16, num_hidden_layers=4, hidden_size=16, num_attention_heads=2, intermediate_size=16,
        out_features=stages, reshape_hidden_states=False,
    )  # fmt: skip
    dpt = tf.DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], **neck,
    )  # fmt: skip
    anything = tf.DepthAnythingConfig(
        backbone_config=dino, reassemble_hidden_size=16, patch_size=14, head_hidden_size=8, head_in_index=-1, **neck
    )
    zoe = tf.ZoeDepthConfig(
        backbone_config=beit, backbone_hidden_size=16, bottleneck_features=8, num_attractors=[4, 2, 2, 1],
        bin_embedding_dim=8, num_relative_features=8, **neck,
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    # DPT's processor is told to keep the aspect, which the network could not take.
    yield "dpt", tf.DPTForDepthEstimation(dpt), tf.DPTImageProcessor(size=size, keep_aspect_ratio=True)
    size = {"height": 56, "width": 56}
    processor = tf.DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14)
    yield "anything", tf.DepthAnythingForDepthEstimation(anything), processor
    processor = tf.ZoeDepthImageProcessor(size={"height": 64, "width": 64}, ensure_multiple_of=32)
    yield "zoe", tf.ZoeDepthForDepthEstimation(zoe), processor


def seg_networks():
    stages = ["stage1", "stage2", "stage3", "stage4"]
    square = tf.SegformerImageProcessor(size={"height": 64, "width": 64})
    convnext = tf.ConvNextConfig(num_stages=4, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=stages)
    upernet = tf.UperNetConfig(
        backbone_config=convnext, hidden_size=8, pool_scales=[1, 2], use_auxiliary_head=False, num_labels=150
    )
    yield "upernet", tf.UperNetForSemanticSegmentation(upernet), square
    segformer = tf.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
        num_labels=150,
    )  # fmt: skip
    yield "segformer", tf.SegformerForSemanticSegmentation(segformer), square
    swin = tf.SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages
    )
    small = {
        "backbone_config": swin, "hidden_dim": 32, "encoder_feedforward_dim": 32, "encoder_layers": 1,
        "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 32, "num_queries": 20, "num_labels": 150,
    }  # fmt: skip
    size = {"shortest_edge": 64, "longest_edge": 256}
    mask2former = tf.Mask2FormerConfig(feature_size=32, mask_feature_size=32, **small)
    network = tf.Mask2FormerForUniversalSegmentation(mask2former)
    yield "mask2former", network, tf.Mask2FormerImageProcessor(size=size)
    oneformer = tf.OneFormerConfig(
        conv_dim=32, mask_dim=32, text_encoder_width=16, text_encoder_num_layers=1, text_encoder_vocab_size=520,
        text_encoder_context_length=16, task_seq_len=16, query_dec_layers=1, **small,
    )  # fmt: skip
    network = tf.OneFormerForUniversalSegmentation(oneformer)
    yield "oneformer", network, tf.OneFormerImageProcessor(size=size)


def pose_networks():
    resnet = tf.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, out_features=["stage2", "stage3", "stage4"],
        layer_type="basic",
    )  # fmt: skip
    detector = tf.RTDetrConfig(
        backbone_config=resnet, encoder_in_channels=[16] * 3, encoder_hidden_dim=32, encoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_in_channels=[32] * 3, d_model=32, num_queries=12, decoder_layers=2,
        decoder_ffn_dim=32, decoder_attention_heads=2, num_labels=2, eval_size=None,
    )  # fmt: skip
    processor = tf.RTDetrImageProcessor(size={"height": 64, "width": 64})
    yield "rtdetr", tf.RTDetrForObjectDetection(detector), processor
    for name, experts, joints in (("vitpose", 1, 17), ("vitpose-plus", 3, 17), ("hands", 1, 21)):
        backbone = tf.VitPoseBackboneConfig(
            image_size=[64, 48], patch_size=[16, 16], hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            out_features=["stage2"], num_experts=experts, part_features=8,
        )  # fmt: skip
        config = tf.VitPoseConfig(backbone_config=backbone, num_labels=joints, scale_factor=4, use_simple_decoder=True)
        yield name, tf.VitPoseForPoseEstimation(config), tf.VitPoseImageProcessor(size={"height": 64, "width": 48})


SPREAD = {
    "dpt": None,
    "anything": None,
    "rtdetr": 0.05,
    "zoe": 0.3,
    "vitpose": 0.3,
    "mask2former": 0.5,
    "oneformer": 0.5,
}


@pytest.fixture(scope="module")
def nets(tmp_path_factory, tiny_base) -> Path:
    """A folder of tiny networks as save_pretrained writes them; weights spread enough for maps that vary."""
    folder = tmp_path_factory.mktemp("nets")
    tf.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    for source in (depth_networks, seg_networks, pose_networks):
        for name, network, processor in source():
            if spread := SPREAD.get(name, 0.2):
                for weight in (weight for weight in network.parameters() if weight.ndim > 1):
                    torch.nn.init.normal_(weight, std=spread)
            network.save_pretrained(folder / name)
            processor.save_pretrained(folder / name)
    shutil.copytree(tiny_base / "tokenizer", folder / "oneformer", dirs_exist_ok=True)
    settings = folder / "oneformer" / "preprocessor_config.json"
    # As on the hub: a file of class names that lies in another repository.
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"class_info_file": "ade20k_panoptic.json"}))
    return folder


def random_hed() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = HedNetwork().state_dict()
    for key, value in state.items():
        if value.ndim == 4 and value.shape[-1] == 3:
            value.normal_(0, (2 / (9 * value.shape[1])) ** 0.5, generator=generator)
        elif key.endswith("projection.weight"):
            value.normal_(0, 0.003, generator=generator)
        else:
            value.zero_()
    state["norm"] += 110.0
    return state


@pytest.fixture(scope="module")
def hed_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hed") / "ControlNetHED.pth"
    torch.save(random_hed(), path)
    return path


def alone(spec: str) -> list[np.ndarray]:
    return [annotator(spec)([image], [key])[0][0] for image, key in zip(IMAGES, KEYS, strict=True)]


def differs(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b).max())


# --------------------------------------------------------------------------------------------------- soft edges


def hed_restated(state: dict[str, torch.Tensor], image: np.ndarray) -> np.ndarray:
    """ControlNet's HED in the words of its own code, with OpenCV's resize and a float64 sigmoid."""
    x = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None] - state["norm"]
    edges = []
    for block, convs in ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3)):
        x = F.max_pool2d(x, 2, 2) if block > 1 else x
        for i in range(convs):
            x = F.conv2d(x, state[f"block{block}.convs.{i}.weight"], state[f"block{block}.convs.{i}.bias"], padding=1)
            x = F.relu(x)
        head = f"block{block}.projection"
        logit = F.conv2d(x, state[f"{head}.weight"], state[f"{head}.bias"])[0, 0].numpy()
        edges.append(cv2.resize(logit, image.shape[1::-1], interpolation=cv2.INTER_LINEAR))
    return 1 / (1 + np.exp(-np.mean(edges, axis=0).astype(np.float64)))


def test_hed_has_the_published_layout():
    state = HedNetwork().state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (37, 14_716_168)
    assert state["norm"].shape == (1, 3, 1, 1)
    assert state["block5.convs.2.weight"].shape == (512, 512, 3, 3)
    assert state["block3.projection.weight"].shape == (1, 256, 1, 1)


def test_hed_is_the_published_algorithm_at_the_pictures_own_size(hed_file):
    results = annotator(f"hed:model={hed_file}")(IMAGES, KEYS)
    state = torch.load(hed_file, weights_only=True)
    for image, (map, params) in zip(IMAGES, results, strict=True):
        height, width = image.shape[:2]
        padded = np.pad(image, ((0, -height % 16), (0, -width % 16), (0, 0)), mode="edge")
        edge = hed_restated(state, padded)[:height, :width]
        assert differs(map, (edge * 255).astype(np.uint8)) <= 1
        assert map.std() > 5
        assert params["model"] == str(hed_file)
        assert (params["safe"], params["invert"]) == (False, False)
        assert params["weights_sha256"] == hashlib.sha256(hed_file.read_bytes()).hexdigest()
        assert params["dtype"] == "fp32"


def test_hed_settings(hed_file):
    plain, safe, inverted = (
        annotator(f"hed:model={hed_file}{setting}")(IMAGES[:1], ["a"])[0][0] for setting in ("", ",safe=1", ",invert=1")
    )
    assert np.array_equal(inverted, 255 - plain)
    assert set(np.unique(safe)) <= {0, 127, 255}
    expected = (plain.astype(float) / 255 * 3).astype(int)
    assert (np.array([0, 127, 255, 255])[expected] == safe).mean() > 0.98  # but for what truncation moved


def test_safetensors_and_pth_give_the_same_edges(hed_file, tmp_path):
    save_file(random_hed(), tmp_path / "hed.safetensors")
    a, b = (annotator(f"hed:model={path}") for path in (hed_file, tmp_path / "hed.safetensors"))
    assert np.array_equal(a(IMAGES[:1], ["a"])[0][0], b(IMAGES[:1], ["a"])[0][0])
    assert a.id["weights_sha256"] != b.id["weights_sha256"]


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"norm": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(SctoolError, match=r"evil\.pth contains neither HED"):
        annotator(f"hed:model={tmp_path}/evil.pth")(IMAGES[:1], ["a"])
    assert not (tmp_path / "ran").exists()


def test_another_network_in_the_file_is_told(tmp_path):
    state = random_hed()
    del state["block3.convs.1.bias"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(SctoolError, match=r"neither HED \(ControlNetHED\.pth\) nor PiDiNet"):
        annotator(f"sketch:model={tmp_path}/x.pth")(IMAGES[:1], ["a"])


def ridges_restated(x: np.ndarray, t: float, s: float) -> np.ndarray:
    """ControlNet's nms, pixel by pixel."""
    x = cv2.GaussianBlur(x.astype(np.float32), (0, 0), s)
    wide = np.pad(x, 1, constant_values=-np.inf)
    out = np.zeros(x.shape, np.uint8)
    for i, j in np.ndindex(x.shape):
        near = wide[i : i + 3, j : j + 3]
        lines = near[1], near[:, 1], np.diag(near), np.diag(near[:, ::-1])
        out[i, j] = 255 if x[i, j] > t and any(line.max() == x[i, j] for line in lines) else 0
    return out


def test_sketch_is_the_published_scribble(hed_file):
    edge = cv2.GaussianBlur(IMAGES[0][..., 0], (0, 0), 2)
    edge = cv2.normalize(edge, np.empty_like(edge), 0, 255, cv2.NORM_MINMAX)
    expected = cv2.GaussianBlur(ridges_restated(edge, 127, 3.0), (0, 0), 3.0)
    expected = np.where(expected > 4, 255, 0)
    assert np.array_equal(scribble(edge), expected)
    assert 0.05 < (expected == 255).mean() < 0.95
    hed = annotator(f"hed:model={hed_file}")(IMAGES, KEYS)
    for (map, params), (soft, _) in zip(annotator(f"sketch:model={hed_file}")(IMAGES, KEYS), hed, strict=True):
        assert np.array_equal(map, scribble(soft))
        assert params["rule"] == "scribble"


def test_hed_and_scribble_are_controlnet_aux(hed_file):
    hed = oracle("hed")
    upstream = hed.ControlNetHED_Apache2()
    upstream.load_state_dict(torch.load(hed_file, weights_only=True))
    detector = hed.HEDdetector(upstream)
    image = np.ascontiguousarray(data.astronaut()[:128, 100:292])
    for spec, extra in (("hed", {}), ("hed:safe=1", {"safe": True})):
        theirs = detector(image, detect_resolution=128, image_resolution=128, output_type="np", **extra)[..., 0]
        name, _, rest = spec.partition(":")
        ours = annotator(f"{name}:model={hed_file},{rest}")([image], ["a"])[0][0]
        off = np.abs(ours.astype(int) - theirs)
        assert (off > 1).mean() < 0.001  # a level of `safe` may flip
    edge = cv2.GaussianBlur(image[..., 1], (0, 0), 2)
    theirs = cv2.GaussianBlur(oracle("util").nms(edge, 127, 3.0), (0, 0), 3.0)
    assert np.array_equal(scribble(edge), np.where(theirs > 4, 255, 0))


def difference_restated(kind: str, kernel: np.ndarray, patch: np.ndarray) -> float:
    """PiDiNet's equations (2) to (4) at the middle of a 5x5 patch: weights times differences of pixels."""
    if kind == "plain":
        return float((kernel * patch[1:4, 1:4]).sum())
    if kind == "centre":
        return float((kernel * (patch[1:4, 1:4] - patch[2, 2])).sum())
    rows = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    if kind == "radial":  # the authors' code takes the kernel's last eight weights, row by row
        differences = [patch[2 + 2 * y, 2 + 2 * x] - patch[2 + y, 2 + x] for y, x in rows]
        return float((kernel.ravel()[1:] * differences).sum())
    ring = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]  # clockwise
    pairs = zip(ring, ring[1:] + ring[:1], strict=True)
    return float(sum(kernel[1 + y, 1 + x] * (patch[2 + y, 2 + x] - patch[2 + v, 2 + u]) for (y, x), (v, u) in pairs))


@pytest.mark.parametrize("kind", ["plain", "centre", "angular", "radial"])
def test_pixel_differences_are_folded_into_plain_kernels(kind):
    rng = np.random.default_rng(0)
    kernel, patch = rng.normal(size=(3, 3)), rng.normal(size=(5, 5))
    folded = _folded(kind, torch.from_numpy(kernel)[None, None])[0, 0].numpy()
    within = patch if folded.shape == (5, 5) else patch[1:4, 1:4]
    assert (folded * within).sum() == pytest.approx(difference_restated(kind, kernel, patch))


def test_pidinet_reads_the_published_layout(tmp_path):
    published = {
        key: value[..., 1:4, 1:4].clone() if value.shape[-1] == 5 else value
        for key, value in PiDiNet().state_dict().items()
    }
    assert (len(published), sum(value.numel() for value in published.values())) == (83, 710_149)
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in published.items()}}, tmp_path / "p.pth")
    network = load_edges(tmp_path / "p.pth")
    assert isinstance(network, PiDiNet)
    assert torch.equal(network.block1_3.conv1.weight, published["block1_3.conv1.weight"])  # the plain one of a turn
    assert network.block1_2.conv1.weight.shape == (60, 1, 5, 5)


def test_pidinet_is_the_published_network(tmp_path):
    torch.manual_seed(0)
    upstream = oracle("pidi.model").pidinet().eval()
    state = upstream.state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (83, 710_149)
    for value in state.values():
        if value.ndim > 1:
            value.mul_(2)
    path = tmp_path / "table5_pidinet.pth"
    torch.save({"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    image = np.ascontiguousarray(data.astronaut()[:64, 100:196])
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.no_grad():
        theirs = upstream(pixels.float().flip(1) / 255)[-1][:, 0]
        ours = soft_edges(load_edges(path), pixels)
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.std() > 0.01
    ((map, params),) = annotator(f"sketch:model={path}")([image], ["a"])
    assert np.array_equal(map, np.where(ours[0].numpy() > 0.5, 255, 0))
    assert params["rule"] == "above one half"


# -------------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("name", DEPTHS)
def test_depth_is_transformers_own_depth_stretched(nets, name):
    results = annotator(f"depth:model={nets / name}")(IMAGES, KEYS)
    network = tf.AutoModelForDepthEstimation.from_pretrained(nets / name).eval()
    processor = tf.AutoImageProcessor.from_pretrained(nets / name)
    for image, (map, params) in zip(IMAGES, results, strict=True):
        square = {"keep_aspect_ratio": False} if name == "dpt" else {}
        with torch.no_grad():
            outputs = network(**processor(images=image, return_tensors="pt", **square))
        size = {"source_sizes" if name == "zoe" else "target_sizes": [image.shape[:2]]}
        depth = processor.post_process_depth_estimation(outputs, **size)[0]["predicted_depth"].numpy()
        depth = 1 / np.maximum(depth, NEAREST) if name == "zoe" else depth
        depth = depth - depth.min()
        depth = depth / depth.max()
        assert differs(map, (depth * 255).astype(np.uint8)) <= 1
        assert (map.min(), map.max()) == (0, 255)
        assert params["metric"] == (name == "zoe")
    assert max(differs(a, b) for a, (b, _) in zip(alone(f"depth:model={nets / name}"), results, strict=True)) <= 1


def test_flat_depth_is_black():
    assert not normalise(torch.full((4, 5), 3.0), metric=False).any()
    assert not normalise(torch.full((4, 5), 3.0) + 1e-5 * torch.rand(4, 5), metric=True).any()
    assert not normalise(torch.zeros(4, 5), metric=False).any()


def test_near_is_white_for_both_kinds_of_depth():
    inverse = torch.tensor([[1.0, 2.0, 3.0]])
    assert normalise(inverse, metric=False).tolist() == [[0, 127, 255]]
    assert normalise(1 / inverse, metric=True).tolist() == [[0, 127, 255]]


# ------------------------------------------------------------------------------------------------- segmentation


@pytest.mark.parametrize("name", SEGS)
def test_seg_is_transformers_own_segmentation(nets, name):
    results = annotator(f"seg:model={nets / name}")(IMAGES, KEYS)
    config = tf.AutoConfig.from_pretrained(nets / name)
    assert config.architectures
    network = getattr(tf, config.architectures[0]).from_pretrained(nets / name).eval()
    if name == "oneformer":
        images = tf.OneFormerImageProcessor.from_pretrained(nets / name, class_info_file=None)
        whole = tf.OneFormerProcessor(images, tf.AutoTokenizer.from_pretrained(nets / name), task_seq_length=16)
        inputs = [whole(images=image, task_inputs=["semantic"], return_tensors="pt") for image in IMAGES]
    else:
        images = tf.AutoImageProcessor.from_pretrained(nets / name)
        inputs = [images(images=image, return_tensors="pt") for image in IMAGES]
    for image, prepared, (map, params) in zip(IMAGES, inputs, results, strict=True):
        with torch.no_grad():
            outputs = network(**prepared)
        (ids,) = images.post_process_semantic_segmentation(outputs, target_sizes=[image.shape[:2]])
        assert map.shape == image.shape[:2]
        assert (map != ids.numpy()).mean() < 0.001
        assert params["classes"] == 150
    assert len(np.unique(results[0][0])) > 1
    single = alone(f"seg:model={nets / name}")
    assert max((a != b).mean() for a, (b, _) in zip(single, results, strict=True)) < 0.001


def test_more_classes_than_a_byte_holds_are_refused(tmp_path):
    config = tf.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=300
    )
    tf.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    tf.SegformerImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="predicts 300 classes; a map can store at most 255"):
        annotator(f"seg:model={tmp_path}")(IMAGES[:1], ["a"])


# --------------------------------------------------------------------------------------------------------- pose


def pose(nets: Path, model: str = "vitpose", **settings: object) -> str:
    extra = "".join(f",{key}={value}" for key, value in settings.items())
    return f"pose:model={nets / model},detector={nets / 'rtdetr'},threshold=0.001{extra}"


@pytest.mark.parametrize("name", ["vitpose", "vitpose-plus"])
def test_pose_is_transformers_own_pose(nets, name):
    instance = annotator(pose(nets, name))
    results = instance(IMAGES, KEYS)
    assert sum(params["n_persons"] for _, params in results) > 3
    detector = tf.RTDetrForObjectDetection.from_pretrained(nets / "rtdetr").eval()
    processor = tf.AutoImageProcessor.from_pretrained(nets / "rtdetr")
    vitpose = tf.VitPoseForPoseEstimation.from_pretrained(nets / name).eval()
    joints = tf.AutoImageProcessor.from_pretrained(nets / name)
    off = []
    for image, (map, params) in zip(IMAGES, results, strict=True):
        height, width = image.shape[:2]
        persons = params["persons"]
        with torch.no_grad():
            outputs = detector(**processor(images=image, return_tensors="pt"))
        (one,) = processor.post_process_object_detection(outputs, threshold=0.001, target_sizes=[(height, width)])
        boxes = one["boxes"][one["labels"] == 0].numpy().clip(0, [width, height, width, height])
        boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)]
        assert np.allclose([person["bbox"] for person in persons], boxes, atol=0.006)
        coco = np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]).tolist()
        experts = {"dataset_index": torch.zeros(len(boxes), dtype=torch.long)} if name == "vitpose-plus" else {}
        with torch.no_grad():
            outputs = vitpose(joints([image], boxes=[coco], return_tensors="pt")["pixel_values"], **experts)
        (expected,) = joints.post_process_pose_estimation(outputs, boxes=[coco])
        for person, theirs in zip(persons, expected, strict=True):
            ours = np.array(person["keypoints"])
            off.append(np.abs(ours[:, :2] - theirs["keypoints"].numpy()).max(1))
            assert np.abs(ours[:, 2] - theirs["scores"].numpy()).max() < 0.05
        assert np.array_equal(map, draw_poses([p["keypoints"] for p in persons], height, width, 0.3))
        assert map.any()
        json.dumps(params)
    # A level of rounding in a crop moves the peaks of random heatmaps that are flat; real ones have one peak.
    assert (np.concatenate(off) < 0.05).mean() > 0.95


def test_crops_are_the_processors_own(nets):
    instance = annotator(pose(nets))
    network = load_transformer("x", instance.weights, "fp32", ("VitPoseForPoseEstimation",))
    image = np.ascontiguousarray(data.astronaut()[:200, :300])
    boxes = [
        np.array(box) for box in ([40.5, 20.25, 120.0, 190.0, 1], [-0.0, 0.0, 300.0, 90.0, 1], [280, 150, 300, 200, 1])
    ]
    expected = network.processor([image], boxes=[[to_xywh(box) for box in boxes]], return_tensors="pt")["pixel_values"]
    ours = crop_persons(network, [IMAGES[0], image], [(1, box) for box in boxes])
    level = 1 / 255 / min(network.processor.image_std)
    assert (ours - expected).abs().max() < 1.01 * level  # rounding falls to either side
    assert (ours - expected).abs().mean() < 0.01 * level


def test_nobody_is_a_black_map(nets):
    spec = f"pose:model={nets / 'vitpose'},detector={nets / 'rtdetr'},threshold=0.9999"
    for map, params in annotator(spec)(IMAGES, KEYS):
        assert not map.any()
        assert (params["n_persons"], params["persons"]) == (0, [])
    assert annotator(spec)([], []) == []


def test_pictures_with_and_without_persons_in_one_batch(nets):
    blank = np.zeros((40, 40, 3), np.uint8)
    results = annotator(pose(nets))([*IMAGES, blank], [*KEYS, "d"])
    again = annotator(pose(nets))(IMAGES, KEYS)
    assert [params["n_persons"] for _, params in results[:3]] == [params["n_persons"] for _, params in again]
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(results, again, strict=False))


def test_other_joints_than_cocos_are_refused(nets):
    with pytest.raises(UsageError, match="predicts 21 keypoints"):
        annotator(pose(nets, "hands"))(IMAGES, KEYS)


# A person facing us on 512 x 512; digests of controlnet_aux 0.0.10's draw_bodypose for these points.
PERSON = [
    [256, 90, 0.9], [270, 76, 0.9], [242, 76, 0.9], [290, 84, 0.9], [222, 84, 0.9], [320, 160, 0.9], [192, 160, 0.9],
    [360, 240, 0.9], [150, 238, 0.9], [372, 320, 0.9], [128, 316, 0.9], [296, 300, 0.9], [216, 300, 0.9],
    [304, 400, 0.9], [210, 400, 0.9], [310, 490, 0.9], [204, 492, 0.9],
]  # fmt: skip
GOLDEN = {"whole": "902baa408f69c7d7", "without an arm": "a20c6265267d9f38"}


def person(kind: str) -> list[list[float]]:
    hidden = {7, 9} if kind == "without an arm" else set()
    return [[x, y, 0.1 if i in hidden else score] for i, (x, y, score) in enumerate(PERSON)]


@pytest.mark.parametrize("kind", GOLDEN)
def test_persons_are_drawn_as_published(kind):
    drawing = draw_poses([person(kind)], 512, 512, 0.3)
    assert hashlib.sha256(drawing.tobytes()).hexdigest()[:16] == GOLDEN[kind]


@pytest.mark.parametrize("kind", GOLDEN)
def test_persons_are_drawn_as_controlnet_aux_does(kind):
    points = to_openpose(person(kind), 0.3)
    body = oracle("open_pose.body")
    keypoints = [None if p is None else body.Keypoint(x=p[0] / 512, y=p[1] / 512) for p in points]
    theirs = oracle("open_pose.util").draw_bodypose(np.zeros((512, 512, 3), np.uint8), keypoints)
    assert np.array_equal(draw_poses([person(kind)], 512, 512, 0.3), theirs)


def test_coco_becomes_openpose():
    points = to_openpose(PERSON, 0.3)
    names = ["nose", "neck", "r sho", "r elb", "r wri", "l sho", "l elb", "l wri", "r hip", "r kne", "r ank", "l hip",
             "l kne", "l ank", "r eye", "l eye", "r ear", "l ear"]  # fmt: skip
    at = dict(zip(names, points, strict=True))
    assert at["neck"] == (256, 160)
    assert (at["nose"], at["r wri"], at["l ank"], at["r ear"]) == ((256, 90), (128, 316), (310, 490), (222, 84))
    hidden = [[x, y, 0.3 if i == 5 else score] for i, (x, y, score) in enumerate(PERSON)]
    assert to_openpose(hidden, 0.3)[1] is None  # no neck without both shoulders
    assert to_openpose(hidden, 0.3)[5] is None
    canvas = np.zeros((32, 32, 3), np.uint8)
    draw_pose(canvas, [(16.9, 8.2), *[None] * 17])
    assert tuple(canvas[8, 16]) == COLOURS[0]


# ------------------------------------------------------------------------------------------------ the contract


@pytest.fixture(scope="module")
def specs(nets, hed_file) -> dict[str, str]:
    return {
        "hed": f"hed:model={hed_file}",
        "sketch": f"sketch:model={hed_file}",
        "depth": f"depth:model={nets / 'anything'}",
        "seg": f"seg:model={nets / 'segformer'}",
        "pose": pose(nets),
    }


@pytest.mark.parametrize("name", ["hed", "sketch", "depth", "seg", "pose"])
def test_a_map_does_not_hang_on_its_batch(specs, name):
    together = annotator(specs[name])(IMAGES, KEYS)
    split = annotator(f"{specs[name]},batch=1")(IMAGES, KEYS)
    limit = {"sketch": 255, "seg": 149}.get(name, 1)  # a pixel on a threshold may flip
    for (a, _), (b, _), c in zip(together, split, alone(specs[name]), strict=True):
        assert max(differs(a, b), differs(a, c)) <= limit
        assert (np.abs(a.astype(int) - c) > 1).mean() < 0.001


@pytest.mark.parametrize("name", ["hed", "depth", "seg", "pose"])
def test_a_pickled_annotator_is_small_and_does_the_same(specs, name):
    instance = annotator(specs[name])
    before = instance(IMAGES[:1], ["a"])
    sent = pickle.dumps(instance)
    assert len(sent) < 4000
    received = pickle.loads(sent)
    assert received.id == instance.id
    assert np.array_equal(received(IMAGES[:1], ["a"])[0][0], before[0][0])


def test_identity_is_what_decides_the_map(specs, nets, tmp_path):
    instance = annotator(specs["depth"])
    weights = hashlib.sha256((nets / "anything" / "model.safetensors").read_bytes()).hexdigest()
    assert instance.id["weights_sha256"] == weights
    assert (instance.id["version"], instance.id["model"]) == ("depth-1", "anything")
    assert instance.id["dtype"] == "fp32"
    assert instance.needs_weights
    moved = tmp_path / "elsewhere" / "anything"
    shutil.copytree(nets / "anything", moved)
    assert annotator(f"depth:model={moved},batch=3").id == instance.id
    settings = moved / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("56", "70"))
    assert annotator(f"depth:model={moved}").id != instance.id
    assert annotator(f"{specs['depth']},dtype=bf16").id["dtype"] == "bf16"
    both = annotator(specs["pose"]).id
    assert both["detector_sha256"] == hashlib.sha256((nets / "rtdetr/model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["hed", "depth", "seg"])
def test_half_precision_stays_close(specs, name):
    full = annotator(specs[name])(IMAGES[:1], ["a"])[0][0]
    ((half, params),) = annotator(f"{specs[name]},dtype=bf16")(IMAGES[:1], ["a"])
    assert params["dtype"] == "bf16"
    assert ((half == full) if name == "seg" else (np.abs(half.astype(int) - full) <= 8)).mean() > 0.9


@pytest.mark.parametrize("name", ["hed", "pose"])
def test_what_is_noted_with_a_map_makes_it_again(specs, name):
    instance = annotator(specs[name])
    ((map, params),) = instance(IMAGES[:1], ["a"])
    noted = json.loads(json.dumps(params))
    again = type(instance)(
        type(instance).Settings(**{k: v for k, v in noted.items() if k in instance.Settings.model_fields})
    )
    assert again.id == instance.id
    assert np.array_equal(again(IMAGES[:1], ["b"])[0][0], map)


def test_a_network_is_loaded_once_a_process(specs, monkeypatch):
    annotator(specs["depth"])(IMAGES[:1], ["a"])
    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", lambda *a, **k: pytest.fail("loaded twice"))
    annotator(specs["depth"])(IMAGES[:1], ["a"])


def test_another_kind_of_network_is_refused(nets):
    with pytest.raises(UsageError, match="contains a SegformerForSemanticSegmentation; this condition needs DepthAny"):
        annotator(f"depth:model={nets / 'segformer'}")(IMAGES[:1], ["a"])


def test_a_damaged_network_is_told(nets, tmp_path):
    shutil.copytree(nets / "segformer", tmp_path / "net")
    weights = tmp_path / "net" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(SctoolError, match="cannot be loaded"):
        annotator(f"seg:model={tmp_path / 'net'}")(IMAGES[:1], ["a"])
