"""What the moves of the search bring and cost: accuracy and time by how many there are at most, printed and drawn.

    python benchmarks/moves.py runs/NAME moves.png

For a run on multi-MNIST; scenes are made of test digits, T = 8, one thread. With 0 moves it is the greedy guide.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import viz
from multi_mnist import compose, load_digits
from patches import find
from training.checkpoint import build_air, read_checkpoint

MOST = 0, 5, 20, 60, 100, 200
COUNTS = {"0 to 2 digits": (0, 2), "3 digits": (3, 3), "4 digits": (4, 4), "5 digits": (5, 5)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What the moves of the search bring.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run on multi-MNIST")
    parser.add_argument("picture", type=Path, metavar="FILE", help="where to draw it")
    parser.add_argument("-n", type=int, default=500, help="scenes of each kind (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    checkpoint, path = read_checkpoint(args.run)
    air, digits = build_air(checkpoint, path), load_digits(False, checkpoint["flags"]["data_dir"])
    measured = {kind: [] for kind in COUNTS}
    for moves, (kind, (few, many)) in itertools.product(MOST, COUNTS.items()):
        x, counts, *_ = compose(*digits, args.n, np.random.default_rng([1, few]), air.image_size, many, min_digits=few)
        started = time.process_time()
        right = np.mean([found.count for found in find(air, x, moves)] == counts)
        measured[kind].append(((time.process_time() - started) / args.n * 1e3, 100 * right))
        print(f"{moves} moves, {kind}: {right:.1%} right, {measured[kind][-1][0]:.0f} ms", flush=True)
    Image.fromarray(draw(measured)).save(args.picture)


def draw(measured: dict[str, list[tuple[float, float]]]) -> np.ndarray:
    """A line for each kind of scenes, a point for each of MOST."""
    figure = Figure(figsize=(6, 3.4), dpi=viz.DPI, layout="tight")
    axis = figure.subplots()
    for kind, points in measured.items():
        axis.semilogx(*zip(*points), ".-")
        axis.annotate(kind, points[-1], (6, -3), textcoords="offset points", fontsize=8)
    at_most = f"{', '.join(map(str, MOST[:-1]))} and {MOST[-1]} moves at most"
    axis.set(xlabel=f"ms an image, one core; points: {at_most}", ylabel="counted right, %")
    axis.margins(x=0.2)
    axis.grid(alpha=0.3)
    return viz.render(figure)


if __name__ == "__main__":
    main()
