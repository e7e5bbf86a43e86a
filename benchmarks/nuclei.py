"""Something real: learn to count the nuclei in a micrograph, from random crops of its left half, without labels.

    pip install scikit-image
    python benchmarks/nuclei.py runs/nuclei

The micrograph of 512x512 pixels, of the 2018 Data Science Bowl, and its annotation are in the wheel of the package
`stardist`: pip downloads it, and two files are read out of it. A nucleus is found if the centre of a window lies in it.
Beside it is what a user of scikit-image would do first: Otsu's threshold, a distance transform, and a watershed.
Leaves `nuclei.png` in the folder of the run: the right half, with the windows, and the annotation in green.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.segmentation import find_boundaries, watershed

sys.path.insert(0, str(Path(__file__).parent.parent))

from coins import parse, trained

import viz
from predict import predict

SHA256 = {
    "img2d": "f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750",
    "mask2d": "59ad5e820b7982ca9d13e946fa6e7f64e2714899e00a2ae6c69aa79aad53d46f",
}
WHEEL, DATA = "stardist==0.9.2", Path("data")  # where the micrograph is kept
FLAGS = "--crop 64 --object-size 24 -t 6 -n 500 --eval-every 250".split()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    image, mask = fetch("img2d"), fetch("mask2d")
    for name, part in {"left": np.s_[:, :256], "right": np.s_[:, 256:], "whole": np.s_[:]}.items():
        tifffile.imwrite(file := DATA / f"nuclei_{name}.tif", image[part])
        if name == "left":
            air = trained(file, args.out, [*FLAGS, *args.flags])
            continue
        boxes = np.array(next(predict(air, [file]))["boxes"])
        print(f"{name}: {score(boxes[:, :2] + boxes[:, 2:] / 2, mask[part])}")
        print(f"{name}, watershed: {score(centres(image[part]), mask[part])}")
        if name == "right":
            picture = viz.draw_boxes((image[part] / 110).clip(0, 1), boxes).copy()
            pixel = len(picture) // len(image)  # as it was enlarged
            picture[np.kron(find_boundaries(mask[part], mode="inner"), np.ones((pixel, pixel))) > 0] = (0, 120, 0)
            Image.fromarray(picture).save(args.out / "nuclei.png")


def fetch(name: str) -> np.ndarray:
    """One of the two images `[512, 512]`, from where they are kept or from the wheel."""
    path = DATA / f"{name}.tif"
    if not path.exists():
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(DATA), WHEEL]
        subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True)
        with zipfile.ZipFile(next(DATA.glob("stardist-*.whl"))) as wheel:
            path.write_bytes(wheel.read(f"stardist/data/images/{name}.tif"))
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[name]:
        raise SystemExit(f"{path} is not the file that was checked")
    return tifffile.imread(path)


def score(centres: np.ndarray, mask: np.ndarray) -> str:
    """How many of the nuclei in an annotation `[h, w]` have one of the centres `[n, 2]`, (x, y) in pixels, in them."""
    h, w = mask.shape
    x, y = centres.astype(int).T
    claimed = mask[y.clip(0, h - 1), x.clip(0, w - 1)]
    there, found = len(np.unique(mask[mask > 0])), len(np.unique(claimed[claimed > 0]))
    false = len(claimed) - found
    f1 = 2 * found / (there + len(claimed))
    return f"{len(claimed)} counted of {there}; {found} found, {there - found} missed, {false} false: F1 {f1:.3f}"


def centres(image: np.ndarray) -> np.ndarray:
    """The centres `[n, 2]` of the nuclei that the watershed finds."""
    smooth = gaussian(image.astype(float), 1)
    ink = smooth > threshold_otsu(smooth)
    distance = gaussian(ndimage.distance_transform_edt(ink), 1)
    peaks = peak_local_max(distance, min_distance=6, labels=ndimage.label(ink)[0])
    markers = np.zeros(ink.shape, int)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = watershed(-distance, markers, mask=ink)
    return np.array(ndimage.center_of_mass(ink, labels, np.arange(1, len(peaks) + 1)))[:, ::-1]


if __name__ == "__main__":
    main()
