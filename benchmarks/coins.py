"""Something real: learn to count the coins in a photograph, from crops of it without labels.

    pip install scikit-image
    python benchmarks/coins.py runs/coins

The photograph is scikit-image's `coins`, 24 coins in uneven light. Its right half gives the crops to learn from, the
left half a hundred with other coins, which were counted by hand (coins_counts.csv). A crop is a rectangle that cuts
no coin and has none to four; crops become canvases of 64 pixels by the rule of images.py, all at the same scale.
Trains, prints how often the hand count is met, and leaves `coins.png` in the folder of the run.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.data import coins

sys.path.insert(0, str(Path(__file__).parent.parent))

import viz
from evaluation import interval
from images import to_canvases
from inference import explain
from training.checkpoint import load_air

# Circles around the coins, marked by hand: x and y of the centre, and radius, in pixels; row by row.
COINS = np.array(
    [(44.5, 54, 23), (100.5, 56.5, 20), (155.5, 51, 24), (216, 51.5, 24.5), (276, 53, 21.5), (335, 43.8, 30.5)]
    + [(45.5, 124.5, 22), (103, 126, 20), (153.7, 127.5, 20.5), (206, 125, 21.5), (270.5, 119.8, 26.5)]
    + [(337, 125, 20.5), (44, 197.5, 20.5), (102.3, 196, 22.8), (154.7, 198.3, 20.3), (213, 193.5, 24.5)]
    + [(274, 194.8, 24), (347.5, 187.2, 32.8), (46.7, 260.5, 29), (114.2, 265.8, 22.3), (172.7, 261.8, 29)]
    + [(244.5, 264, 25.5), (301.3, 264, 26.3), (358.6, 268.5, 23.5)]
)
MOST, LONGEST, LEAST, GAP = 4, 184, 24, 2  # coins in a crop; pixels of its sides; pixels between its edge and a coin
CANVAS = 64  # pixels, for the longest crop
# The crops of the left half: number, left, top, width, height, and the count by hand.
COUNTS = np.loadtxt(Path(__file__).with_name("coins_counts.csv"), int, delimiter=",", skiprows=1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Learn to count the coins in a photograph.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="the folder of the run")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of main.py")
    args = parser.parse_args(argv)
    photograph = coins()
    if not (args.out / "checkpoint.pt").exists():
        data = args.out.with_suffix(".npz")
        data.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(data, x=np.stack(list(training_crops(photograph, 5000, np.random.default_rng(0)))))
        flags = ["--data", data, "-t", MOST + 1, "-n", 2000, "--out", args.out, *args.flags]
        subprocess.run([sys.executable, Path(__file__).parents[1] / "main.py", *map(str, flags)], check=True)
    _, *crops, counts = COUNTS.T
    x = np.stack([canvas(photograph[top:, left:][:height, :width]) for left, top, width, height in zip(*crops)])
    seen = explain(load_air(args.out), x)
    found, boxes = seen.counts.numpy(), seen.boxes.numpy()
    low, high = interval(np.mean(found == counts), len(counts))
    print(f"{np.mean(found == counts):.0%} of {len(counts)} crops counted right (95% interval {low:.0%} to {high:.0%})")
    for count in range(MOST + 1):
        print(f"  {count} coins: counted as {np.bincount(found[counts == count], minlength=9).tolist()}")
    wrong_first = np.argsort(found == counts, kind="stable")[:30]
    captions = [f"{counts[i]} → {found[i]}" for i in wrong_first]
    picture = viz.draw_scenes(x[wrong_first], [boxes[i, : found[i]] for i in wrong_first], captions)
    Image.fromarray(picture).save(args.out / "coins.png")


def training_crops(photograph: np.ndarray, n: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Canvases `[64, 64]` of crops of the right half, mirrored and turned, somewhere on the canvas.

    Each number of coins equally often, but none half as often; of each number all groups of coins equally often.
    """
    crops = np.concatenate([candidates(COINS[[i, j]], rng) for i in range(len(COINS)) for j in range(i, len(COINS))])
    corners = rng.integers((182, 0), (384, 303), (20_000, 2, 2))
    crops = np.concatenate([crops, np.sort(corners, 1).reshape(-1, 4)])
    possible, inside = coins_in(crops)
    groups = {}
    for crop, which in zip(crops[possible], inside[possible]):
        groups.setdefault(int(which.sum()), {}).setdefault(which.tobytes(), []).append(crop)
    for count in rng.choice(MOST + 1, n, p=np.array([1, 2, 2, 2, 2]) / 9):
        of_a_group = list(groups[count].values())[rng.integers(len(groups[count]))]
        left, top, right, bottom = of_a_group[rng.integers(len(of_a_group))]
        pixels = np.rot90(photograph[top:bottom, left:right], rng.integers(4))
        yield canvas(pixels[:, :: rng.choice([-1, 1])], rng)


def candidates(some: np.ndarray, rng: np.random.Generator, n: int = 2000) -> np.ndarray:
    """Random rectangles around some coins, left, top, right, bottom, `[n, 4]`."""
    x, y, r = some.T
    around = np.array([(x - r).min() - GAP, (y - r).min() - GAP, (x + r).max() + GAP + 1, (y + r).max() + GAP + 1])
    return (around + 70 * rng.random((n, 4)) ** 2 * (-1, -1, 1, 1)).astype(int)


def coins_in(crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rectangles `[n, 4]` of the right half can be crops, `[n]`, and which coins are in each, `[n, 24]`.

    The right half begins at x = 182 above y = 225, and at x = 210 below.
    """
    left, top, right, bottom = crops.T
    sides = np.stack([right - left, bottom - top])
    possible = (left >= np.where(bottom <= 225, 182, 210)) & (top >= 0) & (right <= 384) & (bottom <= 303)
    possible &= (sides.min(0) >= LEAST) & (sides.max(0) >= 72) & (sides.max(0) <= LONGEST)
    left, top, right, bottom = (edge[:, None] for edge in crops.T)
    x, y, r = COINS.T[0], COINS.T[1], COINS.T[2] + GAP
    inside = (left <= x - r) & (x + r <= right) & (top <= y - r) & (y + r <= bottom)
    outside = np.hypot((left - x).clip(0) + (x - right).clip(0), (top - y).clip(0) + (y - bottom).clip(0)) >= r
    return possible & (inside | outside).all(1) & (inside.sum(1) <= MOST), inside


def canvas(crop: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """A crop on a canvas, all crops at the same scale; in its middle, or at a random place."""
    size = round(max(crop.shape) * CANVAS / LONGEST)
    scaled, room = to_canvases([np.ascontiguousarray(crop)[None]], size).x[0], CANVAS - size
    top, left = (room // 2, room // 2) if rng is None else rng.integers(0, room + 1, 2)
    return np.pad(scaled, ((top, room - top), (left, room - left)))


if __name__ == "__main__":
    main()
