"""Count and find the objects in images of your own: files in, counts and boxes out.

The rule by which an image becomes one that AIR looks at: grey, light on dark (inverted if asked);
scaled, its shape kept, so that its longer side is the canvas's; its ground, the median grey, made
black, and what is darker as well, while white stays white; and centred on black. An image with an
orientation in its EXIF data is turned upright first, one with transparent parts is put on black (or, if
it is to be inverted, on white).
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import viz
from air import AIR
from multi_mnist import DataError, load_file, one_line


def predict(air: AIR, path: Path, invert: bool = False, folder: Path | None = None, batch_size: int = 32) -> list[dict]:
    """What is in the images at `path`: an image file, an .npz file (see `load_file`), or a folder of these.

    Returns a dictionary for each image, of plain values: file; index (within an .npz); count, the
    guide's most probable one; count_probability, what the guide gives it; boxes, `[x, y, w, h]` each,
    in pixels of the image as it was (they may reach beyond its edges). For a file that cannot be read:
    file and error. Nothing is sampled: see `AIR.infer`.

    folder: where to put a picture of each image with its boxes, if anywhere.
    """
    results = []
    files = (
        sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".") if path.is_dir() else [path]
    )
    images = itertools.chain.from_iterable(read_images(file, invert) for file in files)
    while batch := list(itertools.islice(images, batch_size)):
        results += [result for result, _ in batch]
        batch = [(result, image) for result, image in batch if image is not None]
        if not batch:
            continue
        canvases, places = zip(*(fit(image, air.image_size) for _, image in batch))
        seen = air.infer(np.stack(canvases), sample=False)
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
    return results


def read_images(path: Path, invert: bool) -> Iterator[tuple[dict, np.ndarray | None]]:
    """What is known of each image in a file, and itself (`[h, w]`, uint8 or floats in [0, 1]) if it can be read."""
    try:
        if path.suffix.lower() == ".npz":
            x = load_file(path).x
            if invert:
                x = (255 if x.dtype == np.uint8 else 1) - x
            for i in range(len(x)):
                yield {"file": path.name, "index": i}, x[i]
            return
        with Image.open(path) as image:
            x = to_grey(ImageOps.exif_transpose(image), ground=255 if invert else 0)
        yield {"file": path.name}, 255 - x if invert else x
    except DataError as error:
        yield {"file": path.name, "error": str(error)}, None
    except Exception as error:  # Whatever goes wrong in reading, the file is at fault.
        yield {"file": path.name, "error": one_line(error)}, None


def to_grey(image: Image.Image, ground: int) -> np.ndarray:
    """Any image as uint8 `[h, w]`."""
    if image.mode.startswith("I"):  # 16 bits, in all such files that we know of
        return (np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)
    if image.mode == "F":
        raise DataError("its pixels are floats, of which nobody knows what is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (ground, ground, ground, 255)), image)
    return np.asarray(image.convert("L"))


def fit(image: np.ndarray, size: int) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """The image on a canvas of `size` pixels; where its corner came to lie (x, y), and by what it was scaled (x, y)."""
    height, width = image.shape
    w, h = (max(1, round(side * size / max(height, width))) for side in (width, height))
    left, top = (size - w) // 2, (size - h) // 2
    canvas = np.zeros((size, size), np.float32)
    scaled = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
    scaled = scaled / 255 if image.dtype == np.uint8 else scaled.clip(0, 1)
    ground = np.median(scaled)
    if ground < 1:
        scaled = ((scaled - ground) / (1 - ground)).clip(0, 1)
    canvas[top : top + h, left : left + w] = scaled
    return canvas, (left, top, w / width, h / height)
