"""Images of one's own, as the model takes them: light on black, square, uint8 or floats in [0, 1].

Training and evaluation read `.npz` files (`load_canvases`); prediction reads these and image files
of any kind (`read_images`), and puts each on a canvas by one rule (`letterbox`).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from multi_mnist import LARGEST_FILE, DataError, Scenes, one_line, open_arrays


def load_arrays(path) -> Scenes:
    """A user's own `.npz`: `x`, uint8 or floats in [0, 1], `[n, h, w]`, and perhaps `counts` `[n]`.

    Raises DataError, with one line that says what is wrong, unless the file holds just that.
    """
    try:
        with open_arrays(path) as file:
            names = file.files
            x = file["x"] if "x" in names else None
            counts = file["counts"] if "counts" in names else None
            if not all(isinstance(array, np.ndarray | None) for array in (x, counts)):
                raise ValueError("what is in it is not an array")
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, expected an .npz file with the images in an array 'x'") from None
    except Exception as error:  # Whatever else goes wrong in reading, the file is at fault.
        raise DataError(f"{path} is not a readable .npz file of plain arrays: {one_line(error)}") from None
    if x is None:
        raise DataError(f"{path} has no array 'x', only {', '.join(map(repr, names[:5])) or 'nothing'}")
    if x.ndim != 3 or not x.size:
        raise DataError(f"images in {path} have shape {list(x.shape)}, expected [n, h, w], none of them 0")
    if x.dtype != np.uint8:
        if x.dtype.kind != "f":
            raise DataError(f"images in {path} are {x.dtype}, expected uint8 or floats in [0, 1]")
        if not (x.min() >= 0 and x.max() <= 1):  # false for NaN as well
            raise DataError(f"images in {path} have values outside [0, 1], or NaN")
        x = x.astype(np.float32)
    if counts is not None:
        if counts.shape != (len(x),) or counts.dtype.kind not in "iu" or counts.min() < 0 or counts.max() > 1000:
            raise DataError(f"counts in {path} must be {len(x)} whole numbers from 0 to 1,000, one per image")
        counts = counts.astype(np.int64)
    return Scenes(x, counts)


def load_canvases(path) -> Scenes:
    """`load_arrays`'s images as the model takes them: `[n, h, h]`, padded with black where they are not square."""
    scenes = load_arrays(path)
    n, *sides = scenes.x.shape
    size = max(sides)
    if n * size**2 * scenes.x.itemsize > LARGEST_FILE:
        raise DataError(f"images in {path} are too many to make square: {n:,} of {size:,} pixels a side")
    if sides == [size, size]:
        return scenes
    margins = [((size - side) // 2, (size - side + 1) // 2) for side in sides]
    return scenes._replace(x=np.pad(scenes.x, [(0, 0), *margins]))


def read_images(path: Path, invert: bool) -> Iterator[tuple[dict, np.ndarray | None]]:
    """What is known of each image in a file, and itself (`[h, w]`, uint8 or floats in [0, 1]) if it can be read."""
    try:
        if path.suffix.lower() == ".npz":
            x = load_arrays(path).x
            if invert:
                x = (255 if x.dtype == np.uint8 else 1) - x
            for i in range(len(x)):
                yield {"file": path.name, "index": i}, x[i]
            return
        with Image.open(path) as image:
            x = to_grey(ImageOps.exif_transpose(image), background=255 if invert else 0)
        yield {"file": path.name}, 255 - x if invert else x
    except Exception as error:  # Whatever goes wrong in reading, the file is at fault.
        yield {"file": path.name, "error": one_line(error)}, None


def to_grey(image: Image.Image, background: int) -> np.ndarray:
    """Any image as uint8 `[h, w]`, transparent parts on a background of that grey."""
    if image.mode.startswith("I"):  # 16 bits, in all such files that we know of
        return (np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)
    if image.mode == "F":
        raise DataError("its pixels are floats, of which nobody knows what is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        grey = (background, background, background, 255)
        image = Image.alpha_composite(Image.new("RGBA", image.size, grey), image)
    return np.asarray(image.convert("L"))


def letterbox(image: np.ndarray, size: int) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """An image `[h, w]` as a canvas, float32 `[size, size]`, and where it came to lie.

    Scaled, its shape kept, so that its longer side is the canvas's; its background, the median grey, made
    black, and what is darker as well, while white stays white; and centred on black. With the canvas come
    the place of the image's corner (x, y) in canvas pixels, and by what it was scaled (x, y).
    """
    height, width = image.shape
    w, h = (max(1, round(side * size / max(height, width))) for side in (width, height))
    left, top = (size - w) // 2, (size - h) // 2
    canvas = np.zeros((size, size), np.float32)
    scaled = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
    scaled = scaled / 255 if image.dtype == np.uint8 else scaled.clip(0, 1)
    background = np.median(scaled)
    if background < 1:
        scaled = ((scaled - background) / (1 - background)).clip(0, 1)
    canvas[top : top + h, left : left + w] = scaled
    return canvas, (left, top, w / width, h / height)
