"""Scenes that are not digits, to train on with `main.py --data`: filled shapes, in the manner of the sprites data sets.

    python benchmarks/sprites.py sprites.npz

Each scene, 64 pixels wide, has none to three shapes, each number equally often; each a square, a disc
or a triangle, 12 to 20 pixels wide, of a grey between 0.5 and 1, anywhere where its box does not
overlap another's. The file has `x`, uint8 `[n, 64, 64]`, and `counts` `[n]`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE, MOST, FINER = 64, 3, 4  # pixels; shapes in a scene; drawn so many times as large, for soft edges


def sprites(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    counts = rng.integers(0, MOST + 1, size=n)
    return np.stack([scene(count, rng) for count in counts]), counts


def scene(count: int, rng: np.random.Generator) -> np.ndarray:
    image = Image.new("L", (SIZE * FINER, SIZE * FINER))
    boxes = []
    while len(boxes) < count:
        width = rng.uniform(12, 20)
        x, y = rng.uniform(0, SIZE - width, size=2)
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
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def overlap(a: float, b: float, width_a: float, width_b: float) -> bool:
    return a < b + width_b and b < a + width_a


def main() -> None:
    parser = argparse.ArgumentParser(description="Make scenes of filled shapes.")
    parser.add_argument("file", type=Path)
    parser.add_argument("-n", type=int, default=30_000, help="scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.file.suffix != ".npz" or args.n < 1:
        parser.error("expected a file that ends in .npz, and at least one scene")
    if args.file.exists():
        sys.exit(f"{args.file} already exists")
    x, counts = sprites(args.n, np.random.default_rng(args.seed))
    np.savez_compressed(args.file, x=x, counts=counts)
    print(f"{args.file}: {len(x):,} scenes of {SIZE}x{SIZE} pixels with 0 to {MOST} shapes")


if __name__ == "__main__":
    main()
