"""Each annotator against its published algorithm, and the promise of same pixels in, same map out."""

from __future__ import annotations

import io
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from sctool.annotators import ANNOTATORS, annotator, make_annotators
from sctool.annotators.color import enlarge
from sctool.annotators.engine.maps import encode_png
from sctool.annotators.mask import PRESETS
from sctool.core.data.conditions import condition
from sctool.core.data.palette import ADE20K
from sctool.core.errors import UsageError

PHOTOS = {"astronaut": data.astronaut()[:, :384], "chelsea": data.chelsea(), "rocket": data.rocket()[::2, ::2]}


def one(spec: str, image: np.ndarray, key: str = "k", seed: int = 0):
    ((map, params),) = annotator(spec, seed)([np.ascontiguousarray(image)], [key])
    return map, params


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize(("low", "high"), [(100, 200), (50, 150)])
def test_canny_is_cv2_on_rgb(name, low, high):
    image = np.ascontiguousarray(PHOTOS[name])
    map, params = one("canny" if low == 100 else f"canny:low={low},high={high}", image)
    assert np.array_equal(map, cv2.Canny(image, low, high))
    assert params == {"low": low, "high": high}


@pytest.mark.parametrize(
    ("kind", "lows", "highs"), [("scepter", (50, 100), (200, 350)), ("t2i", (50, 150), (150, 250))]
)
def test_random_thresholds_lie_in_the_published_range_and_hang_on_seed_and_key(kind, lows, highs):
    canny = annotator(f"canny:random={kind}")
    drawn = [canny.thresholds(f"{i}") for i in range(400)]
    for values, (low, high) in zip(zip(*drawn, strict=True), (lows, highs), strict=True):
        assert low <= min(values) < low + (high - low) * 0.05
        assert high - (high - low) * 0.05 - 1 <= max(values) < high
    assert drawn == [annotator(f"canny:random={kind}").thresholds(f"{i}") for i in range(400)]
    assert drawn != [annotator(f"canny:random={kind}", seed=1).thresholds(f"{i}") for i in range(400)]
    _, params = one(f"canny:random={kind}", PHOTOS["chelsea"], key="7")
    assert (params["low"], params["high"]) == drawn[7]


def test_color_is_the_published_palette():
    image = PHOTOS["chelsea"]
    height, width = image.shape[:2]
    small = cv2.resize(image, (width // 64, height // 64), interpolation=cv2.INTER_CUBIC)
    map, params = one("color", image)
    assert np.array_equal(map, small)
    full = cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(enlarge(map, params["width"], params["height"]), full)
    area, _ = one("color:filter=area,ratio=100", image)
    assert np.array_equal(area, cv2.resize(image, (width // 100, height // 100), interpolation=cv2.INTER_AREA))


def test_color_of_a_small_picture_is_one_cell():
    assert one("color", PHOTOS["chelsea"][:40, :200])[0].shape == (1, 3, 3)


@pytest.mark.parametrize("preset", PRESETS)
def test_masks_cover_the_same_share_at_every_size(preset):
    mask = annotator(f"mask:preset={preset},area=1")
    shares = []
    for side in (48, 256, 512):
        maps = [mask.annotate(np.zeros((side, side, 3), np.uint8), str(i))[0] for i in range(150)]
        assert all(set(np.unique(m)) <= {0, 255} and m.any() and m.shape == (side, side) for m in maps)
        shares.append(np.mean([(m == 255).mean() for m in maps]))
    expected = {"train": 0.355, "medium": 0.31, "thick": 0.466, "thin": 0.298}[preset]  # LaMa's own code, 300 draws
    assert shares == pytest.approx([expected] * 3, rel=0.25)


def test_mask_polarity_area_and_odd_sizes():
    for shape in ((2, 2), (3, 500), (700, 20), (256, 512)):
        for i in range(20):
            map, params = one("mask:preset=thick", np.zeros((*shape, 3), np.uint8), str(i))
            assert map.shape == shape
            assert params["share"] == pytest.approx((map == 255).mean(), abs=1e-6)
            if min(shape) > 50:
                assert params["share"] <= 0.5


def test_masks_differ_between_keys_and_seeds_only():
    image = PHOTOS["chelsea"]
    maps = {(key, seed): one("mask", image, key, seed)[0].tobytes() for key in "abc" for seed in (0, 1)}
    assert len(set(maps.values())) == 6
    assert one("mask", 255 - image, "a")[0].tobytes() == maps["a", 0]


@pytest.mark.parametrize("name", [name for name in ANNOTATORS if not condition(name).network])
def test_a_map_does_not_hang_on_its_batch(name):
    instance = annotator(name)
    images = [np.ascontiguousarray(image) for image in PHOTOS.values()]
    together = instance(images, list(PHOTOS))
    for i in reversed(range(len(images))):
        ((alone, params),) = annotator(name)([images[i]], [list(PHOTOS)[i]])
        assert np.array_equal(alone, together[i][0])
        assert params == together[i][1]


def test_outpainting_keeps_one_rectangle_of_the_asked_share():
    image = np.zeros((96, 160, 3), np.uint8)
    shares, shapes = [], set()
    for i in range(200):
        map, params = one("outpaint:keep=0.1-0.5", image, str(i))
        left, top, right, bottom = params["kept"]
        expected = np.full((96, 160), 255, np.uint8)
        expected[top:bottom, left:right] = 0
        assert np.array_equal(map, expected)
        assert 0 <= left < right <= 160
        assert 0 <= top < bottom <= 96
        assert params["share"] == pytest.approx((map == 255).mean(), abs=1e-6)
        shares.append((map == 0).mean())
        shapes.add((left, top))
    assert 0.09 < min(shares) < 0.15
    assert 0.45 < max(shares) < 0.51
    assert len(shapes) > 150


def test_outpainting_around_the_centre():
    for shape in ((96, 160), (2, 2), (1, 40), (40, 1), (3, 500)):
        for i in range(20):
            map, params = one("outpaint:centre=true,keep=0.4", np.zeros((*shape, 3), np.uint8), str(i))
            left, top, right, bottom = params["kept"]
            assert abs(left - (shape[1] - right)) <= 1
            assert abs(top - (shape[0] - bottom)) <= 1
            assert set(np.unique(map)) == {0, 255}
    map, _ = one("outpaint:centre=true,keep=0.25", np.zeros((100, 200, 3), np.uint8))
    assert (map[25:75, 50:150] == 0).all()
    assert (map == 0).mean() == 0.25


def test_outpainting_hangs_on_seed_and_key():
    image = PHOTOS["chelsea"]
    maps = {(key, seed): one("outpaint", image, key, seed)[0].tobytes() for key in "abc" for seed in (0, 1)}
    assert len(set(maps.values())) == 6
    assert one("outpaint", 255 - image, "a")[0].tobytes() == maps["a", 0]
    assert annotator("outpaint:keep=0.3").id["keep"] == [0.3, 0.3]


def test_outpainting_shows_what_is_kept():
    image = np.ascontiguousarray(PHOTOS["chelsea"])
    map, params = one("outpaint", image)
    left, top, right, bottom = params["kept"]
    hint = condition("outpaint").render(map, image)
    assert np.array_equal(hint[top:bottom, left:right], image[top:bottom, left:right])
    assert not hint[map == 255].any()
    assert condition("outpaint").needs_image


def test_class_ids_are_shown_in_ade20ks_colours():
    assert ADE20K.shape == (150, 3)
    assert len({tuple(colour) for colour in ADE20K.tolist()}) == 149
    assert tuple(ADE20K[6]) == tuple(ADE20K[48]) == (140, 140, 140)  # road and skyscraper
    assert tuple(ADE20K[0]) == (120, 120, 120)
    assert tuple(ADE20K[12]) == (150, 5, 61)  # person
    assert tuple(ADE20K[149]) == (92, 0, 255)
    ids = np.array([[0, 12], [149, 255]], np.uint8)
    shown = condition("seg").render(ids, np.zeros((2, 2, 3), np.uint8))
    assert shown.tolist() == [[[120, 120, 120], [150, 5, 61]], [[92, 0, 255], [0, 0, 0]]]
    assert condition("seg").render(shown, shown) is shown
    assert not condition("seg").needs_image
    assert condition("seg").categorical
    assert not any(condition(name).categorical for name in ANNOTATORS if name != "seg")


def test_the_palette_is_controlnet_auxs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        util = pytest.importorskip("controlnet_aux.util")
    assert util.ade_palette() == ADE20K.tolist()


def test_conditions_with_settings_are_read():
    canny, color, mask = make_annotators(["canny:low=50,high=150,color", "mask:preset=thin"])
    assert canny.id == {"name": "canny", "version": "canny-1", "low": 50, "high": 150, "random": "none"}
    assert (color.name, mask.settings.preset) == ("color", "thin")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cany", "'cany'. Did you mean 'canny'"),
        ("canny:hihg=3", "canny key 'hihg'. Did you mean 'high'"),
        ("canny:low=x", "canny low='x'"),
        ("mask:preset=thicc", "'train', 'medium', 'thick' or 'thin'"),
        ("canny,color,canny", "'canny' twice"),
        ("canny:random=t2i,low=3", "leave out low="),
        ("low=3", "Write one first"),
        ("color:ratio=0", "color ratio='0'"),
        ("outpaint:keep=0.5-0.2", "LOW-HIGH with 0 < LOW <= HIGH < 1"),
        ("outpaint:keep=1", "LOW-HIGH"),
        ("hed:modle=x", "hed key 'modle'. Did you mean 'model'"),
        ("depth:dtype=fp64", "'auto', 'fp32', 'bf16' or 'fp16'"),
        (",", "no condition"),
    ],
)
def test_wrong_conditions_are_named(spec, words):
    with pytest.raises(UsageError) as caught:
        make_annotators([spec])
    assert words in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 8), (5, 17), (64, 33), (200, 513)])
def test_one_bit_maps_are_read_back_by_every_reader(shape):
    rng = np.random.default_rng(0)
    for map in (rng.integers(0, 2, shape, dtype=np.uint8) * np.uint8(255), np.zeros(shape, np.uint8)):
        content = encode_png(map, bilevel=True)
        assert np.array_equal(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE), map)
        with Image.open(io.BytesIO(content)) as image:
            assert image.mode == "1"
            assert np.array_equal(np.array(image.convert("L")), map)
        with Image.open(io.BytesIO(content)) as image:
            image.verify()  # the checksums
