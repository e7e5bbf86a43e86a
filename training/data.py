"""The images that a run trains on: multi-MNIST, or a user's own, and how large the objects in them are."""

import sys
from pathlib import Path

from air import AIR
from images import load_canvases, object_size
from multi_mnist import DataError, Scenes, digest, load_split
from training.parallel import Processes, launched
from training.run import RunError

MARGIN = 1.15  # How much longer a window is than an object.


def load_scenes(args, checkpoint: dict | None, processes: Processes) -> tuple[Scenes, Scenes, Scenes, str]:
    """Training, validation and test scenes, and the checksum of what they were taken from."""
    # On each machine one process comes first: it may have to fetch and compose the scenes.
    if processes.local_rank > 0:
        processes.barrier()
    if args.data:
        size = checkpoint["air"]["image_size"] if checkpoint else None
        train_scenes, held_out, sha256 = load_own_scenes(args.data, args, size, args.invert)
        scenes = train_scenes, held_out, held_out, sha256
    else:
        splits = [load_split(split, args.data_dir) for split in ("train", "validation", "test")]
        scenes = *splits, digest(splits[0])
    if processes.local_rank == 0:
        processes.barrier()
    if len(scenes[0].x) < processes.world_size:
        raise RunError(f"too few images for {processes.world_size} processes: {len(scenes[0].x)}")
    return scenes


def load_own_scenes(path: Path, args, size: int | None, invert: bool | None) -> tuple[Scenes, Scenes, str]:
    """A user's images: all but the last tenth, that tenth, which is held out, and the checksum of all."""
    if args.load and not path.exists():
        hint = "--eval-only --data PATH evaluates on all images there" if args.eval_only else "--data names their place"
        raise RunError(f"no such file or folder: {path}, where the run's images were; {hint}")
    scenes = own_canvases(path, size, invert)
    n = len(scenes.x) // 10
    if n == 0:
        raise DataError(f"--data {path}: too few images to hold out a tenth: {len(scenes.x)}")
    if scenes.counts is not None and (most := scenes.counts.max()) > args.model_steps:
        raise RunError(
            f"--model-steps {args.model_steps}: there are images with {most} objects; give -t {most} or more"
        )
    parts = (
        Scenes(scenes.x[part], None if scenes.counts is None else scenes.counts[part])
        for part in (slice(None, -n), slice(-n, None))
    )
    return *parts, digest(scenes)


def own_canvases(path: Path, size: int | None, invert: bool | None) -> Scenes:
    """The images of a file or a folder as the model takes them; says what a user may want to know of them."""
    scenes, remarks = load_canvases(path, size, invert)
    if launched()[1] == 0:
        print("".join(f"{remark}\n" for remark in remarks), end="", file=sys.stderr)
    return scenes


def pose_prior(args, scenes: Scenes, processes: Processes) -> dict:
    """The prior on poses, where it is not multi-MNIST's: for objects as long as --object-size says, or as they seem."""
    size, length = scenes.x.shape[1], args.object_size
    if length is None:
        if not args.data:
            return {}
        length = object_size(scenes.x)
        if length is None:
            raise DataError(f"--data {args.data}: the images are all empty")
        length = min(length, size / MARGIN)
    elif length < 1:
        length *= size
    if length * MARGIN > size:
        raise RunError(
            f"--object-size {args.object_size}: with a margin, that is larger than the canvas of {size} pixels"
        )
    if processes.is_main:
        print(f"objects are taken to be about {length:.0f} of {size} pixels long (--object-size)", file=sys.stderr)
    s = size / (MARGIN * length)
    return {"z_where_loc": (s, 0.0, 0.0), "z_where_scale": (s / 15, s / 3, s / 3)}


def check_size(scenes: Scenes, air: AIR) -> None:
    if (size := scenes.x.shape[1]) != air.image_size:
        raise RunError(f"images are {size} pixels wide or high, the model's canvas is {air.image_size}")
