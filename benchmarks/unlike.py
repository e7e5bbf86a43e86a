"""Does predict.py notice images that are unlike what a run was trained on? Prints which share it warns of, by kind.

    pip install scikit-image
    python benchmarks/unlike.py runs/NAME

For a finished run on multi-MNIST. Scenes are made of test digits; photographs and pages of text are scikit-image's, cut
at random places and sizes. The bounds are the run's own, from its validation scenes (`evaluation.ReferenceStats`).
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))

from multi_mnist import DIGIT_SIZE, compose, load_digits
from predict import predict
from training.checkpoint import build_air, read_checkpoint, read_reference

PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "moon", "rocket", "hubble_deep_field", "grass", "brick")
WORDS = "the model looks at a picture and finds out how many objects are in it and where they are".split()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Which images predict.py warns of.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run on multi-MNIST")
    parser.add_argument("-n", type=int, default=300, help="images of each kind (default: %(default)s)")
    args = parser.parse_args(argv)
    checkpoint, path = read_checkpoint(args.run)
    air, reference = build_air(checkpoint, path), read_reference(checkpoint, path)
    digits = load_digits(False, checkpoint["flags"]["data_dir"])
    with TemporaryDirectory() as folder:
        for name, x in kinds(*digits, air.image_size, args.n, np.random.default_rng(0)):
            np.savez(file := Path(folder, "images.npz"), x=x)
            results = [*predict(air, [file], reference)]
            print(f"{name:<45}{sum('warning' in result for result in results) / len(x):7.1%}", flush=True)


def kinds(digits, classes, size: int, n: int, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """What they are called, and images `[n, h, w]`."""

    def scenes(fewest=0, most=2, width=None, n=n):
        shrink = (DIGIT_SIZE / (width + 0.5), 0.0) if width else (1.3, 0.1)
        return compose(digits, classes, n, np.random.default_rng(1), size, most, shrink, fewest).x

    yield "0 to 2 digits, as in training (false alarms)", scenes(n=10 * n)
    for many in (3, 4, 5):
        yield f"{many} digits", scenes(many, many)
    for width in (10, 29, 38, 42):
        yield f"digits {width} pixels wide, usually 21", scenes(1, 1, width)
    pages, left = 255 - scenes().astype(float), np.arange(size) < size / 2
    yield "a sharp shadow over half a page", pages * np.where(left, 0.6, 1)
    yield "a sharp shadow over a quarter of it", pages * np.where(left & left[:, None], 0.6, 1)
    yield "photographs", cut(PHOTOGRAPHS, n, rng)
    yield "pages of text, dark on light", cut(("page", "text"), n, rng)
    yield "words, light on black", np.stack([some_words(rng) for _ in range(n)])
    yield "noise, uniform", rng.random((n, size, size))
    yield "noise, a tenth of the pixels white", rng.random((n, size, size)) < 0.1


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
