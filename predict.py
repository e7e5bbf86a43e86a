"""Count and find the objects in images of your own, with an AIR that main.py trained.

    python predict.py runs/NAME IMAGES               # one JSON object for each image
    python predict.py runs/NAME IMAGES --out DIR     # and a picture of each, with the boxes

IMAGES is an image file, an `.npz` file with an array `x` (see images.py), or a folder of these.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import viz
from air import AIR, MAX_STEPS
from images import letterbox, read_images
from multi_mnist import one_line
from training.checkpoint import load_air
from training.options import UsageError, one_line_errors, positive

MOST_OBJECTS = 8  # that are looked for, whatever the run was trained with: its guide needs no other to find them


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Count and find the objects in images of your own.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder or checkpoint")
    parser.add_argument("images", type=Path, metavar="IMAGES", help="an image, an .npz, or a folder of them")
    parser.add_argument(
        "-t",
        "--model-steps",
        type=positive(int, MAX_STEPS),
        metavar="T",
        help="most objects looked for (default: 8)",
    )
    parser.add_argument("--invert", action="store_true", help="the images are dark on light")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to put a picture of each image with its boxes")
    args = parser.parse_args(argv)
    failed = 0
    with one_line_errors("predict.py"):
        if not args.images.exists():
            raise UsageError(f"no such file or folder: {args.images}")
        air = load_air(args.run)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            if any(args.out.iterdir()):
                raise UsageError(f"--out {args.out} already exists and is not empty; name another folder")
        most = max(MOST_OBJECTS, air.num_steps) if air.config["guide"] == "residual" else air.num_steps
        print("[", end="")
        for i, result in enumerate(predict(air, args.images, args.invert, args.out, args.model_steps or most)):
            print(",\n " if i else "", json.dumps(result), sep="", end="")
            if "error" in result:
                failed += 1
                print(f"{result['file']}: {one_line(result['error'])}", file=sys.stderr)
        print("]")
    sys.exit(1 if failed else 0)


def predict(
    air: AIR,
    path: Path,
    invert: bool = False,
    folder: Path | None = None,
    num_steps: int | None = None,
    batch_size: int = 32,
) -> Iterator[dict]:
    """What is in the images at `path`: an image file, an .npz file (see `images.load_arrays`), or a folder of these.

    Yields a dictionary for each image, of plain values: file; index (within an .npz); count, the guide's most probable
    one; count_probability, what the guide gives it; boxes, `[x, y, w, h]` each, in pixels of the image as it was (they
    may reach beyond its edges). For a file that cannot be read: file and error. Nothing is sampled; it is the best of
    several looks, see `AIR.infer`.

    folder: where to put a picture of each image with its boxes, if anywhere.
    num_steps: T, the most objects that can be found, if not as many as in training.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
    images = itertools.chain.from_iterable(read_images(file, invert) for file in files)
    while batch := list(itertools.islice(images, batch_size)):
        readable = [(result, image) for result, image in batch if image is not None]
        if readable:
            count_and_find(air, readable, folder, num_steps)
        yield from (result for result, _ in batch)


def count_and_find(air: AIR, batch: list[tuple[dict, np.ndarray]], folder: Path | None, num_steps: int | None) -> None:
    """Add to what is known of each image what is in it; draw it, if there is a folder for the pictures."""
    canvases, places = zip(*(letterbox(image, air.image_size) for _, image in batch))
    seen = air.infer(np.stack(canvases), sample=False, num_steps=num_steps, looks=air.attend.looks)
    probs, boxes = seen.count_probs.cpu().numpy(), seen.boxes.cpu().numpy()
    for (result, image), (left, top, across, down), prob, box in zip(batch, places, probs, boxes):
        count = int(prob.argmax())
        # The windows of all steps are valid up to any count: the guide takes every step.
        box = (box[:count] - [left, top, 0, 0]) / [across, down, across, down]
        result |= {"count": count, "count_probability": float(prob[count]), "boxes": box.round(2).tolist()}
        if folder:
            name = "-".join(str(result[key]) for key in ("file", "index") if key in result)
            picture = viz.draw_scene(image, box, f"{count} ({prob[count]:.1%})")
            Image.fromarray(picture).save(folder / f"{name}.png")


if __name__ == "__main__":
    main()
