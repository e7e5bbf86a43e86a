"""Digits by the dozen, and of other sizes: what a run counts that learned from two on canvases of 50 pixels.

    python benchmarks/many.py runs/NAME                # how often it is right
    python benchmarks/many.py runs/NAME --time FILE    # how long it takes, as a table and a picture

Scenes of MNIST's test digits, put down one after another, each anew until no pixel exceeds white. Digits of other sizes
are looked at in two ways: each image at its own scale, and all at the same (`predict.py --object-size file`).
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import viz
from evaluation import find_at_scale
from images import piece_lengths, to_canvas
from multi_mnist import compose, load_digits, paint
from patches import find
from predict import UNSURE
from training.checkpoint import build_air, read_checkpoint, read_reference

SCENES = (10, 128), (15, 128), (30, 256), (100, 512)  # digits, and pixels of the canvas
EACH = 50  # scenes of each kind; five times as many of each size
TIMED = {64: (1,), 128: (1, 10), 256: (1, 10), 512: (1, 10, 100), 1024: (1, 10, 100, 300), 2048: (1, 100, 1000)}
SIZES = 0.5, 0.7, 1.0, 1.4, 1.8  # of the usual


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--time", type=Path, metavar="FILE", help="measure time instead, and draw it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    checkpoint, path = read_checkpoint(args.run)
    air, digits = build_air(checkpoint, path), load_digits(False, checkpoint["flags"]["data_dir"])
    if args.time:
        Image.fromarray(draw_time(measure_time(air, digits[0]))).save(args.time)
        return
    for count, size in SCENES:
        x = [many(digits[0], count, size, np.random.default_rng([i, size])) for i in range(EACH)]
        started = time.process_time()
        off = np.array([found.count for found in find(air, x)]) - count
        seconds = (time.process_time() - started) / EACH
        text = f"{np.mean(off == 0):.0%} right, mean error {np.abs(off).mean():.2f}, {seconds:.2f} s of CPU each"
        print(f"{count} digits, {size}x{size}: {text}", flush=True)
    reference = read_reference(checkpoint, path)
    temperature = (reference and reference.temperature) or 1.0  # None, if the run is not finished
    for size in SIZES:
        shrink = (1.3 / size, 0.1 / size)
        scenes = compose(*digits, 5 * EACH, np.random.default_rng(1), canvas_size=64, shrink=shrink)
        canvases = [to_canvas(image) for image in scenes.x]
        seen = find_at_scale(air, canvases, [None] * len(canvases))
        right = np.array([found.count for found, *_ in seen]) == scenes.counts
        probs = np.array([found.count_probs(temperature)[found.count] for found, *_ in seen])
        sure = (probs >= UNSURE) & ~np.array([in_doubt for *_, in_doubt in seen])
        length = np.median(np.concatenate([piece_lengths(canvas.x) for canvas in canvases]))
        together = [found.count for found, *_ in find_at_scale(air, canvases, [length] * len(canvases))]
        text = f"{right.mean():.1%} right, {(right | ~sure).mean():.1%} right or flagged, {sure.mean():.0%} not flagged"
        print(f"size {size}: {text}; one scale for all: {np.mean(together == scenes.counts):.1%} right", flush=True)


def many(digits: np.ndarray, count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A scene of `count` digits, uint8 `[size, size]`."""
    x = np.zeros((size, size), int)
    while count:
        side = int(28 / rng.normal(1.3, 0.1))
        left, top = rng.integers(0, size - side + 1, 2)
        one = paint([digits[rng.integers(len(digits))]], [side], [left], [top], size)[0]
        if (x + one).max() <= 255:
            x, count = x + one, count - 1
    return x.astype(np.uint8)


def measure_time(air, digits: np.ndarray) -> dict[int, list[tuple[int, float]]]:
    """Numbers of objects and seconds of CPU for one image alone, by its size; printed as well."""
    find(air, [many(digits, 1, 64, np.random.default_rng(0))])  # The first call takes longer.
    measured = {size: [] for size in TIMED}
    for size, count in ((size, count) for size, counts in TIMED.items() for count in counts):
        x = many(digits, count, size, np.random.default_rng(0))
        started = time.process_time()
        found = find(air, [x])[0].count
        measured[size].append((count, time.process_time() - started))
        print(f"{size}x{size}, {count} objects: {found} found in {measured[size][-1][1]:.1f} s", flush=True)
    return measured


def draw_time(measured: dict[int, list[tuple[int, float]]]) -> np.ndarray:
    """A line for each size."""
    figure = Figure(figsize=(6, 3.4), dpi=viz.DPI, layout="tight")
    axis = figure.subplots()
    for k, (size, points) in enumerate(measured.items()):
        axis.loglog(*zip(*points), ".-")
        axis.annotate(f"{size}x{size}", points[-1], (6, 1 - 8 * (k % 2)), textcoords="offset points", fontsize=8)
    axis.set(xlabel="objects", ylabel="seconds of CPU, one image alone", xlim=(0.8, 5000))
    axis.grid(alpha=0.3)
    return viz.render(figure)


if __name__ == "__main__":
    main()
