"""What the moves of the search bring and cost: prints accuracy and time by how many there are at most.

    OMP_NUM_THREADS=1 python benchmarks/moves.py runs/NAME

For a run on multi-MNIST; scenes are made of test digits, T = 8. With 0 moves it is the greedy guide.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from seeds import markdown

from inference import MOVES
from multi_mnist import compose, load_digits
from patches import find
from training.checkpoint import build_air, read_checkpoint

MOST = 0, 5, 20, MOVES, 2 * MOVES
COUNTS = {"0 to 2 digits": (0, 2), "3": (3, 3), "4": (4, 4), "5": (5, 5)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What the moves of the search bring.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run on multi-MNIST")
    parser.add_argument("-n", type=int, default=500, help="scenes of each kind (default: %(default)s)")
    args = parser.parse_args(argv)
    checkpoint, path = read_checkpoint(args.run)
    air, digits, rows = build_air(checkpoint, path), load_digits(False, checkpoint["flags"]["data_dir"]), []
    for moves in MOST:
        row = [f"{moves}"]
        for few, many in COUNTS.values():
            rng = np.random.default_rng([1, few])
            x, counts, *_ = compose(*digits, args.n, rng, air.image_size, many, min_digits=few)
            started = time.perf_counter()
            right = np.mean([found.count for found in find(air, x, moves)] == counts)
            row.append(f"{right:.1%}, {(time.perf_counter() - started) / args.n * 1e3:.0f} ms")
        rows.append(row)
    print(markdown(["moves", *COUNTS], rows))


if __name__ == "__main__":
    main()
