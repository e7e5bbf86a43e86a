"""Images of one's own, as the model takes them: light objects on black, on square canvases.

Training, evaluation and prediction read them with `read_file` and bring them to the model by one rule, `to_canvases`.
What becomes of an image depends on that image alone, not on others in its file, array or folder:

1. Colour becomes grey: luma, or one of red, green and blue if clearly more of the image stands out there.
2. Specks, single pixels and pairs that differ from all around them by more than half of the image's contrast (hot
   pixels, dust), take the grey of their surroundings.
3. The range of grey is the smallest of 1, 255, 1,023, 4,095, 16,383 and 65,535 that the image's values fit in. Floats
   may go a little beyond 1; if they are multiples of 1/255, they count as whole numbers.
4. The image is scaled so that its longer side is the canvas's, and centred.
5. The median grey of its border, or if that is uneven a smooth surface fitted to it, is taken for the background.
6. Ink is what differs from the background by at least 8% of the range and six standard deviations of the noise. If
   more of it is darker than lighter, the image is inverted.
7. The background becomes black, and the 90th percentile of the ink white. An image without ink is empty.
"""

import warnings
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, ImageSequence
from scipy import ndimage

from multi_mnist import LARGEST_FILE, DataError, Scenes, one_line, open_arrays

LARGEST_CANVAS = 128  # pixels a side, to train on: larger images are made smaller
RANGES = np.array([1, 255, 1023, 4095, 16383, 65535], np.float32)
# Of the range: the least contrast of ink; the least that may be a faint object; the most by which a border is even.
FAINT, TRACE, EVEN = np.float32([0.08, 0.03, 0.03])
NOISE = 6  # standard deviations of the noise: less cannot be told from it
MIXED = 0.02  # the share of ink, in squared greys, of the other polarity that is too much
# What may be true of an image: first what speaks against counting what is in it, then what was done.
LOW, SPECKLED, UNEVEN, BOTH, *_ = FACTS = (
    "its contrast is too low to be told from noise",
    "it had more than five specks of one or two pixels",
    "its background is uneven, and no smooth surface fits it",
    "its ink of the other polarity was left out (--invert and --no-invert decide which)",
    "specks of one or two pixels were removed",
    "uneven background: a smooth surface was taken off",
    "dark objects on a light background: inverted (--no-invert leaves them as they are)",
)
EMPTY = (LOW,)  # Such an image is taken for empty.
FIXED_INK = "the same ink is at the same place in nearly all images: a scale bar counts as an object"


class Canvases(NamedTuple):
    """Images as the model takes them, and what was done to them."""

    x: np.ndarray  # uint8 [n, size, size]
    places: np.ndarray  # [n, 4]: where the image's corner lies, (x, y) in canvas pixels, and its scale along x and y
    doubts: list[str | None]  # [n], what speaks against counting what is in an image: LOW, SPECKLED, UNEVEN or BOTH
    floors: np.ndarray  # uint8 [n], the grey above which something on a canvas can be told from noise
    remarks: list[str]  # what was done that a user may want to know


def files_in(path: Path) -> list[Path]:
    """The file, or the files of a folder in order, without hidden ones and subfolders. DataError if there are none."""
    if not path.exists():
        raise DataError(f"no such file or folder: {path}")
    files = sorted(file for file in path.iterdir() if file.name[0] != ".") if path.is_dir() else [path]
    files = [file for file in files if file.is_file() or (file.is_symlink() and not file.is_dir())]
    if not files:
        raise DataError(f"{path} has no files (subfolders are not looked into)")
    return files


def read_file(path: Path) -> tuple[list[np.ndarray], np.ndarray | None, list[str]]:
    """The images in a file, blocks `[n, h, w]` of numbers of any type; true counts `[images]` or None; and remarks.

    An `.npz` has arrays `x` `[n, h, w]` and perhaps `counts` `[n]`; of any other file each frame is a block. DataError,
    with one line that says what is wrong, if it cannot be read.
    """
    try:
        if path.suffix.lower() == ".npz":
            x, counts = read_arrays(path)
            return [x], counts, []
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            # The second image in a phone's JPEG is no other picture. Nor are pages of a TIFF that are marked (its tag
            # NewSubfileType) as the same at a lower resolution, bit 0, or as a mask, bit 2.
            frames = [image] if image.format == "MPO" else ImageSequence.Iterator(image)
            if getattr(image, "n_frames", 1) * image.width * image.height > LARGEST_FILE:
                raise ValueError("its pages are too many to be held in memory together")
            pages = [(getattr(page, "tag_v2", {}).get(254, 0) & 5, *to_grey(page)) for page in frames]
    except Exception as error:  # Whatever goes wrong in reading, the file is at fault.
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    kept = [page for page in pages if not page[0]] or pages
    remarks = [*dict.fromkeys(remark for _, _, remark in kept if remark)]
    if skipped := len(pages) - len(kept):
        remarks.append(f"{skipped} of {len(pages)} pages are smaller copies or masks: skipped")
    return [x for _, x, _ in kept], None, remarks


def read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """`x` `[n, h, w]` and `counts` `[n]`, or None, of an `.npz` file."""
    with open_arrays(path) as file:
        x, counts = np.asarray(file["x"]), np.asarray(file["counts"]) if "counts" in file.files else None
    check_images(x)
    if counts is not None:
        if counts.shape != x.shape[:1] or counts.dtype.kind not in "iu" or counts.min() < 0 or counts.max() > 1000:
            raise DataError(f"counts must be {len(x)} whole numbers from 0 to 1,000, one per image")
        counts = counts.astype(np.int64)
    return x, counts


def check_images(x: np.ndarray) -> None:
    """Raises DataError, with one line that says what is wrong, unless these are images `[n, h, w]`."""
    shape = f"images have shape {list(x.shape)}"
    if x.ndim in (3, 4) and x.shape[-1] in (3, 4):
        raise DataError(f"{shape}, like colours; give greys [n, h, w], for one image x.mean(-1)[None], or a PNG file")
    if x.ndim != 3 or not x.size:
        raise DataError(f"{shape}, expected [n, h, w], none of them 0")
    if x.dtype.kind not in "biuf":
        raise DataError(f"images are {x.dtype}, expected numbers")
    if x.dtype != bool and not (x.min() >= 0 and float(x.max()) <= RANGES[-1]):  # false for NaN as well
        raise DataError("images have values below 0 or above 65,535, or NaN")


def to_grey(image: Image.Image) -> tuple[np.ndarray, str | None]:
    """An image of any mode as greys `[1, h, w]`, upright, and a remark on its colours."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        check_images(np.asarray(image)[None])
        return np.asarray(image)[None], None
    if image.has_transparency_data:  # What is transparent is black behind light ink, and white behind dark.
        luma, alpha = (np.asarray(band, float) for band in image.convert("LA").split())
        behind = "white" if (alpha * luma).sum() < 127.5 * alpha.sum() else "black"
        image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image.convert("RGBA"))
    bands = image.convert("L"), *image.convert("RGB").split()
    small = np.stack([band.reduce(1 + max(image.size) // 256) for band in bands]) / np.float32(255)
    difference, *_ = without_background(small, np.zeros(4, np.float32))
    light, dark = difference >= FAINT, difference <= -FAINT
    shown, seen = np.maximum(light.sum((1, 2)), dark.sum((1, 2))), light | dark
    best = 0 if shown[0] >= 0.8 * shown.max() else int(shown.argmax())
    share = 1 - (seen.any(0) & ~seen[best]).sum() / max(1, seen.any(0).sum())
    remark = f"colour became grey: of what stands out, {share:.0%} does in {('luma', 'red', 'green', 'blue')[best]}"
    return np.asarray(bands[best])[None], remark if best or share < 0.9 else None


def load_canvases(path: Path, size: int | None = None, invert: bool | None = None) -> tuple[Scenes, list[str]]:
    """The images in a file, or in all files of a folder, on canvases (see `to_canvases`); and remarks, a line each.
    Files of a folder that cannot be read are left out, with a remark. Raises DataError if nothing can be read."""
    files, remarks, counts = files_in(path), [], []

    def blocks() -> Iterator[np.ndarray]:
        for file in files:
            try:
                some, some_counts, some_remarks = read_file(file)
            except DataError as error:
                remarks.append(f"left out: {one_line(error)}")
                continue
            counts.append(some_counts)
            remarks.extend(f"{file}: {remark}" for remark in some_remarks)
            yield from some
        if not counts:
            raise DataError(remarks[0].removeprefix("left out: "))

    canvases = to_canvases(blocks(), size, invert)
    if has_fixed_ink(canvases.x):
        canvases.remarks.append(FIXED_INK)
    counts = None if any(part is None for part in counts) else np.concatenate(counts)
    return Scenes(canvases.x, counts), [*remarks, *(f"{path}: {remark}" for remark in canvases.remarks)]


def to_canvases(blocks, size: int | None = None, invert: bool | None = None) -> Canvases:
    """Images as the model takes them, by the rule in the module's docstring. DataError for what cannot be images.

    blocks: an array `[n, h, w]` of numbers of any type, or several of any sizes, of which large ones are not kept.
    size: of the canvas, in pixels; by default the longest side of all images, but at most `LARGEST_CANVAS`.
    invert: whether the images are dark on light; by default it is found out for each.
    """
    parts, side = [], 1
    for block in [blocks] if isinstance(blocks, np.ndarray) else blocks:
        check_images(block)
        side = size or min(LARGEST_CANVAS, max(side, *block.shape[1:]))
        if (total := len(block) * side**2) > LARGEST_FILE:
            raise DataError(f"these are too many images: {len(block):,} on canvases of {side:,} pixels a side")
        for some in np.array_split(block, min(len(block), 1 + max(block.size, total) // 2**18)):  # to bound memory
            # What is smaller than any canvas waits until its size is known.
            parts.append(normalize(some, side, invert) if size or side == LARGEST_CANVAS else some)
    parts = [part if isinstance(part, tuple) else normalize(part, side, invert) for part in parts]
    x, places, floors, facts = map(np.concatenate, zip(*parts))
    doubts = [next((fact for fact, is_so in zip(FACTS[:4], row) if is_so), None) for row in facts]
    some = "{:,} of {:,} images: " if len(x) > 1 else ""
    remarks = [some.format(n, len(x)) + fact for fact, n in zip(FACTS, facts.sum(0)) if n]
    return Canvases(x, places, doubts, floors, remarks)


def normalize(images: np.ndarray, size: int, invert: bool | None) -> tuple[np.ndarray, ...]:
    """Of images `[n, h, w]`: x, places and floors as in `Canvases`; and which of `FACTS` are true of each, `[n, 7]`."""
    if images.dtype.kind == "f":  # x / 255 is the image x, down to the last bit.
        images = images.astype(float)
        whole = np.rint(255 * images)
        exact = ((images <= 1) & (np.abs(255 * images - whole) < 0.001)).all((1, 2), keepdims=True)
        images = np.where(exact, whole, images).astype(np.float32)
    else:
        images = images.astype(np.uint8 if images.dtype.itemsize == 1 else np.uint16, copy=False)
    clean, specks = without_specks(images)
    images = resize_to_canvas(clean / white_of(clean)[:, None, None], size)
    n, h, w = images.shape
    noise = NOISE / 0.954 * np.median(np.abs(np.diff(images)).reshape(n, -1), 1) if w > 1 else np.zeros(n)
    difference, uneven, rough = without_background(images, noise)
    ink = difference * (np.abs(difference) >= np.maximum(FAINT, noise)[:, None, None])
    light, dark = ((ink.clip(*sign).reshape(n, -1) ** 2).sum(1) for sign in ((0, None), (None, 0)))
    inverted = dark > light if invert is None else np.full(n, invert)
    seen, unseen = np.where(inverted, (dark, light), (light, dark))
    sign = np.where(inverted, -1, 1).astype(np.int8)[:, None, None]
    ink = np.sort((sign * ink).reshape(n, -1))
    white = np.where(seen > 0, ink[np.arange(n), -1 - (0.1 * (ink > 0).sum(1)).astype(int)], np.float32(np.inf))
    left, top, *_ = place = (size - w) // 2, (size - h) // 2, w / clean.shape[2], h / clean.shape[1]
    x = np.zeros((n, size, size), np.uint8)
    x[:, top : top + h, left : left + w] = np.rint((255 / white[:, None, None] * sign * difference).clip(0, 255))
    floors = np.ceil((255 * np.maximum(TRACE, noise) / white).clip(max=255)).astype(np.uint8)
    # Where a surface was taken off, a little is left of one without any ink.
    plain = np.where(uneven, np.abs(difference).max((1, 2)) < 0.01, np.ptp(images, (1, 2)) == 0)
    low = (seen + unseen == 0) & ~plain
    facts = [low, (specks > 5) & ~low, rough, unseen > MIXED * (seen + unseen)]
    facts += [(specks > 0) & ~low, uneven, inverted & (seen > 0) & (invert is None)]
    return x, np.tile(place, (n, 1)), floors, np.stack(facts, 1)


def white_of(images: np.ndarray) -> np.ndarray:
    """The end of the range of grey that an image's values `[.., h, w]` fit in, float32 `[..]`."""
    largest = images.max((-2, -1)).astype(np.float32)
    return np.where((1 < largest) & (largest < 2), largest, RANGES[np.searchsorted(RANGES, largest)])


def without_specks(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images `[n, h, w]` without hot and dark pixels, alone or in pairs; and how many there were in each, `[n]`."""
    # Rank-max openings of light, then dark: a pixel keeps its grey if two others reach it within a square of 3x3.
    flip, opened = np.negative if images.dtype.kind == "f" else np.invert, []
    for stack in (images, flip(images)):
        padded = np.pad(stack, ((0, 0), (1, 1), (1, 1)), constant_values=stack.min())
        shifts = [y * padded.shape[2] + x for y in (-1, 0, 1) for x in (-1, 0, 1)]
        first = second = third = np.full_like(padded, stack.min())
        for pixel in (np.roll(padded, shift) for shift in shifts):
            third = np.maximum(third, np.minimum(second, pixel))
            second = np.maximum(second, np.minimum(first, pixel))
            first = np.maximum(first, pixel)
        third = reduce(np.maximum, (np.roll(third, shift) for shift in shifts))
        opened.append(np.minimum(stack, third[:, 1:-1, 1:-1]))
    upper, lower = opened[0], flip(opened[1])
    half = ((upper.max((1, 2)) - lower.min((1, 2))) / 2).astype(images.dtype)[:, None, None]
    light, dark = images - upper > half, lower - images > half
    return np.where(light, upper, np.where(dark, lower, images)), (light | dark).sum((1, 2))


def resize_to_canvas(images: np.ndarray, size: int) -> np.ndarray:
    """Images `[n, h, w]`, float32, with `size` pixels along their longer side, and no new greys beyond their own."""
    h, w = (max(1, round(side * size / max(images.shape[1:]))) for side in images.shape[1:])
    if (h, w) == images.shape[1:]:
        return images
    resized = np.stack([Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC) for image in images])
    return resized.clip(images.min((1, 2), keepdims=True), images.max((1, 2), keepdims=True))


def without_background(images: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What images `[n, h, w]` differ by from their background; whether that was an uneven one, `[n]`; and whether it is
    uneven in a way that no smooth surface fits, `[n]`."""
    _, h, w = images.shape
    edge = max(1, round(0.04 * max(h, w)))
    border = np.ones((h, w), bool)
    border[edge:-edge, edge:-edge] = False
    difference = images - np.median(images[:, border], 1)[:, None, None]
    even, rough = np.maximum(EVEN, noise / 3), np.zeros(len(images), bool)
    uneven = np.quantile(np.abs(difference[:, border]), 0.75, axis=1) > even
    if uneven.any():
        # A quadratic surface, with the least absolute deviations: objects that touch the border count little.
        y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
        terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1)
        at, targets, errors = terms[border], images[uneven][:, border, None].astype(float), np.float64(1)
        for _ in range(20):
            weighted = (at / np.maximum(errors, 1e-3) * np.ones_like(targets)).mT
            surface = np.linalg.solve(weighted @ at + 1e-6 * np.eye(6), weighted @ targets)
            errors = np.abs(targets - at @ surface)
        better = np.quantile(errors[..., 0], 0.75, axis=1) < even[uneven]
        rough[uneven], uneven[uneven] = ~better, better
        difference[uneven] = images[uneven] - (terms @ surface[better][:, None])[..., 0]
    return difference, uneven, rough


def largest_component_length(x: np.ndarray) -> np.ndarray:
    """How long the largest connected piece of ink is, in pixels, on each canvas `[n, h, h]`, uint8 or floats."""
    labels, _ = ndimage.label(x > (127 if x.dtype == np.uint8 else 0.5), np.ones((3, 3, 3)) * [[[0]], [[1]], [[0]]])
    sides = np.zeros(len(x), int)
    for i, *box in ndimage.find_objects(labels):
        sides[i.start] = max(sides[i.start], *(side.stop - side.start for side in box))
    return sides


def estimate_object_size(x: np.ndarray) -> float | None:
    """How long an object is, about, in pixels: the median of `largest_component_length`; None if there is no ink."""
    sides = largest_component_length(x)
    return float(np.median(sides[sides > 0])) if sides.any() else None


def has_unexplained_ink(x: np.ndarray, boxes: np.ndarray, floor: float) -> bool:
    """Whether on a canvas, uint8 `[h, h]`, a piece of what is brighter than `floor` (of `Canvases`) lies mostly outside
    the windows `[k, 4]`, (x, y, w, h) in pixels."""
    labels, n = ndimage.label(x > floor, np.ones((3, 3)))
    y, x = np.mgrid[: len(x), : len(x)] + 0.5
    windows = [(abs(x - left - w / 2) < w / 2) & (abs(y - top - h / 2) < h / 2) for left, top, w, h in boxes]
    covered = np.any([np.zeros_like(labels), *windows], 0)
    sizes, inside = (np.bincount(part.ravel(), minlength=n + 1)[1:] for part in (labels, labels[covered]))
    return bool((inside < 0.3 * sizes)[sizes >= 6].any())


def has_fixed_ink(x: np.ndarray) -> bool:
    """Whether the same piece of ink lies at the same pixels of nearly all canvases, uint8 `[n, h, h]`, as a burnt-in
    scale bar does. Empty canvases and copies of others do not count, and of many canvases a thousand will do."""
    x = np.unique(x[x.any((1, 2))][:1000], axis=0)
    share = (x > 63).mean(0) if len(x) > 1 else np.zeros(x.shape[1:])
    labels, n = ndimage.label(share >= 0.5, np.ones((3, 3)))
    return any((share[labels == i + 1] >= 0.9).mean() >= 0.6 for i in range(n))
