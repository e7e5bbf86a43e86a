"""Count and find the objects in images of your own, of any size, with an AIR that main.py trained.

    python predict.py runs/NAME IMAGES               # one JSON object for each image
    python predict.py runs/NAME IMAGES --csv FILE    # and a line for each object
    python predict.py runs/NAME IMAGES --out DIR     # and a picture of each image, with the boxes

IMAGES is an image file, an `.npz` file with an array `x`, or a folder of these; images.py says how they are read.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import images
import viz
from air import AIR
from evaluation import ReferenceStats, find_at_scale, out_of_distribution
from multi_mnist import DataError, one_line
from patches import Found
from training.checkpoint import build_air, read_checkpoint, read_reference
from training.options import UsageError, one_line_errors, positive

TOGETHER = 128, 2**22  # at most so many images are looked at at once, and pixels, but for a larger image
UNSURE = 0.9  # A count with a smaller probability is reported as in doubt.
COLUMNS = "file index x y w h probability".split()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder or checkpoint")
    parser.add_argument("images", type=Path, metavar="IMAGES", help="an image, an .npz, or a folder of them")
    text = "length of an object, or file: the same for all images of a file (default: estimated for each image)"
    parser.add_argument("--object-size", type=object_size, metavar="PIXELS|file", help=text)
    text = "whether the images are dark on light (default: detected for each image)"
    parser.add_argument("--invert", action=argparse.BooleanOptionalAction, help=text)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where to write a table of all objects")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to put a picture of each image with its boxes")
    failed = 0
    with one_line_errors("predict.py"):
        args = parser.parse_args(argv)
        files = images.files_in(args.images)
        checkpoint, path = read_checkpoint(args.run)
        air, reference = build_air(checkpoint, path), read_reference(checkpoint, path)
        if reference is None:
            missing = "it gives no probabilities, nor warnings of what is unlike its training"
            print(f"{path} is of a run that is not finished: {missing}", file=sys.stderr)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            if any(args.out.iterdir()):
                raise UsageError(f"--out {args.out} already exists and is not empty; name another folder")
        if args.csv and args.csv.exists():
            raise UsageError(f"--csv {args.csv} already exists; name another file")
        with open(args.csv or os.devnull, "w", newline="", encoding="utf-8", errors="surrogateescape") as table:
            rows = csv.writer(table)
            rows.writerow(COLUMNS)
            print("[", end="")
            try:
                results = predict(air, files, reference, args.invert, args.out, args.object_size)
                for i, result in enumerate(results):
                    print(",\n " if i else "", json.dumps(result), sep="", end="", flush=True)
                    place = result["file"], result.get("index", "")
                    objects = zip(result.get("boxes", ()), result.get("probabilities", ()))
                    rows.writerows([*place, *box, probability] for box, probability in objects)
                    name = one_line(result["file"]) + (f" {result['index']}" if "index" in result else "")
                    failed += "error" in result
                    for kind in ("warning", "error"):
                        if kind in result:
                            print(f"{name}: {kind}: {one_line(result[kind])}", file=sys.stderr)
            finally:
                print("]")  # Interrupted as well, it leaves a whole list.
    sys.exit(1 if failed else 0)


def object_size(text: str) -> float | str:
    """An argparse type."""
    return text if text == "file" else positive(float)(text)


object_size.__name__ = "file, or number greater than 0"


def predict(
    air: AIR,
    files: list[Path],
    reference: ReferenceStats | None = None,
    invert: bool | None = None,
    folder: Path | None = None,
    object_size: float | str | None = None,
) -> Iterator[dict]:
    """What is in the images in some files, see `images.read_file`.

    Yields a dictionary for each image, of plain values; docs/images.md says what is in it. Boxes are `[x, y, w, h]`, in
    pixels of the image as it was. A file that cannot be read, or a picture that cannot be written, has an "error".
    Nothing depends on chance, nor on other images. What was done to a file's images is reported on stderr.

    reference: what ordinary scenes look like, and the temperature of probabilities; without it there are neither
        probabilities nor warnings of what is unlike such scenes.
    invert: whether the images are dark on light; None finds it out for each image.
    folder: where to put a picture of each image with its boxes, if anywhere.
    object_size: how long an object is, in pixels; "file": the same in all images of a file; None: each has its own.
    """
    some = {}  # of each size, at most a thousand, and a hundred million pixels
    for batch in batches(image for file in files for image in canvases_of(file, invert, object_size)):
        readable = [image for image in batch if image[2]]
        seen = find_at_scale(air, [canvas for _, _, canvas, _ in readable], [length for *_, length in readable])
        for (result, original, canvas, _), (found, at_scale, in_doubt) in zip(readable, seen):
            describe(result, found, canvas, at_scale, in_doubt, reference)
            if folder and result["count"] is not None:
                draw(result, original, folder)
            same = some.setdefault(canvas.x.shape, [])
            if len(same) < min(1000, 1e8 / canvas.x.size):
                same.append(canvas.x)
        yield from (result for result, *_ in batch)
    if any(images.has_fixed_ink(np.stack(same)) for same in some.values()):
        print(images.FIXED_INK, file=sys.stderr)


def batches(all_images: Iterator[tuple]) -> Iterator[list[tuple]]:
    """Images in lists of at most TOGETHER."""
    batch, pixels = [], 0
    for image in all_images:
        size = image[2].x.size if image[2] else 0
        if batch and (len(batch) == TOGETHER[0] or pixels + size > TOGETHER[1]):
            yield batch
            batch, pixels = [], 0
        batch.append(image)
        pixels += size
    if batch:
        yield batch


def canvases_of(file: Path, invert: bool | None, object_size: float | str | None) -> Iterator[tuple]:
    """Of each image in a file: what is known of it, itself, its canvas, and how long its objects are, if known."""
    try:
        originals, _, remarks = images.read_file(file)
        canvases = [images.to_canvas(image, invert) for image in originals]
    except DataError as error:
        yield {"file": file.name, "error": one_line(error)}, None, None, None
        return
    if object_size == "file":
        lengths = np.concatenate([images.piece_lengths(canvas.x) for canvas in canvases])
        object_size = float(np.median(lengths)) if len(lengths) else None
        remarks = [*remarks, f"its objects are taken to be {object_size or 0:.0f} pixels long"]
    for remark in [*remarks, *images.remarks_on(canvases)]:
        print(f"{one_line(file.name)}: {remark}", file=sys.stderr)
    several = len(canvases) > 1 or file.suffix.lower() == ".npz"
    for i, (image, canvas) in enumerate(zip(originals, canvases)):
        yield {"file": file.name} | ({"index": i} if several else {}), image, canvas, object_size


def describe(
    result: dict, found: Found, canvas: images.Canvas, at_scale: images.Canvas, in_doubt: bool, reference
) -> None:
    """Add to what is known of an image what was found in it, at some scale."""
    if canvas.doubt == images.LOW:
        result |= dict.fromkeys(("count", "probability", "explained", "log_weight", "scale"))
        result |= {"boxes": [], "probabilities": [], "warning": canvas.doubt}
        return
    (left, top, across, down), windows = at_scale.place, found.boxes.cpu().numpy()
    temperature = reference and reference.temperature
    probs = found.count_probs(temperature) if temperature else None
    result |= {
        "count": found.count,
        "probability": round(float(probs[found.count]), 3) if temperature else None,
        "explained": round(found.explained, 2),
        "log_weight": round(found.log_weight, 2),
        "scale": round(across, 3),
        "boxes": ((windows - [left, top, 0, 0]) / [across, down, across, down]).round(2).tolist(),
        "probabilities": found.object_probs(temperature).round(3).tolist() if temperature else [None] * found.count,
    }
    signs = [canvas.doubt] if canvas.doubt else []
    if in_doubt:
        signs.append("how large its objects are is in doubt (--object-size)")
    if reference:
        signs += out_of_distribution(reference, found.count, found.log_weight, found.explained)
    if temperature and result["probability"] < UNSURE:
        likely = [n for n in np.argsort(-probs)[:5] if probs[n] > 0.05]
        shares = ", ".join(f"{probs[n]:.0%}" for n in likely)
        signs.append(f"{' or '.join(map(str, likely))} objects: {shares}")
    if found.is_full:
        signs.append("there may be more objects, too close to one another")
    elif images.has_unexplained_ink(at_scale.x, windows, canvas.floor):
        signs.append("there is something where nothing was found")
    if signs:
        result["warning"] = "; ".join(signs)


def draw(result: dict, image: np.ndarray, folder: Path) -> None:
    """Write a picture of an image with its boxes, not in place of another's."""
    name = "-".join(str(result[key]) for key in ("file", "index") if key in result)
    try:
        picture = viz.draw_boxes(image / np.float32(images.white_of(image)), result["boxes"])
        with open(folder / f"{name}.png", "xb") as file:
            file.write(viz.png(picture))
    except OSError as error:
        result["error"] = f"its picture cannot be written: {error.strerror or error}"


if __name__ == "__main__":
    main()
