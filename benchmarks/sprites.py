"""Scenes that are not digits, to train on with `main.py --data`: filled shapes, in the manner of the sprites data sets.

    python benchmarks/sprites.py sprites.npz

Each scene, 64 pixels wide (`--canvas`), has none to three shapes (`--shapes`), each number equally often; each a
square, a disc or a triangle, 12 to 20 pixels wide (`--width`), of a grey between 0.5 and 1, anywhere where its box does
not overlap another's. The file has `x`, uint8 `[n, 64, 64]`, and `counts` `[n]`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FINER = 4  # Drawn so many times as large, for soft edges.


def sprites(n: int, rng: np.random.Generator, size=64, shapes=(0, 3), widths=(12, 20)) -> tuple[np.ndarray, np.ndarray]:
    counts = rng.integers(shapes[0], shapes[1] + 1, size=n)
    return np.stack([scene(count, rng, size, widths) for count in counts]), counts


def scene(count: int, rng: np.random.Generator, size: int = 64, widths: tuple[int, int] = (12, 20)) -> np.ndarray:
    image = Image.new("L", (size * FINER, size * FINER))
    boxes = []
    for attempt in range(10_000):
        if len(boxes) == count:
            break
        if attempt % 1000 == 999:  # The first ones left no room.
            image, boxes = Image.new("L", image.size), []
        width = rng.uniform(*widths)
        x, y = rng.uniform(0, size - width, size=2)
        if any(overlap(x, u, width, w) and overlap(y, v, width, w) for u, v, w in boxes):
            continue
        boxes.append((x, y, width))
        left, top, right, bottom = FINER * np.array([x, y, x + width, y + width])
        grey, draw = int(rng.integers(128, 256)), ImageDraw.Draw(image)
        match rng.integers(3):
            case 0:
                draw.rectangle((left, top, right, bottom), fill=grey)
            case 1:
                draw.ellipse((left, top, right, bottom), fill=grey)
            case 2:
                draw.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=grey)
    else:
        raise ValueError(f"{count} shapes do not fit on a canvas of {size} pixels")
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def overlap(a: float, b: float, width_a: float, width_b: float) -> bool:
    return a < b + width_b and b < a + width_a


def main() -> None:
    parser = argparse.ArgumentParser(description="Make scenes of filled shapes.")
    parser.add_argument("file", type=Path, metavar="FILE", help="an .npz, for main.py --data FILE")
    parser.add_argument("-n", type=int, default=30_000, help="scenes (default: %(default)s)")
    parser.add_argument(
        "--shapes", type=int, nargs=2, default=(0, 3), metavar=("LEAST", "MOST"), help="in a scene (default: 0 3)"
    )
    parser.add_argument("--canvas", type=int, default=64, metavar="PIXELS", help="a side (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, nargs=2, default=(12, 20), metavar=("LEAST", "MOST"), help="in pixels (default: 12 20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    args = parser.parse_args()
    least, most = args.shapes
    if args.file.suffix != ".npz" or args.n < 1 or not 0 <= least <= most:
        parser.error("expected a file that ends in .npz, at least one scene, and LEAST at most MOST")
    if not 1 <= args.width[0] <= args.width[1] <= args.canvas:
        parser.error("expected widths of at least 1 pixel, LEAST at most MOST, at most the canvas's")
    if args.file.exists():
        sys.exit(f"{args.file} already exists")
    try:
        x, counts = sprites(args.n, np.random.default_rng(args.seed), args.canvas, args.shapes, args.width)
    except ValueError as error:
        sys.exit(f"{error}")
    np.savez_compressed(args.file, x=x, counts=counts)
    print(f"{args.file}: {len(x):,} scenes of {args.canvas}x{args.canvas} pixels with {least} to {most} shapes")


if __name__ == "__main__":
    main()
