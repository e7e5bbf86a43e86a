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

import images
import viz
from air import AIR, MAX_OBJECTS
from evaluation import ReferenceStats, out_of_distribution
from inference import MOST_OBJECTS, explain
from multi_mnist import DataError, one_line
from training.checkpoint import build_air, read_checkpoint, read_reference
from training.options import UsageError, one_line_errors, positive

TOGETHER = 128  # images that are looked at at once
UNSURE = 0.9  # A count with a smaller probability is reported as in doubt.


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder or checkpoint")
    parser.add_argument("images", type=Path, metavar="IMAGES", help="an image, an .npz, or a folder of them")
    text = f"most objects looked for (default: {MOST_OBJECTS}; with the RNN guide the run's own)"
    parser.add_argument("-t", "--max-objects", type=positive(int, MAX_OBJECTS), metavar="T", help=text)
    text = "whether the images are dark on light (default: detected for each image)"
    parser.add_argument("--invert", action=argparse.BooleanOptionalAction, help=text)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to put a picture of each image with its boxes")
    failed = 0
    with one_line_errors("predict.py"):
        args = parser.parse_args(argv)
        files = images.files_in(args.images)
        checkpoint, path = read_checkpoint(args.run)
        air, reference = build_air(checkpoint, path), read_reference(checkpoint, path)
        if reference is None:
            text = (
                "of a run that is not finished: it gives no probabilities, nor warnings of what is unlike its training"
            )
            print(f"{path} is {text}", file=sys.stderr)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            if any(args.out.iterdir()):
                raise UsageError(f"--out {args.out} already exists and is not empty; name another folder")
        print("[", end="")
        try:
            for i, result in enumerate(predict(air, files, reference, args.invert, args.out, args.max_objects)):
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
    reference: ReferenceStats | None = None,
    invert: bool | None = None,
    folder: Path | None = None,
    max_objects: int | None = None,
) -> Iterator[dict]:
    """What is in the images in some files, see `images.read_file`.

    Yields a dictionary for each image, of plain values: file; index, if there are several in it; count; probability,
    that of the count (None if it is not known, see `evaluation.calibrate`); explained, the share of the ink that it
    accounts for; log_weight, its evidence in nats, see `inference.explain`; boxes, `[x, y, w, h]` each, in pixels of
    the image as it was (they may reach beyond its edges); and warning, with what speaks against the count (it is None
    if nothing can be told). For a file that cannot be read, and for a picture that cannot be written: file and error.
    Nothing depends on chance, nor on other images. What was done to a file's images is reported on stderr.

    reference: what ordinary scenes look like, and the temperature of probabilities; without it there are neither
        probabilities nor warnings of what is unlike such scenes.
    invert: whether the images are dark on light; None finds it out for each image.
    folder: where to put a picture of each image with its boxes, if anywhere.
    max_objects: T, the most objects that can be found, see `inference.explain`.
    """
    all_images = itertools.chain.from_iterable(
        canvases_of(file, air.image_size, invert, bool(folder)) for file in files
    )
    some = np.zeros((0, air.image_size, air.image_size), np.uint8)
    while batch := list(itertools.islice(all_images, TOGETHER)):
        readable = [image for image in batch if "error" not in image[0]]
        if readable:
            some = np.concatenate([some, count_and_find(air, readable, reference, folder, max_objects)])[:1000]
        yield from (result for result, *_ in batch)
    if images.has_fixed_ink(some):
        print(images.FIXED_INK, file=sys.stderr)


def canvases_of(file: Path, size: int, invert: bool | None, draw: bool) -> Iterator[tuple]:
    """Of each image in a file: what is known of it, itself if it will be drawn, its canvas, place, doubt and floor."""
    try:
        blocks, _, remarks = images.read_file(file)
        canvases = images.to_canvases(blocks, size, invert)
    except DataError as error:
        yield {"file": file.name, "error": one_line(error)}, None, None, None, None, None
        return
    for remark in [*remarks, *canvases.remarks]:
        print(f"{one_line(file.name)}: {remark}", file=sys.stderr)
    several = len(canvases.x) > 1 or file.suffix.lower() == ".npz"
    originals = (image if draw else None for block in blocks for image in block)
    for i, (image, *rest) in enumerate(zip(originals, canvases.x, canvases.places, canvases.doubts, canvases.floors)):
        yield {"file": file.name} | ({"index": i} if several else {}), image, *rest


def count_and_find(
    air: AIR, batch: list[tuple], reference: ReferenceStats | None, folder: Path | None, max_objects: int | None
) -> np.ndarray:
    """Add to what is known of each image what is in it; draw it, if there is a folder for the pictures.

    Returns the canvases, uint8 `[n, h, h]`.
    """
    x = np.stack([canvas for _, _, canvas, *_ in batch])
    seen = explain(air, x, max_objects)
    temperature = reference and reference.temperature
    probs = seen.count_probs(temperature or 1.0)
    seen = [part.cpu().numpy() for part in (seen.counts, probs, seen.boxes, seen.log_weight, seen.explained)]
    for (result, image, canvas, place, doubt, floor), length, count, probs, boxes, log_weight, explained in zip(
        batch, images.largest_component_length(x), *seen
    ):
        if doubt in images.EMPTY:
            result |= {"count": None, "probability": None, "explained": None, "log_weight": None, "boxes": []}
            result["warning"] = doubt
            continue
        count, boxes = int(count), boxes[:count]
        signs, probability = [doubt] if doubt else [], None
        if reference:
            signs += out_of_distribution(reference, count, log_weight, explained, length)
        if temperature:
            probability = round(float(probs[count]), 3)
            if probability < UNSURE:
                likely = [n for n in np.argsort(-probs) if probs[n] > 0.05]
                shares = ", ".join(f"{probs[n]:.0%}" for n in likely)
                signs.append(f"{' or '.join(map(str, likely))} objects: {shares}")
        if count == len(probs) - 1:
            signs.append(f"all {count} steps were used, there may be more objects (-t)")
        elif images.has_unexplained_ink(canvas, boxes, floor):
            signs.append("there is something where nothing was found")
        left, top, across, down = place
        boxes = (boxes - [left, top, 0, 0]) / [across, down, across, down]
        result |= {"count": count, "probability": probability, "explained": round(float(explained), 2)}
        result |= {"log_weight": round(float(log_weight), 2), "boxes": boxes.round(2).tolist()}
        if signs:
            result["warning"] = "; ".join(signs)
        if folder:
            name = "-".join(str(result[key]) for key in ("file", "index") if key in result)
            try:
                picture = viz.draw_scene(image / np.float32(images.white_of(image)), boxes, f"{count}")
                with open(folder / f"{name}.png", "xb") as file:  # not in place of another image's
                    file.write(viz.png(picture))
            except OSError as error:
                result["error"] = f"its picture cannot be written: {error.strerror or error}"
    return x


if __name__ == "__main__":
    main()
