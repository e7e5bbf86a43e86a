"""Images of one's own, as the model takes them: light objects on black, on square canvases.

Training, evaluation and prediction read them with `read_file` and bring them to the model by one rule, `to_canvases`:

1. Colours become grey; the range of grey is the smallest of 1, 255, 1,023, 4,095, 16,383 and 65,535 that the values of
   an array or a page fit in (floats may go a little beyond 1).
2. An image is scaled so that its longer side is the canvas's.
3. The median grey of its border, or if that is uneven a smooth surface fitted to it, is taken for the background.
4. Objects are what differs from the background. If more of that is darker than lighter, in all images together, they
   are inverted.
5. The background becomes black, and the brightest pixel of each image white. An image of one grey is empty. One whose
   contrast is too low to be told from noise is taken for empty.

What speaks against counting what is in an image is said: its contrast, a background that no surface fits, or ink of
both polarities.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, ImageSequence
from scipy import ndimage

from multi_mnist import LARGEST_FILE, DataError, Scenes, one_line, open_arrays

RANGES = (1, 255, 1023, 4095, 16383, 65535)
LARGEST_CANVAS = 128  # pixels a side, to train on: larger images are made smaller
# Greys, of a range from 0 to 1, less than which is: no difference at all, no contrast, an even border.
SAME, FAINT, EVEN = 0.002, 0.08, 0.03
MIXED = 0.02  # the share of ink, in squared greys, of the other polarity that is too much
NOISE = 6  # a contrast of less than so many standard deviations of the noise is none
INK = 0.5  # the least brightness of what `largest_objects` measures


LOW = "its contrast is too low to be told from noise"
CONTRARY = "its ink is of the other polarity than the file's (--invert and --no-invert decide)"
UNEVEN = "its background is uneven, and no smooth surface fits it"
BOTH = "it has ink darker and lighter than its background, of which one kind was left out"
EMPTY = (LOW, CONTRARY)  # Such an image is taken for empty.


class Canvases(NamedTuple):
    """Images as the model takes them, and what was done to them."""

    x: np.ndarray  # uint8 [n, size, size]
    places: np.ndarray  # [n, 4]: where the image's corner lies, (x, y) in canvas pixels, and its scale along x and y
    doubts: list[str | None]  # [n], what speaks against counting what is in an image; `EMPTY` if it was taken for empty
    remarks: list[str]  # what was done that a user may want to know


def files_in(path: Path) -> list[Path]:
    """The file, or the files of a folder in order, without hidden ones and subfolders. DataError if there are none."""
    if not path.exists():
        raise DataError(f"no such file or folder: {path}")
    if not path.is_dir():
        return [path]
    files = [file for file in path.iterdir() if file.is_file() or (file.is_symlink() and not file.is_dir())]
    files = sorted(file for file in files if file.name[0] != ".")
    if not files:
        raise DataError(f"{path} has no files (subfolders are not looked into)")
    return files


def read_file(path: Path) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The images in a file as they are, blocks `[n, h, w]` of numbers of any type, and true counts `[images]` or None.

    An `.npz` has an array `x` `[n, h, w]` and perhaps `counts` `[n]`; of any other image file, each frame is a block.
    Raises DataError, with one line that says what is wrong.
    """
    if path.suffix.lower() == ".npz":
        x, counts = read_arrays(path)
        return [x], counts
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            # The second image in a phone's JPEG is no other picture.
            frames = [image] if image.format == "MPO" else ImageSequence.Iterator(image)
            blocks = [to_grey(ImageOps.exif_transpose(frame))[None] for frame in frames]
    except Exception as error:  # Whatever goes wrong in reading, the file is at fault.
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    for x in blocks:
        check_images(x, f" in {path}")
    return blocks, None


def check_images(x: np.ndarray, where: str = "") -> None:
    """Raises DataError, with one line that says what is wrong, unless these are images `[n, h, w]`."""
    if x.ndim != 3 or not x.size:
        raise DataError(f"images{where} have shape {list(x.shape)}, expected [n, h, w], none of them 0")
    if x.dtype.kind not in "biuf":
        raise DataError(f"images{where} are {x.dtype}, expected numbers")
    if x.dtype != bool and not (x.min() >= 0 and float(x.max()) <= RANGES[-1]):  # false for NaN as well
        raise DataError(f"images{where} have values below 0 or above {RANGES[-1]:,}, or NaN")


def read_arrays(path) -> tuple[np.ndarray, np.ndarray | None]:
    """`x` and `counts` of an `.npz` file. Raises DataError unless they are images and numbers of objects."""
    try:
        with open_arrays(path) as file:
            names = file.files
            x = file["x"] if "x" in names else None
            counts = file["counts"] if "counts" in names else None
            if not all(isinstance(array, np.ndarray | None) for array in (x, counts)):
                raise ValueError("what is in it is not an array")
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except Exception as error:  # Whatever else goes wrong in reading, the file is at fault.
        raise DataError(f"{path} is not a readable .npz file of plain arrays: {one_line(error)}") from None
    if x is None:
        raise DataError(f"{path} has no array 'x', only {', '.join(map(repr, names[:5])) or 'nothing'}")
    check_images(x, f" in {path}")
    if counts is not None:
        if counts.shape != (len(x),) or counts.dtype.kind not in "iu" or counts.min() < 0 or counts.max() > 1000:
            raise DataError(f"counts in {path} must be {len(x)} whole numbers from 0 to 1,000, one per image")
        counts = counts.astype(np.int64)
    return x, counts


def to_grey(image: Image.Image) -> np.ndarray:
    """An image of any mode as greys `[h, w]`. What is transparent is black behind light ink, and white behind dark."""
    if image.mode.startswith("I") or image.mode == "F":
        return np.asarray(image)
    if image.has_transparency_data:
        grey, alpha = (np.asarray(band, np.float32) for band in image.convert("LA").split())
        behind = 255.0 if (alpha * grey).sum() < 127.5 * alpha.sum() else 0.0
        return (behind + (grey - behind) * (alpha / 255)).round().astype(np.uint8)
    return np.asarray(image.convert("L"))


def load_canvases(path: Path, size: int | None = None, invert: bool | None = None) -> tuple[Scenes, list[str]]:
    """The images in a file, or in all files of a folder together, on canvases; and remarks about them, a line each.

    size: of the canvas; by default the longest side of all images, but at most `LARGEST_CANVAS`.
    Files of a folder that cannot be read are left out, with a remark.
    Raises DataError if nothing can be read.
    """
    files, remarks = files_in(path), []
    scaled, places, flat, counts = [], [], [], []
    if size is None:
        size = min(LARGEST_CANVAS, max(longest_side(file) for file in files))
    for file in files:
        try:
            blocks, some_counts = read_file(file)
        except DataError as error:
            if len(files) == 1:
                raise
            remarks.append(f"left out: {one_line(error)}")
            continue
        for part, place, is_flat in fit(blocks, size):
            scaled.append(part)
            places.append(place)
            flat.append(is_flat)
        counts.append(some_counts)
    if not scaled:
        raise DataError(f"{path} has no file that can be read; the first: {remarks[0].removeprefix('left out: ')}")
    counts = np.concatenate(counts) if all(part is not None for part in counts) else None
    canvases = finish(scaled, places, flat, size, invert)
    return Scenes(canvases.x, counts), [*remarks, *(f"{path}: {remark}" for remark in canvases.remarks)]


def longest_side(path: Path) -> int:
    """Of the images in a file, in pixels; 1 if it cannot be read."""
    try:
        if path.suffix.lower() == ".npz":
            return max(read_arrays(path)[0].shape[1:])
        with Image.open(path) as image:
            return max(image.size)
    except Exception:  # `read_file` says why.
        return 1


# ------------------------------------------------------------------------------------------ the rule


def to_canvases(blocks: list[np.ndarray], size: int, invert: bool | None = None) -> Canvases:
    """The images of a file, blocks `[n, h, w]`, as the model takes them, by the rule in the module's docstring.

    invert: whether they are dark on light; None finds it out.
    """
    return finish(*zip(*fit(blocks, size)), size, invert)


def fit(
    blocks: list[np.ndarray], size: int
) -> Iterator[tuple[np.ndarray, tuple[float, float, float, float], np.ndarray]]:
    """Of each block the images with greys from 0 to 1, scaled to the canvas, float16 `[n, h, w]`; their place; and
    which are of one grey, `[n]`."""
    for block in blocks:
        n, *sides = block.shape
        h, w = (max(1, round(side * size / max(sides))) for side in sides)
        if n * size**2 > LARGEST_FILE:
            raise DataError(f"these are too many images: {n:,} on canvases of {size:,} pixels a side")
        white, scaled, flat = white_of(block), np.empty((n, h, w), np.float16), np.empty(n, bool)
        for i, image in enumerate(block):
            image = image.astype(np.float32) / np.float32(white)
            # Of floats, any difference may mean something.
            flat[i] = np.ptp(image) <= (0 if block.dtype.kind == "f" else SAME)
            if (h, w) != image.shape:
                image = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)).clip(0, 1)
            scaled[i] = image
        yield scaled, ((size - w) // 2, (size - h) // 2, w / sides[1], h / sides[0]), flat


def white_of(block: np.ndarray) -> float:
    """The end of the range of grey that an array's values fit in."""
    largest = float(block.max())
    if block.dtype.kind == "f" and 1 < largest < 2:
        return largest
    return next(white for white in RANGES if largest <= white)


def finish(scaled, places, flat, size: int, invert: bool | None) -> Canvases:
    """Steps 3 to 5 of the rule, for blocks of images that fit the canvas."""
    uneven, tops, doubts, canvases = 0, [], [], []
    total, found = sum(map(len, scaled)), invert
    if invert is None:  # A thousand images will do.
        some = [part[:: max(1, total // 1000)] for part in scaled][:: max(1, len(scaled) // 1000)]
        found = sum(map(lightness, some)) < 0
    for whole, (left, top, _, _), all_flat in zip(scaled, places, flat):
        for start in range(0, len(whole), 1000):
            part, same = whole[start : start + 1000], all_flat[start : start + 1000]
            difference, is_uneven, is_rough = without_background(part)
            difference = -difference if found else difference
            least = least_contrast(part)
            brightest, ink, contrary = (
                difference.max((1, 2)),
                *(energy(part, least) for part in (difference, -difference)),
            )
            # Where a surface was taken off, what is left of one without any ink.
            same = same | (is_uneven & (np.abs(difference).max((1, 2)) < 5 * SAME))
            low = ~same & (brightest < least)
            brightest = np.where(same | low, np.inf, brightest)
            x = np.zeros((len(part), size, size), np.uint8)
            _, h, w = part.shape
            x[:, top : top + h, left : left + w] = (255 * difference.clip(min=0) / brightest[:, None, None]).round()
            canvases.append(x)
            uneven += is_uneven.sum()
            tops.append(brightest[~(same | low)])
            cases = [same, low & (contrary > 0), low, is_rough, contrary > MIXED * (ink + contrary)]
            reasons = np.array([None, CONTRARY, LOW, UNEVEN, BOTH, None], object)
            doubts.extend(reasons[np.argmax([*cases, np.ones_like(same)], 0)])
    tops = np.concatenate(tops)
    return Canvases(
        np.concatenate(canvases),
        np.repeat(np.array(places), [len(part) for part in scaled], 0),
        doubts,
        remarks(invert is None and found, uneven, tops, doubts),
    )


def remarks(inverted: bool, uneven: int, tops: np.ndarray, doubts: list[str | None]) -> list[str]:
    """What was done to images, in words, a line each."""

    def some(n: int) -> str:
        return "" if len(doubts) == 1 else f"{n:,} of {len(doubts):,} images: "

    lines = []
    if inverted:
        lines.append("dark objects on a light background: inverted (--no-invert leaves them as they are)")
    if uneven:
        lines.append(f"{some(uneven)}uneven background: a smooth surface was taken off")
    if len(tops) and np.median(tops) < 0.5:
        lines.append(f"low contrast, {np.median(tops):.0%} of the range: the brightest pixel was made white")
    for doubt in (LOW, CONTRARY, UNEVEN, BOTH):
        if n := doubts.count(doubt):
            lines.append(f"{some(n)}{doubt}{': taken for empty' if doubt in EMPTY else ''}")
    return lines


def energy(difference: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Of images `[n, h, w]` the sum of squares of what is lighter than the background by at least `least` `[n]`."""
    return (difference**2 * (difference >= least[:, None, None])).sum((1, 2))


def least_contrast(images: np.ndarray) -> np.ndarray:
    """How much pixels of images `[n, h, w]` must differ from the background to be told from noise, `[n]`."""
    return np.maximum(FAINT, NOISE * noise(images))


def noise(images: np.ndarray) -> np.ndarray:
    """The standard deviation `[n]` of Normal noise in images `[n, h, w]`, by the differences of neighbouring pixels."""
    changes = np.abs(np.diff(images.astype(np.float32), axis=2))
    return np.median(changes, (1, 2)) / 0.954 if changes.size else np.zeros(len(images))


def lightness(images: np.ndarray) -> float:
    """Whether more of some images is lighter than the background, or darker (negative)."""
    difference, least = without_background(images)[0], least_contrast(images)
    return float((energy(difference, least) - energy(-difference, least)).sum())


def without_background(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What images `[n, h, w]` differ by from their background; whether that was an uneven one, `[n]`; and whether it is
    uneven in a way that no smooth surface fits, `[n]`."""
    images = images.astype(np.float32)
    _, h, w = images.shape
    y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
    edge = max(1, round(0.04 * max(h, w)))
    border = np.ones((h, w), bool)
    border[edge:-edge, edge:-edge] = False
    values = images[:, border]
    level = np.median(values, 1)
    spread = np.quantile(np.abs(values - level[:, None]), 0.75, axis=1)
    even = np.maximum(EVEN, 2 * noise(images))
    difference, uneven, rough = images - level[:, None, None], spread > even, np.zeros(len(images), bool)
    if uneven.any():
        # A quadratic surface, with the least absolute deviations: objects that touch the border count little.
        terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1)
        at, targets = terms[border], values[uneven].astype(float)
        weights = np.ones_like(targets)
        for _ in range(20):
            weighted = at * weights[..., None]
            matrix = weighted.mT @ at + 1e-6 * np.eye(6)
            surface = np.linalg.solve(matrix, weighted.mT @ targets[..., None])
            errors = np.abs(targets - (at @ surface)[..., 0])
            weights = 1 / errors.clip(min=1e-3)
        better = np.quantile(errors, 0.75, axis=1) < even[uneven]
        rough[uneven], uneven[uneven] = ~better, better
        difference[uneven] = images[uneven] - np.einsum("hwk,nk->nhw", terms, surface[better, :, 0])
    return difference, uneven, rough


def largest_objects(x: np.ndarray) -> np.ndarray:
    """How long the largest connected piece of ink is, in pixels, on each canvas `[n, h, h]`, uint8 or floats."""
    white = 255 if x.dtype == np.uint8 else 1
    within_an_image = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])
    labels, _ = ndimage.label(x > INK * white, within_an_image)
    sides = np.zeros(len(x), int)
    for i, rows, columns in ndimage.find_objects(labels):
        sides[i.start] = max(sides[i.start], rows.stop - rows.start, columns.stop - columns.start)
    return sides


def object_size(x: np.ndarray) -> float | None:
    """How long an object is, about, in pixels: the median of `largest_objects`; None if there is no ink at all."""
    sides = largest_objects(x)
    return float(np.median(sides[sides > 0])) if sides.any() else None


def left_out(x: np.ndarray, boxes: np.ndarray) -> bool:
    """Whether a piece of ink on a canvas `[h, h]`, uint8, lies mostly outside the windows `[n, 4]`, (x, y, w, h)."""
    labels, _ = ndimage.label(x > 0.1 * 255, np.ones((3, 3)))
    pixels = np.arange(len(x)) + 0.5
    covered = np.zeros(x.shape, bool)
    for left, top, width, height in boxes:
        across, down = np.abs(pixels - left - width / 2) < width / 2, np.abs(pixels - top - height / 2) < height / 2
        covered |= down[:, None] & across
    sizes, inside = np.bincount(labels.ravel()), np.bincount(labels[covered], minlength=labels.max() + 1)
    return bool((inside < 0.3 * sizes)[1:][sizes[1:] >= 6].any())
