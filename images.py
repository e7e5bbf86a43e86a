"""Images of one's own, as the model takes them: light objects on black.

Training, evaluation and prediction read them with `read_file` and bring them to the model by one rule, `to_canvas`.
What becomes of an image depends on that image alone, not on others in its file, array or folder. Its size stays.

1. Colour becomes grey: luma, or one of red, green and blue if clearly more of the image stands out there.
2. Specks, single pixels and pairs that differ from all around them by more than half of the image's contrast (hot
   pixels, dust), take the grey of their surroundings.
3. The range of grey is the smallest of 1, 255, 1,023, 4,095, 16,383 and 65,535 that the image's values fit in. Floats
   may go a little beyond 1; if they are multiples of 1/255, they count as whole numbers.
4. The median grey of its border is taken for the background; if the border is uneven, a smooth surface fitted to it;
   and if none fits, on a large image, the median grey of a wide surrounding of each pixel.
5. Ink is what differs from the background by at least 8% of the range and six standard deviations of the noise. If
   more of it is darker than lighter, the image is inverted.
6. The background becomes black, and the 90th percentile of the ink white. An image without ink is empty.
"""

import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, ImageSequence
from scipy import ndimage

from multi_mnist import DataError, one_line

LARGEST_FILE = 2**31  # of arrays, unpacked, in bytes: 200,000 scenes of 50x50 floats
LARGEST_CANVAS = 128  # pixels a side, to train on: larger images are made smaller, or cropped
RANGES = np.array([1, 255, 1023, 4095, 16383, 65535], np.float32)
# Of the range: the least contrast of ink; the least that may be a faint object; the most by which a border is even.
FAINT, TRACE, EVEN = np.float32([0.08, 0.03, 0.03])
NOISE = 6  # standard deviations of the noise: less cannot be told from it
MIXED = 0.02  # the share of ink, in squared greys, of the other polarity that is too much
# What may be true of an image: first what speaks against counting what is in it, then what was done.
LOW, SPECKLED, UNEVEN, BOTH, _, SURFACE, WIDE, _ = FACTS = (
    "its contrast is too low to be told from noise",  # It is taken for empty.
    "it had more than five specks of one or two pixels",
    "its background is uneven, and no smooth surface fits it",
    "its ink of the other polarity was left out (--invert and --no-invert decide which)",
    "specks of one or two pixels were removed",
    "uneven background: a smooth surface was taken off",
    "uneven background: the median of a wide surrounding was taken off",
    "dark objects on a light background: inverted (--no-invert leaves them as they are)",
)
FIXED_INK = "the same ink is at the same place in nearly all images: a scale bar counts as an object"


class Canvas(NamedTuple):
    """An image as the model takes it, and what was done to it."""

    x: np.ndarray  # uint8 [h, w]
    place: tuple  # where the image's corner lies, (x, y) in canvas pixels, and its scale along x and y
    doubt: str | None  # what speaks against counting what is in it: LOW, SPECKLED, UNEVEN or BOTH
    floor: int  # the grey above which something on it can be told from noise
    facts: list[bool]  # which of FACTS are true of it


def files_in(path: Path) -> list[Path]:
    """The file, or the files of a folder in order, without hidden ones and subfolders. DataError if there are none."""
    if not path.exists():
        raise DataError(f"no such file or folder: {path}")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.name[0] != "." and not file.is_dir())
    if not files:
        raise DataError(f"{path} has no files (subfolders are not looked into)")
    return files


def read_file(path: Path) -> tuple[list[np.ndarray], np.ndarray | None, list[str]]:
    """The images in a file, `[h, w]` of numbers of any type; their true counts `[images]` or None; and remarks.

    An `.npz` has arrays `x` `[n, h, w]` and perhaps `counts` `[n]`; of any other file each frame is an image.
    DataError, with one line that says what is wrong, if it cannot be read.
    """
    try:
        if path.suffix.lower() == ".npz":
            return read_arrays(path)
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            # The second image in a phone's JPEG is no other picture. Nor are pages of a TIFF that are marked (its tag
            # NewSubfileType) as the same at a lower resolution, bit 0, or as a mask, bit 2.
            frames = [image] if image.format == "MPO" else ImageSequence.Iterator(image)
            pages = [(getattr(page, "tag_v2", {}).get(254, 0) & 5, *to_grey(page)) for page in frames]
    except Exception as error:  # Whatever goes wrong in reading, the file is at fault.
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    kept = [page for page in pages if not page[0]] or pages
    remarks = [*dict.fromkeys(remark for _, _, remark in kept if remark)]
    if skipped := len(pages) - len(kept):
        remarks.append(f"{skipped} of {len(pages)} pages are smaller copies or masks: skipped")
    return [x for _, x, _ in kept], None, remarks


def read_arrays(path: Path) -> tuple[list[np.ndarray], np.ndarray | None, list[str]]:
    """What `read_file` returns, of an `.npz` file, without running code that it may hold."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > LARGEST_FILE:
        raise DataError(f"it holds {size / 2**20:,.0f} MiB, more than {LARGEST_FILE / 2**20:,.0f}")
    with np.load(path, allow_pickle=False) as file:
        x, counts = file["x"], file.get("counts")
    check_images(x)
    if counts is None:
        return list(x), None, []
    if counts.shape != x.shape[:1] or counts.dtype.kind not in "iu" or counts.min() < 0 or counts.max() > 1000:
        raise DataError(f"counts must be {len(x)} whole numbers from 0 to 1,000, one per image")
    return list(x), counts.astype(np.int64), []


def check_images(x: np.ndarray) -> None:
    """Raises DataError, with one line that says what is wrong, unless these are images `[n, h, w]`."""
    if x.ndim != 3 or not x.size or x.shape[2] in (3, 4):  # A last axis of 3 or 4 is that of a single image's colours.
        raise DataError(f"images have shape {list(x.shape)}, expected greys [n, h, w] (of colours, their mean)")
    if x.dtype.kind not in "biuf" or not (x.min() >= 0 and x.max() <= RANGES[-1]):  # false for NaN as well
        raise DataError("images have values that are not numbers from 0 to 65,535")


def to_grey(image: Image.Image) -> tuple[np.ndarray, str | None]:
    """An image of any mode as greys `[h, w]`, upright, and a remark on its colours."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        check_images(np.asarray(image)[None])
        return np.asarray(image), None
    if image.has_transparency_data:  # What is transparent is black behind light ink, and white behind dark.
        luma, alpha = (np.asarray(band, float) for band in image.convert("LA").split())
        behind = "white" if (alpha * luma).sum() < 127.5 * alpha.sum() else "black"
        image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image.convert("RGBA"))
    bands = image.convert("L"), *image.convert("RGB").split()
    small = np.stack([band.reduce(1 + max(image.size) // 256) for band in bands]) / np.float32(255)
    difference = np.stack([without_background(band, np.float32(0))[0] for band in small])
    light, dark = difference >= FAINT, difference <= -FAINT
    shown, seen = np.maximum(light.sum((1, 2)), dark.sum((1, 2))), light | dark
    best = 0 if shown[0] >= 0.8 * shown.max() else int(shown.argmax())
    share = 1 - (seen.any(0) & ~seen[best]).sum() / max(1, seen.any(0).sum())
    remark = f"colour became grey: of what stands out, {share:.0%} does in {('luma', 'red', 'green', 'blue')[best]}"
    return np.asarray(bands[best]), remark if best or share < 0.9 else None


def load_images(path: Path, invert: bool | None = None) -> tuple[list[Canvas], np.ndarray | None, list[str]]:
    """The images in a file, or in all files of a folder, as canvases; their true counts, if known; and remarks, a line
    each. Files of a folder that cannot be read are left out, with a remark. Raises DataError if nothing can be read."""
    canvases, remarks, counts = [], [], []
    for file in files_in(path):
        try:
            images, some_counts, some_remarks = read_file(file)
            canvases += [to_canvas(image, invert) for image in images]
        except DataError as error:
            remarks.append(f"left out: {one_line(error)}")
            continue
        counts.append(some_counts)
        remarks += [f"{file}: {remark}" for remark in some_remarks]
    if not counts:
        raise DataError(remarks[0].removeprefix("left out: "))
    remarks += [f"{path}: {remark}" for remark in remarks_on(canvases)]
    return canvases, None if any(part is None for part in counts) else np.concatenate(counts), remarks


def remarks_on(canvases: list[Canvas]) -> list[str]:
    """What was done to some images that a user may want to know."""
    some = "{:,} of {:,} images: " if len(canvases) > 1 else ""
    shares = np.sum([canvas.facts for canvas in canvases], 0)
    return [some.format(n, len(canvases)) + fact for fact, n in zip(FACTS, shares) if n]


def to_canvas(image: np.ndarray, invert: bool | None = None) -> Canvas:
    """An image `[h, w]` of numbers as the model takes it, by the rule in the module's docstring.

    invert: whether it is dark on light; by default it is found out. Raises DataError for what cannot be an image.
    """
    check_images(image[None])
    scaled = 255 * image.astype(float)
    if image.max() <= 1 and (np.abs(scaled - np.rint(scaled)) < 0.001).all():
        image = np.rint(scaled)  # x / 255 is the image x, down to the last bit.
    clean, specks = without_specks(image.astype(np.float32))
    image = clean / white_of(clean)
    noise = NOISE / 0.954 * np.median(np.abs(np.diff(image))) if image.shape[1] > 1 else np.float64(0)
    difference, background = without_background(image, noise)
    ink = difference * (np.abs(difference) >= np.maximum(FAINT, noise))
    light, dark = (ink.clip(0) ** 2).sum(), (ink.clip(max=0) ** 2).sum()
    is_dark = dark > light if invert is None else invert
    sign, seen, unseen = (-1, dark, light) if is_dark else (1, light, dark)
    ink = np.sort(sign * ink, axis=None)
    white = ink[-1 - int(0.1 * (ink > 0).sum())] if seen > 0 else np.float32(np.inf)
    x = np.rint((255 / white * sign * difference).clip(0, 255)).astype(np.uint8)
    floor = int(np.ceil((255 * np.maximum(TRACE, noise) / white).clip(max=255)))
    # Where a surface was taken off, a little is left of an image without any ink.
    is_plain = np.abs(difference).max() < 0.01 if background == SURFACE else np.ptp(image) == 0
    is_low = seen + unseen == 0 and not is_plain
    facts = [is_low, specks > 5 and not is_low, background == UNEVEN, unseen > MIXED * (seen + unseen)]
    doubt = next((fact for fact, is_so in zip(FACTS, facts) if is_so), None)
    facts += [specks > 0 and not is_low, background == SURFACE, background == WIDE]
    return Canvas(x, (0, 0, 1.0, 1.0), doubt, floor, [*facts, is_dark and seen > 0 and invert is None])


def rescale(canvas: Canvas, factor: float) -> Canvas:
    """A canvas made larger or smaller, with no new greys beyond its own."""
    h, w = (max(1, round(side * factor)) for side in canvas.x.shape)
    if (h, w) == canvas.x.shape:
        return canvas
    x = np.asarray(Image.fromarray(canvas.x).resize((w, h), Image.Resampling.BICUBIC)).clip(0, canvas.x.max())
    left, top, across, down = canvas.place
    across, down = across * w / canvas.x.shape[1], down * h / canvas.x.shape[0]
    return canvas._replace(x=x, place=(left * factor, top * factor, across, down))


def letterbox(canvas: Canvas, size: int) -> Canvas:
    """A canvas scaled so that its longer side has `size` pixels, in the middle of a square one."""
    canvas = rescale(canvas, size / max(canvas.x.shape))
    (h, w), (_, _, *scale) = canvas.x.shape, canvas.place
    left, top = (size - w) // 2, (size - h) // 2
    x = np.pad(canvas.x, ((top, size - h - top), (left, size - w - left)))
    return canvas._replace(x=x, place=(left, top, *scale))


def white_of(image: np.ndarray) -> np.float32:
    """The end of the range of grey that an image's values fit in."""
    largest = np.float32(image.max())
    return largest if 1 < largest < 2 else RANGES[np.searchsorted(RANGES, largest)]


def without_specks(image: np.ndarray) -> tuple[np.ndarray, int]:
    """An image `[h, w]` without hot and dark pixels, alone or in pairs; and how many there were."""
    # A pixel keeps its grey if two others reach it within a square of 3x3: an opening by the third in rank.
    brightest = ndimage.rank_filter(image, -3, 3, mode="constant", cval=image.min())
    darkest = ndimage.rank_filter(image, 2, 3, mode="constant", cval=image.max())
    upper = np.minimum(image, ndimage.maximum_filter(brightest, 3))
    lower = np.maximum(image, ndimage.minimum_filter(darkest, 3))
    half = (upper.max() - lower.min()) / 2
    light, dark = image - upper > half, lower - image > half
    return np.where(light, upper, np.where(dark, lower, image)), (light | dark).sum()


def without_background(image: np.ndarray, noise: float) -> tuple[np.ndarray, str | None]:
    """What an image `[h, w]` differs by from its background, and, if that was not even, SURFACE, WIDE or UNEVEN."""
    h, w = image.shape
    edge = max(1, round(0.04 * max(h, w)))
    border = np.ones((h, w), bool)
    border[edge:-edge, edge:-edge] = False
    difference, even = image - np.median(image[border]), np.maximum(EVEN, noise / 3)
    if np.quantile(np.abs(difference[border]), 0.75) <= even:
        return difference, None
    # A quadratic surface, with the least absolute deviations: objects that touch the border count little.
    y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1)
    at, target = terms[border], image[border][:, None].astype(float)
    errors = np.ones_like(target)
    for _ in range(20):
        weighted = (at / np.maximum(errors, 1e-3)).T
        surface = np.linalg.solve(weighted @ at + 1e-6 * np.eye(6), weighted @ target)
        errors = np.abs(target - at @ surface)
    if np.quantile(errors, 0.75) < even:
        return (image - (terms @ surface)[..., 0]).astype(np.float32), SURFACE
    if max(h, w) <= LARGEST_CANVAS:
        return difference, UNEVEN
    # As in microscopy, but neither light nor dark objects are preferred: they cover less than half of any surrounding.
    small = Image.fromarray(image).reduce(max(h, w) // 64)
    size = round(max(small.size) / 3)
    around = ndimage.gaussian_filter(ndimage.median_filter(np.asarray(small), size, mode="nearest"), size / 4)
    return image - np.asarray(Image.fromarray(around).resize((w, h), Image.Resampling.BICUBIC)), WIDE


def piece_lengths(x: np.ndarray) -> np.ndarray:
    """How long the connected pieces of ink on a canvas, uint8 `[h, w]`, are, in pixels. Small ones, which may be noise,
    do not count; nor does what the border cuts, unless there is nothing else."""
    labels, n = ndimage.label(x > 0.4 * 255, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    lengths = np.array([max(side.stop - side.start for side in box) for box in ndimage.find_objects(labels)], int)
    counts = areas >= max(4, 0.1 * np.max(areas, initial=0))
    at_border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    whole = counts & ~np.isin(np.arange(1, n + 1), at_border)
    return lengths[whole if whole.any() else counts]


def has_unexplained_ink(x: np.ndarray, boxes: np.ndarray, floor: float) -> bool:
    """Whether on a canvas, uint8 `[h, w]`, a piece of what is brighter than `floor` (of `Canvas`) lies mostly outside
    the windows `[k, 4]`, (x, y, w, h) in pixels."""
    labels, n = ndimage.label(x > floor, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    for left, top, right, bottom in np.rint(corners).clip(0).astype(int):
        labels[top:bottom, left:right] = 0
    outside = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    return bool((sizes - outside < 0.3 * sizes)[sizes >= 6].any())


def has_fixed_ink(x: np.ndarray) -> bool:
    """Whether the same piece of ink lies at the same pixels of nearly all canvases, uint8 `[n, h, h]`, as a burnt-in
    scale bar does. Empty canvases and copies of others do not count, and of many canvases a thousand will do."""
    different = {image.tobytes(): image for image in x[x.any((1, 2))][:1000]}
    if len(different) < 2:
        return False
    share = (np.stack([*different.values()]) > 63).mean(0)
    labels, n = ndimage.label(share >= 0.5, np.ones((3, 3)))
    return any((share[labels == i + 1] >= 0.9).mean() >= 0.6 for i in range(n))
