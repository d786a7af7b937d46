"""Draws the demo's garments: flat shapes in colours that mini knows, whose edges make good hints.

    python recipes/mini/drawings.py --out core/assets/drawings

A shape is the left half of an outline; x is the distance from the vertical centre line and y that from the top, both in
percent of the image side. The right half is its mirror image. Inner lines are mirrored too and drawn darker on top.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

SIDE, OVER = 128, 4  # side in pixels; garments are drawn OVER times larger and averaged down

Line = tuple[tuple[float, float], ...]

TEE: Line = ((0, 20), (10, 16), (24, 20), (40, 38), (31, 46), (25, 40), (26, 86), (0, 87))
LONG: Line = ((0, 18), (10, 14), (22, 18), (34, 44), (40, 80), (31, 82), (24, 46), (24, 84), (0, 85))
COLLAR: Line = ((10, 16), (5, 23), (0, 25))
PANTS: Line = ((0, 10), (20, 10), (23, 40), (27, 92), (10, 93), (2, 42), (0, 38))
SHORTS: Line = ((0, 26), (24, 26), (33, 72), (6, 76), (0, 54))
SKIRT: Line = ((0, 24), (17, 24), (22, 44), (34, 82), (14, 86), (0, 87))
DRESS: Line = ((0, 22), (6, 20), (9, 8), (14, 8), (15, 24), (12, 44), (32, 90), (0, 94))
HAT: Line = ((0, 26), (14, 28), (21, 40), (23, 58), (42, 68), (30, 76), (0, 78))
JACKET: Line = ((0, 22), (9, 14), (23, 19), (36, 46), (41, 82), (31, 84), (25, 50), (26, 90), (1, 90))

GARMENTS: tuple[tuple[str, str, Line, tuple[Line, ...]], ...] = (
    ("t-shirt", "red", TEE, (COLLAR,)),
    ("long-sleeve top", "blue", LONG, (((10, 14), (5, 21), (0, 22)),)),
    ("pair of pants", "black", PANTS, ()),
    ("skirt", "brown", SKIRT, (((18, 32), (0, 32)),)),
    ("dress", "pink", DRESS, (((12, 44), (0, 46)),)),
    ("pair of shorts", "blue", SHORTS, (((25, 33), (0, 33)),)),
    ("jacket", "black", JACKET, (((0, 22), (0, 90)), ((9, 14), (4, 30), (0, 40)), ((20, 62), (9, 64)))),
    ("t-shirt", "grey", TEE, (((10, 16), (0, 34)),)),
    ("skirt", "black", SKIRT, ()),
    ("hat", "grey", HAT, (((23, 58), (0, 62)),)),
    ("long-sleeve top", "red", LONG, (((24, 60), (0, 60)), ((10, 14), (0, 30)))),
    ("pair of pants", "brown", PANTS, (((22, 18), (0, 18)),)),
)
COLOURS = {
    "red": (190, 30, 40), "blue": (50, 95, 190), "black": (35, 33, 38), "brown": (120, 75, 45), "pink": (230, 110, 160),
    "grey": (135, 140, 148),
}  # fmt: skip
GROUND = (214, 204, 192)


def mirrored(line: Line) -> list[Line]:
    """The line and its mirror image, in pixels of the enlarged canvas."""
    scale = SIDE * OVER / 100
    return [tuple(((50 + sign * x) * scale, y * scale) for x, y in line) for sign in (-1, 1)]


def draw(colour: str, outline: Line, lines: tuple[Line, ...]) -> np.ndarray:
    """One garment as uint8 RGB (128, 128, 3)."""
    canvas = np.full((SIDE * OVER, SIDE * OVER, 3), GROUND, np.uint8)
    left, right = (np.array(half) for half in mirrored(outline))
    cv2.fillPoly(canvas, [np.concatenate([left, right[::-1]]).round().astype(np.int32)], COLOURS[colour])
    ink = [0.45 * c if sum(COLOURS[colour]) > 150 else 150 for c in COLOURS[colour]]
    for line in lines:
        for half in mirrored(line):
            cv2.polylines(canvas, [np.array(half).round().astype(np.int32)], False, ink, 2 * OVER)
    return cv2.resize(canvas, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="core/assets/drawings", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (name, colour, outline, lines) in enumerate(GARMENTS):
        file = f"{number:02d}-{colour}-{name.replace(' ', '-')}.png"
        cv2.imwrite(str(out / file), draw(colour, outline, lines)[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
        rows.append({"file_name": file, "text": f"a photo of a {colour} {name}"})
    (out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
