"""Does predict.py notice images that are unlike what a run was trained on? Prints which share it warns of, by kind.

    python benchmarks/unlike.py runs/NAME

For a run on multi-MNIST. Scenes are made of test digits; photographs and pages of text are scikit-image's, cut at
random places and sizes. The bounds are the run's own, measured on its validation scenes (`evaluation.Usual`).
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))

from air import AIR
from evaluation import Usual
from multi_mnist import DIGIT_SIZE, compose, load_digits
from predict import predict
from training.checkpoint import build_air, read_checkpoint, read_usual
from training.options import UsageError, one_line_errors

PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "moon", "rocket", "hubble_deep_field", "grass", "brick")
PAGES = ("page", "text")
WORDS = "the model looks at a picture and finds out how many objects are in it and where they are".split()


def main() -> None:
    parser = argparse.ArgumentParser(description="Which images predict.py warns of.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run on multi-MNIST")
    parser.add_argument("-n", type=int, default=300, help="images of each kind (default: %(default)s)")
    args = parser.parse_args()
    with one_line_errors("unlike.py"):
        checkpoint, path = read_checkpoint(args.run)
        air, usual = build_air(checkpoint, path), read_usual(checkpoint, path)
        if usual is None:
            raise UsageError(f"{path} was saved before any evaluation")
        digits = load_digits(False, checkpoint["flags"]["data_dir"])
        for name, x, num_steps in kinds(*digits, air, args.n, np.random.default_rng(0)):
            print(f"{name:<45}{warned_of(air, usual, x, num_steps):7.1%}", flush=True)


def warned_of(air: AIR, usual: Usual, x: np.ndarray, num_steps: int) -> float:
    """The share of the images `[n, h, w]` that predict.py warns of."""
    with TemporaryDirectory() as folder:
        np.savez(Path(folder, "images.npz"), x=x)
        return float(
            np.mean(
                [
                    "warning" in result
                    for result in predict(air, [Path(folder, "images.npz")], usual, num_steps=num_steps)
                ]
            )
        )


def kinds(digits, classes, air: AIR, n: int, rng: np.random.Generator):
    """What they are called, images `[n, h, w]`, and T."""
    size = air.image_size

    def scenes(count=n, **options):
        return compose(digits, classes, count, np.random.default_rng(1), size, **options).x

    def wide(pixels):
        shrink = (DIGIT_SIZE / (pixels + 0.5), 0.0)
        return scenes(shrink=shrink, max_digits=1, min_digits=1)

    yield "0 to 2 digits, as in training (false alarms)", scenes(10 * n), 8
    for many in (3, 4, 5):
        yield f"{many} digits, T = 8 (false alarms)", scenes(max_digits=many, min_digits=many), 8
    for many in (4, 5):
        yield f"{many} digits, T = 3", scenes(max_digits=many, min_digits=many), 3
    for times in (1.4, 1.8, 2):
        yield f"digits {times:g} times as large ({21 * times:.0f} pixels)", wide(round(21 * times)), 8
    yield "digits half as large (10 pixels)", wide(10), 8
    pages, at = 255 - scenes().astype(float), np.arange(size)[None, None]
    yield "a sharp shadow over half a page", pages * np.where(at < size / 2, 0.6, 1), 8
    yield "a sharp shadow over a quarter of it", pages * np.where((at < size / 2) & (at.mT < size / 2), 0.6, 1), 8
    yield "photographs", cut(PHOTOGRAPHS, n, rng), 8
    yield "pages of text, dark on light", cut(PAGES, n, rng), 8
    yield "words, light on black", np.stack([some_words(rng) for _ in range(n)]), 8
    yield "noise, uniform", rng.random((n, size, size)), 8
    yield "noise, a tenth of the pixels white", rng.random((n, size, size)) < 0.1, 8


def cut(names: tuple[str, ...], n: int, rng: np.random.Generator) -> np.ndarray:
    """Squares out of images of scikit-image's, 50 pixels to the whole height, made grey and 50 pixels wide."""
    images, squares = [Image.fromarray(getattr(skimage.data, name)()).convert("L") for name in names], []
    for _ in range(n):
        image = images[rng.integers(len(images))]
        side = rng.integers(50, min(image.size) + 1)
        left, top = (rng.integers(0, whole - side + 1) for whole in image.size)
        squares.append(np.asarray(image.crop((left, top, left + side, top + side)).resize((50, 50))))
    return np.stack(squares)


def some_words(rng: np.random.Generator) -> np.ndarray:
    image, height = Image.new("L", (200, 200)), int(rng.integers(20, 50))
    for y in range(0, 200, height + 6):
        line = " ".join(rng.choice(WORDS, 6))
        ImageDraw.Draw(image).text((4, y), line, fill=255, font=ImageFont.load_default(height))
    return np.asarray(image.resize((50, 50)))


if __name__ == "__main__":
    main()
