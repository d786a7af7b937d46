"""The fast Canny is `cv2.Canny`, bit for bit: any size, ties between channels, thresholds in any order, any strips."""

import cv2
import numpy as np
import pytest
from skimage import data

from sctool.annotators import canny


@pytest.mark.parametrize("strip", [1 << 17, 700])
def test_bit_for_bit(strip, monkeypatch):
    monkeypatch.setattr(canny, "STRIP", strip)
    rng = np.random.default_rng(0)
    for height in (1, 2, 3, 4, 5, 17, 64, 65):
        for width in (1, 2, 3, 4, 7, 16, 33, 100, 350, 701):
            noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            ties = rng.integers(0, 3, (height, width, 3), dtype=np.uint8) * np.uint8(90)
            grey = np.repeat(noise[:, :, :1], 3, axis=2)
            for image in (noise, ties, np.ascontiguousarray(ties[:, :, [0, 0, 2]]), grey, np.zeros_like(noise)):
                for low, high in ((100, 200), (200, 100), (0, 0), (30, 900)):
                    assert np.array_equal(canny.edges(image, low, high), cv2.Canny(image, low, high))


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_bit_for_bit_on_photographs(name):
    photo = getattr(data, name)()
    for image in (photo, np.ascontiguousarray(photo[:, ::-1]), cv2.resize(photo, None, fx=2.3, fy=1.7)):
        assert np.array_equal(canny.edges(image, 100, 200), cv2.Canny(image, 100, 200))
