"""The images that a run trains on: multi-MNIST, or a user's own, and how large the objects in them are."""

import sys
from pathlib import Path

import numpy as np

from images import FIXED_INK, LARGEST_CANVAS, Canvas, has_fixed_ink, letterbox, load_images, piece_lengths, rescale
from multi_mnist import DataError, Scenes, digest, load_split
from training.parallel import Processes, launched
from training.run import UsageError

MARGIN = 1.15  # How much longer a window is than an object.
# Images are cropped if they are longer than FEW objects; a crop is as long as CROP of them.
FEW, CROP, CROPS = 8, 3, 10_000
LONGEST = 20  # pixels of an object in a crop


def load_scenes(
    data: Path | None, data_dir: Path, processes: Processes, *options
) -> tuple[Scenes, Scenes, Scenes, str, float | None]:
    """Training, validation and test scenes, the checksum of what they were taken from, and how long an object is.

    data: a user's images, if not multi-MNIST; options: how they are read, see `load_own_scenes`.
    """
    # On each machine one process comes first: it may have to fetch MNIST.
    if processes.local_rank > 0:
        processes.barrier()
    if data:
        train, held_out, sha256, length = load_own_scenes(data, *options)
        scenes = train, held_out, held_out, sha256, length
    else:
        splits = [load_split(split, data_dir) for split in ("train", "validation", "test")]
        scenes = *splits, digest(splits[0]), None
    if processes.local_rank == 0:
        processes.barrier()
    return scenes


def load_own_scenes(
    path: Path, size: int | None, invert: bool | None, max_objects: int, crop: int | None, object_size: float | None
) -> tuple[Scenes, Scenes, str, float]:
    """A user's images: all but the last tenth, that tenth, which is held out, the checksum of all, and how many canvas
    pixels long an object is."""
    canvases, counts, remarks = load_images(path, invert)
    longest = max(max(canvas.x.shape) for canvas in canvases)
    lengths = np.concatenate([piece_lengths(canvas.x) for canvas in canvases])
    if not object_size and not len(lengths):
        raise DataError(f"--data {path}: the images are all empty")
    length = object_size or float(np.median(lengths))
    if not crop and longest > max(LARGEST_CANVAS, FEW * length):
        crop = round(CROP * length)
    if crop:
        counts, factor = None, min(1, LONGEST / length, LARGEST_CANVAS / crop)
        x = random_crops([rescale(canvas, factor).x for canvas in canvases], round(factor * crop), path)
        remarks.append(f"{len(x):,} random crops of {crop} pixels were made of {len(canvases):,} images (--crop)")
    else:
        size = size or min(LARGEST_CANVAS, longest)
        x, factor = np.stack([letterbox(canvas, size).x for canvas in canvases]), size / longest
    if has_fixed_ink(x):
        remarks.append(f"{path}: {FIXED_INK}")
    n = len(x) // 10
    if n == 0:
        raise DataError(f"--data {path}: too few images to hold out a tenth: {len(x)}")
    if counts is not None and (most := counts.max()) > max_objects:
        raise UsageError(f"--max-objects {max_objects}: there are images with {most} objects; give -t {most} or more")
    if object_size and length * factor * MARGIN > x.shape[1]:
        too_large = f"with a margin, that is larger than the canvas of {longest} pixels"
        raise UsageError(f"--object-size {object_size}: {too_large}")
    length = min(length * factor, x.shape[1] / MARGIN)
    remarks.append(f"objects are taken to be about {length / factor:.0f} pixels long (--object-size)")
    if factor != 1:
        remarks[-1] += f", on canvases {length:.0f} of {x.shape[1]}"
    report(remarks)
    parts = [Scenes(x[part], None if counts is None else counts[part]) for part in (slice(None, -n), slice(-n, None))]
    return *parts, digest(Scenes(x, counts)), length


def random_crops(images: list[np.ndarray], side: int, path: Path) -> np.ndarray:
    """Squares of images, uint8 `[CROPS, side, side]`, everywhere with the same chance, turned and mirrored."""
    images = [image for image in images if min(image.shape) >= side]
    if not images:
        raise DataError(f"--data {path}: no image is as large as a crop (--crop)")
    places = np.array([np.prod(np.subtract(image.shape, side - 1)) for image in images])
    rng, crops = np.random.default_rng(0), []
    for i in rng.choice(len(images), CROPS, p=places / places.sum()):
        top, left = (rng.integers(length - side + 1) for length in images[i].shape)
        crop = np.rot90(images[i][top : top + side, left : left + side], rng.integers(4))
        crops.append(crop[:, :: rng.choice([-1, 1])])
    return np.stack(crops)


def evaluation_scenes(checkpoint: dict, data_dir: Path) -> Scenes:
    """The test scenes of the run of a checkpoint, or the images that it held out of its own."""
    flags = checkpoint["flags"]
    if not flags["data"]:
        return load_split("test", data_dir)
    options = flags["invert"], flags["max_objects"], flags["crop"], flags["object_size"]
    _, scenes, sha256, _ = load_own_scenes(Path(flags["data"]), checkpoint["air"]["image_size"], *options)
    if sha256 != checkpoint["data_sha256"]:
        raise UsageError(f"{flags['data']} has other images than the run was trained on: evaluate on all, with --data")
    return scenes


def own_images(
    path: Path, invert: bool | None, size: int, object_size: float | None
) -> tuple[list[Canvas] | None, Scenes]:
    """A user's images to evaluate on: as canvases of any sizes, or None if they fit one of `size` exactly and nothing
    is said of their objects; and as scenes, which are empty otherwise, with their true counts."""
    canvases, counts, remarks = load_images(path, invert)
    report(remarks)
    if not object_size and {max(canvas.x.shape) for canvas in canvases} == {size}:
        return None, Scenes(np.stack([letterbox(canvas, size).x for canvas in canvases]), counts)
    return canvases, Scenes(np.zeros((0, size, size), np.uint8), counts)


def report(remarks: list[str]) -> None:
    """Print what a user may want to know, in one process."""
    if launched()[1] == 0:
        print("".join(f"{remark}\n" for remark in remarks), end="", file=sys.stderr)


def pose_prior(size: int, length: float) -> dict:
    """The prior on poses for objects of that length, on canvases of that size, in pixels."""
    s = size / (MARGIN * length)
    return {"z_where_loc": (s, 0.0, 0.0), "z_where_scale": (s / 15, s / 3, s / 3)}
