"""Pictures of scenes, as RGB arrays (uint8 `[height, width, 3]`): pure functions of arrays."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# A step's boxes, told apart by colour (the paper's) and, for those who cannot see it, by line style.
STEP_STYLES = [
    ("red", "-"),
    ("limegreen", "--"),
    ("deepskyblue", ":"),
    ("orange", "-."),
    ("magenta", "-"),
    ("yellow", "--"),
]


def draw_scenes(images, boxes, captions=None, columns=10, title=None, steps=True) -> np.ndarray:
    """A grid of grey images with boxes on them.

    images: `[n, h, w]`, uint8 or floats in [0, 1]; boxes: for each image an array `[k, 4]` of
    `(x, y, w, h)` in pixels, in the order of the steps; captions: a short text for each image.
    With `steps`, a legend says which style belongs to which step.
    """
    rows = -(-len(images) // columns)
    figure, axes = grid(rows, columns, title)
    for axis in axes.flat:
        axis.set_axis_off()
    most = 0
    for i, (axis, image) in enumerate(zip(axes.flat, images)):
        draw_image(axis, image, boxes[i])
        most = max(most, len(boxes[i]))
        if captions is not None:
            axis.set_title(captions[i], fontsize=8, pad=2)
    if steps and most:
        styles = [Rectangle((0, 0), 1, 1, fill=False, ec=c, ls=s) for c, s in map(step_style, range(most))]
        labels = [f"step {t + 1}" for t in range(most)]
        figure.legend(styles, labels, loc="outside lower center", ncols=most, fontsize=8, frameon=False)
    return render(figure)


def draw_image(axis, image, boxes=()) -> None:
    """One grey image and its boxes, at sub-pixel position, on a matplotlib axis."""
    h, w = image.shape
    white = 255 if image.dtype == np.uint8 else 1.0
    # Pixel (0, 0) covers [0, 1] x [0, 1], as the boxes' units have it.
    axis.imshow(image, cmap="gray", vmin=0, vmax=white, extent=(0, w, h, 0), interpolation="nearest")
    for t, (x, y, box_w, box_h) in enumerate(boxes):
        colour, style = step_style(t)
        axis.add_patch(Rectangle((x, y), box_w, box_h, fill=False, ec=colour, ls=style, lw=1.5))


def step_style(t: int) -> tuple[str, str]:
    return STEP_STYLES[t % len(STEP_STYLES)]


def grid(rows: int, columns: int, title=None, size: float = 1.1):
    """A figure of `rows` by `columns` axes, `size` inches each, and the array of its axes."""
    figure = Figure(figsize=(size * columns, size * rows + 0.6), dpi=110, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, columns, squeeze=False)


def render(figure: Figure) -> np.ndarray:
    """The figure's pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
