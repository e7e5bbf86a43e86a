"""Something real: learn to count the coins in a photograph, from random crops of one half of it, without labels.

    pip install scikit-image
    python benchmarks/coins.py runs/coins

The photograph is scikit-image's `coins`: 24 coins in uneven light. main.py trains on crops of its right half;
predict.py then counts in the whole of it. Leaves `coins.png`, with the windows, in the folder of the run.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from PIL import Image
from skimage.data import coins

sys.path.insert(0, str(Path(__file__).parent.parent))

import viz
from air import AIR
from predict import predict
from training.checkpoint import load_air

FLAGS = "--crop 120 -t 5 -n 600 --eval-every 300".split()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    whole, half = args.out.with_name("coins.png"), args.out.with_name("coins_right_half.png")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coins()).save(whole)
    Image.fromarray(coins()[:, 192:]).save(half)
    (seen,) = predict(trained(half, args.out, [*FLAGS, *args.flags]), [whole])
    print(f"{seen['count']} coins; 24 are there. The photograph was scaled by {seen['scale']}")
    Image.fromarray(viz.draw_boxes(coins() / 255, seen["boxes"])).save(args.out / "coins.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learn to count what is in a picture.", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="the folder of the run")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of main.py")
    return parser.parse_args(argv)


def trained(images: Path, out: Path, flags: list[str]) -> AIR:
    """The AIR of the run in the folder `out`, which is made if it is not there."""
    if not (out / "checkpoint.pt").exists():
        main_py = Path(__file__).parents[1] / "main.py"
        subprocess.run([sys.executable, main_py, "--data", images, "--out", out, *flags], check=True)
    return load_air(out)


if __name__ == "__main__":
    main()
