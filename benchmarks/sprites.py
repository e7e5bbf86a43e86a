"""Scenes that are not digits, to train on with `main.py --data`: filled shapes, in the manner of the sprites data sets.

    python benchmarks/sprites.py sprites.npz

Each scene, 64 pixels wide (`--canvas`), has none to three shapes (`--shapes`), each number equally often; each a
square, a disc or a triangle, 12 to 20 pixels wide (`--width`), of a grey between 0.5 and 1, anywhere where its box does
not overlap another's. The file has `x`, uint8 `[n, 64, 64]`, and `counts` `[n]`.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FINER = 4  # Drawn so many times as large, for soft edges.


def scene(count: int, rng: np.random.Generator, size: int = 64, widths: tuple[int, int] = (12, 20)) -> np.ndarray:
    for attempt in range(10_000):
        if attempt % 1000 == 0:  # If these are not the first, those left no room.
            image, boxes = Image.new("L", (size * FINER, size * FINER)), []
        if len(boxes) == count:
            return np.asarray(image.resize((size, size), Image.Resampling.BOX))
        width = rng.uniform(*widths)
        corner = rng.uniform(0, size - width, size=2)
        if any(np.abs(corner + width / 2 - other - w / 2).max() < (width + w) / 2 for other, w in boxes):
            continue
        boxes.append((corner, width))
        (left, top), (right, bottom) = FINER * corner, FINER * (corner + width)
        fill, draw, box = int(rng.integers(128, 256)), ImageDraw.Draw(image), (left, top, right, bottom)
        triangle = [(left, bottom), (right, bottom), ((left + right) / 2, top)]
        shapes = (draw.rectangle, box), (draw.ellipse, box), (draw.polygon, triangle)
        shape, where = shapes[rng.integers(3)]
        shape(where, fill=fill)
    raise SystemExit(f"{count} shapes do not fit on a canvas of {size} pixels")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make scenes of filled shapes.", allow_abbrev=False)
    pair = {"type": int, "nargs": 2, "metavar": ("LEAST", "MOST")}
    parser.add_argument("file", type=Path, metavar="FILE", help="an .npz, for main.py --data FILE")
    parser.add_argument("-n", type=int, default=30_000, help="scenes (default: %(default)s)")
    parser.add_argument("--shapes", **pair, default=(0, 3), help="in a scene (default: 0 3)")
    parser.add_argument("--canvas", type=int, default=64, metavar="PIXELS", help="a side (default: %(default)s)")
    parser.add_argument("--width", **pair, default=(12, 20), help="in pixels (default: 12 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.file.exists():
        parser.error(f"{args.file} already exists")
    rng, (least, most) = np.random.default_rng(args.seed), args.shapes
    counts = rng.integers(least, most + 1, size=args.n)
    x = np.stack([scene(count, rng, args.canvas, args.width) for count in counts])
    np.savez_compressed(args.file, x=x, counts=counts)
    print(f"{args.file}: {len(x):,} scenes of {args.canvas}x{args.canvas} pixels with {least} to {most} shapes")


if __name__ == "__main__":
    main()
