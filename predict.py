"""Count and find the objects in images of your own, with an AIR that main.py trained.

    python predict.py runs/NAME IMAGES               # one JSON object for each image
    python predict.py runs/NAME IMAGES --out DIR     # and a picture of each, with the boxes

IMAGES is an image file, an `.npz` file with an array `x`, or a folder of these; images.py says how they are read.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import viz
from air import AIR, MAX_STEPS, to_images
from evaluation import Usual, unusual
from images import EMPTY, files_in, largest_objects, left_out, read_file, to_canvases, white_of
from multi_mnist import DataError, one_line
from training.checkpoint import build_air, read_checkpoint, read_usual
from training.options import UsageError, one_line_errors, positive

MOST_OBJECTS = 8  # that are looked for, if not more in training: the residual guide finds more than it was shown


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
        help=f"most objects looked for (default: {MOST_OBJECTS}; with the RNN guide the run's own)",
    )
    parser.add_argument(
        "--invert",
        action=argparse.BooleanOptionalAction,
        help="whether the images are dark on light (default: detected for each file)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to put a picture of each image with its boxes")
    args = parser.parse_args(argv)
    failed = 0
    with one_line_errors("predict.py"):
        files = files_in(args.images)
        checkpoint, path = read_checkpoint(args.run)
        air, usual = build_air(checkpoint, path), read_usual(checkpoint, path)
        if usual is None:
            print(f"{path} has seen no evaluation: what is unlike its training is not noticed", file=sys.stderr)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            if any(args.out.iterdir()):
                raise UsageError(f"--out {args.out} already exists and is not empty; name another folder")
        most = max(MOST_OBJECTS, air.num_steps) if air.config["guide"] == "residual" else air.num_steps
        print("[", end="")
        results = predict(air, files, usual, args.invert, args.out, args.model_steps or most)
        try:
            for i, result in enumerate(results):
                print(",\n " if i else "", json.dumps(result), sep="", end="", flush=True)
                name = one_line(result["file"]) + (f" {result['index']}" if "index" in result else "")
                failed += "error" in result
                for kind in ("warning", "error"):
                    if kind in result:
                        print(f"{name}: {kind}: {one_line(result[kind])}", file=sys.stderr)
        finally:
            print("]")  # Interrupted as well, it leaves a whole list.
    sys.exit(1 if failed else 0)


def predict(
    air: AIR,
    files: list[Path],
    usual: Usual | None = None,
    invert: bool | None = None,
    folder: Path | None = None,
    num_steps: int | None = None,
    batch_size: int = 32,
) -> Iterator[dict]:
    """What is in the images in some files, see `images.read_file`.

    Yields a dictionary for each image, of plain values: file; index, if there are several in it; count;
    count_probability, what the guide gives it; explained, the share of the ink that it accounts for; elbo, in nats;
    boxes, `[x, y, w, h]` each, in pixels of the image as it was (they may reach beyond its edges); and warning, with
    what speaks against the count (it is None if nothing can be told). For a file that cannot be read, and for a picture
    that cannot be written: file and error. Nothing depends on chance; it is the best of several looks, see
    `AIR.explain`. What was done to a file's images is said on stderr.

    usual: what ordinary scenes look like, see `evaluation.Usual`; without it there are no warnings.
    invert: whether the images are dark on light; None finds it out for each file.
    folder: where to put a picture of each image with its boxes, if anywhere.
    num_steps: T, the most objects that can be found, if not as many as in training.
    """
    images = itertools.chain.from_iterable(
        canvases_of(file, air.image_size, invert, folder is not None) for file in files
    )
    while batch := list(itertools.islice(images, batch_size)):
        readable = [image for image in batch if "error" not in image[0]]
        if readable:
            count_and_find(air, readable, usual, folder, num_steps)
        yield from (result for result, *_ in batch)


def canvases_of(file: Path, size: int, invert: bool | None, draw: bool) -> Iterator[tuple]:
    """Of each image in a file: what is known of it, itself if it will be drawn, its canvas and place there, a doubt."""
    try:
        blocks, _ = read_file(file)
        canvases = to_canvases(blocks, size, invert)
    except DataError as error:
        yield {"file": file.name, "error": one_line(error)}, None, None, None, None
        return
    for remark in canvases.remarks:
        print(f"{one_line(file.name)}: {remark}", file=sys.stderr)
    several = len(canvases.x) > 1 or file.suffix.lower() == ".npz"
    images = ((image, white_of(block)) if draw else None for block in blocks for image in block)
    for i, (image, *canvas) in enumerate(zip(images, canvases.x, canvases.places, canvases.doubts)):
        yield {"file": file.name} | ({"index": i} if several else {}), image, *canvas


def count_and_find(
    air: AIR, batch: list[tuple], usual: Usual | None, folder: Path | None, num_steps: int | None
) -> None:
    """Add to what is known of each image what is in it; draw it, if there is a folder for the pictures."""
    x = np.stack([canvas for _, _, canvas, _, _ in batch])
    seen = air.explain(to_images(x), sample=False, num_steps=num_steps, looks=air.attend.looks)
    parts = (seen.counts, seen.count_probs, seen.boxes, seen.elbo, seen.explained)
    seen = [part.cpu().numpy() for part in parts]
    for (result, image, canvas, place, doubt), largest, count, probs, boxes, elbo, explained in zip(
        batch, largest_objects(x), *seen
    ):
        if doubt in EMPTY:
            result |= {"count": None, "count_probability": None, "explained": None, "elbo": None, "boxes": []}
            result["warning"] = doubt
            continue
        count, boxes = int(count), boxes[:count]
        signs = [doubt] if doubt else []
        if usual:
            signs += unusual(usual, count, elbo, explained, largest)
        if count == len(probs) - 1:
            signs.append(f"all {count} steps were used, there may be more objects (-t)")
        elif left_out(canvas, boxes):
            signs.append("there is something where nothing was found")
        left, top, across, down = place
        boxes = (boxes - [left, top, 0, 0]) / [across, down, across, down]
        result |= {"count": count, "count_probability": float(probs[count])}
        result |= {"explained": float(explained), "elbo": float(elbo), "boxes": boxes.round(2).tolist()}
        if signs:
            result["warning"] = "; ".join(signs)
        if folder:
            name = "-".join(str(result[key]) for key in ("file", "index") if key in result)
            try:
                picture = viz.draw_scene(image[0] / np.float32(image[1]), boxes, f"{count} ({probs[count]:.1%})")
                with open(folder / f"{name}.png", "xb") as file:  # not in place of another image's
                    file.write(viz.png(picture))
            except OSError as error:
                result["error"] = f"its picture cannot be written: {error.strerror or error}"


if __name__ == "__main__":
    main()
