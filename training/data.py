"""The images that a run trains on: multi-MNIST, or a user's own, and how large the objects in them are."""

import sys
from pathlib import Path

import numpy as np

from images import estimate_object_size, load_canvases
from multi_mnist import DataError, Scenes, digest, load_split
from training.parallel import Processes, launched
from training.run import UsageError

MARGIN = 1.15  # How much longer a window is than an object.


def load_scenes(
    data: Path | None, data_dir: Path, size: int | None, invert: bool | None, max_objects: int, processes: Processes
) -> tuple[Scenes, Scenes, Scenes, str]:
    """Training, validation and test scenes, and the checksum of what they were taken from.

    data: a user's images, if not multi-MNIST. size: of the canvas, if it is known.
    """
    # On each machine one process comes first: it may have to fetch MNIST.
    if processes.local_rank > 0:
        processes.barrier()
    if data:
        train, held_out, sha256 = load_own_scenes(data, size, invert, max_objects)
        scenes = train, held_out, held_out, sha256
    else:
        splits = [load_split(split, data_dir) for split in ("train", "validation", "test")]
        scenes = *splits, digest(splits[0])
    if processes.local_rank == 0:
        processes.barrier()
    return scenes


def load_own_scenes(path: Path, size: int | None, invert: bool | None, max_objects: int) -> tuple[Scenes, Scenes, str]:
    """A user's images: all but the last tenth, that tenth, which is held out, and the checksum of all."""
    scenes = own_canvases(path, size, invert)
    n = len(scenes.x) // 10
    if n == 0:
        raise DataError(f"--data {path}: too few images to hold out a tenth: {len(scenes.x)}")
    if scenes.counts is not None and (most := scenes.counts.max()) > max_objects:
        raise UsageError(f"--max-objects {max_objects}: there are images with {most} objects; give -t {most} or more")
    parts = (
        Scenes(scenes.x[part], None if scenes.counts is None else scenes.counts[part])
        for part in (slice(None, -n), slice(-n, None))
    )
    return *parts, digest(scenes)


def evaluation_scenes(
    data: Path | None, data_dir: Path, invert: bool | None, checkpoint: dict, size: int
) -> tuple[str, Scenes]:
    """What --eval-only evaluates on, and what that is called: all images of `data`, or the run's test scenes."""
    flags = checkpoint["flags"]
    if data:
        return "data", own_canvases(data, size, invert)
    if not flags["data"]:
        return "test", load_split("test", data_dir)
    _, scenes, sha256 = load_own_scenes(Path(flags["data"]), size, flags["invert"], flags["max_objects"])
    if sha256 != checkpoint["data_sha256"]:
        raise UsageError(f"{flags['data']} has other images than the run was trained on: evaluate on all, with --data")
    return "test", scenes


def own_canvases(path: Path, size: int | None, invert: bool | None) -> Scenes:
    """The images of a file or a folder as the model takes them; prints what a user may want to know of them."""
    scenes, remarks = load_canvases(path, size, invert)
    if launched()[1] == 0:
        print("".join(f"{remark}\n" for remark in remarks), end="", file=sys.stderr)
    return scenes


def pose_prior(x: np.ndarray, object_size: float | None) -> dict:
    """The prior on poses for objects of that length (in pixels, or as a share if below 1) on canvases `x` `[n, h, h]`.

    None: as long as the objects on the canvases seem to be.
    """
    size, length = x.shape[1], object_size
    if length is None:
        length = estimate_object_size(x)
        if length is None:
            raise DataError("--data: the images are all empty")
        length = min(length, size / MARGIN)
    elif length < 1:
        length *= size
    if length * MARGIN > size:
        raise UsageError(f"--object-size {object_size}: with a margin, that is larger than the canvas of {size} pixels")
    if launched()[1] == 0:
        print(f"objects are taken to be about {length:.0f} of {size} pixels long (--object-size)", file=sys.stderr)
    s = size / (MARGIN * length)
    return {"z_where_loc": (s, 0.0, 0.0), "z_where_scale": (s / 15, s / 3, s / 3)}
