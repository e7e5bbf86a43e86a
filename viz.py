"""Pictures of scenes and of learning, as RGB arrays, and the visdom server that shows them.

The functions that draw are pure: arrays in, an array out (uint8 `[height, width, 3]`). What shows
such pictures knows nothing of what is on them.
"""

import io
import json
import logging
import re
from urllib.parse import unquote, urlsplit

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from urllib3.exceptions import HTTPError

# A step's boxes, told apart by colour (the paper's) and, for those who cannot see it, by line style.
STEP_STYLES = [
    ("red", "-"),
    ("limegreen", "--"),
    ("deepskyblue", ":"),
    ("orange", "-."),
    ("magenta", "-"),
    ("yellow", "--"),
]
CELL = 1.1  # inches that an image takes, at DPI dots per inch
DPI = 110


# --------------------------------------------------------------------------------------- scenes


def draw_scenes(images, boxes=None, captions=None, columns=10, title=None, labels=None) -> np.ndarray:
    """A grid of grey images with boxes on them.

    images: `[n, h, w]`, uint8 or floats in [0, 1]. boxes: for each image an array `[k, 4]` of
    `(x, y, w, h)` in pixels, in the order of the steps; a legend says which style belongs to which
    step. captions: a short text above each image. labels: one to the left of each row.
    """
    rows = max(1, -(-len(images) // columns))
    axis = sheet(rows, columns, title, labels)
    for i, image in enumerate(images):
        draw_image(axis, divmod(i, columns), image, () if boxes is None else boxes[i])
        if captions is not None:
            caption(axis, divmod(i, columns), captions[i])
    return render(axis.figure, most=0 if boxes is None else max(map(len, boxes), default=0))


def draw_scene(image, boxes, caption: str) -> np.ndarray:
    """One grey image of any shape `[h, w]`, uint8 or floats in [0, 1], with boxes `[k, 4]` and a text above it."""
    step = -(-max(image.shape) // 1000)  # a photograph has more pixels than are needed here
    image, boxes = image[::step, ::step], np.asarray(boxes) / step
    h, w = image.shape
    pixel = max(1, 480 / max(h, w)) / DPI
    width, height = w * pixel + 0.2, h * pixel + 0.7
    figure = Figure(figsize=(width, height), dpi=DPI)
    axis = figure.add_axes([0.1 / width, 0.35 / height, w * pixel / width, h * pixel / height])
    axis.set(xlim=(0, 1), ylim=(0.22 + h / w, 0.22))  # where draw_image puts the first image of a sheet
    axis.set_axis_off()
    draw_image(axis, (0, 0), image, boxes)
    figure.text(0.5, 1 - 0.2 / height, caption, fontsize=9, ha="center", va="center")
    return render(figure, most=len(boxes))


def draw_steps(images, boxes, counts, x_att, y_att, canvases, count_probs, title=None) -> np.ndarray:
    """How each scene is taken apart, one in a row: the image, what every step saw and painted, and q(count).

    images `[n, h, w]`, boxes `[n, T, 4]`, counts `[n]`, x_att and y_att `[n, T, w, w]`, canvases
    `[n, T + 1, h, h]`, count_probs `[n, T + 1]`. Steps that a scene did not use stay empty.
    """
    num_steps = int(max(counts, default=0))  # no columns that no scene uses
    axis = sheet(len(images), 2 + 3 * num_steps, title)
    for row, count in enumerate(counts):
        draw_image(axis, (row, 0), images[row], boxes[row][:count])
        for t in range(count):
            for k, image in enumerate((x_att[row, t], y_att[row, t], canvases[row, t + 1])):
                draw_image(axis, (row, 1 + 3 * t + k), image)
        draw_bars(axis, (row, 1 + 3 * num_steps), count_probs[row])
    names = ["image"] + [f"{t + 1}: {name}" for t in range(num_steps) for name in ("crop", "object", "canvas")]
    for column, name in enumerate([*names, "q(count)"]):
        caption(axis, (0, column), name)
    return render(axis.figure, most=int(max(counts, default=0)))


def sheet(rows: int, columns: int, title=None, labels=None):
    """An axis on which images have places (row, column), each one unit wide. (An axis for each would take seconds.)"""
    left, top = (0.9 if labels else 0.1), (0.45 if title else 0.1)
    width, height = left + CELL * 1.08 * columns + 0.1, top + CELL * 1.25 * rows + 0.35
    figure = Figure(figsize=(width, height), dpi=DPI)
    axis = figure.add_axes([left / width, 0.35 / height, CELL * 1.08 * columns / width, CELL * 1.25 * rows / height])
    axis.set(xlim=(0, 1.08 * columns), ylim=(1.25 * rows, 0))
    axis.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.08 / height)
    for row, label in enumerate(labels or ()):
        axis.text(-0.05, 1.25 * row + 0.72, label, fontsize=8, ha="right", va="center")
    return axis


def draw_image(axis, place, image, boxes=()) -> None:
    """One grey image and its boxes, at sub-pixel position, at a place of a sheet."""
    left, top = 1.08 * place[1], 1.25 * place[0] + 0.22
    h, w = image.shape
    white = 255 if image.dtype == np.uint8 else 1.0
    # Pixel (0, 0) covers [0, 1] x [0, 1] in the boxes' units.
    extent = (left, left + 1, top + h / w, top)
    axis.imshow(image, cmap="gray", vmin=0, vmax=white, extent=extent, interpolation="nearest", aspect="auto")
    for t, box in enumerate(boxes):
        x, y, box_w, box_h = np.asarray(box) / w
        colour, style = step_style(t)
        axis.add_patch(Rectangle((left + x, top + y), box_w, box_h, fill=False, ec=colour, ls=style, lw=1.5))


def draw_bars(axis, place, probs) -> None:
    """Probabilities of 0, 1, .. as bars, at a place of a sheet."""
    left, top = 1.08 * place[1], 1.25 * place[0] + 0.22
    width = 1 / len(probs)
    for n, p in enumerate(probs):
        axis.add_patch(Rectangle((left + (n + 0.1) * width, top + 0.85), 0.8 * width, -0.85 * float(p), color="0.3"))
        axis.text(left + (n + 0.5) * width, top + 0.98, n, fontsize=7, ha="center")


def caption(axis, place, text) -> None:
    axis.text(1.08 * place[1] + 0.5, 1.25 * place[0] + 0.17, text, fontsize=8, ha="center")


def step_style(t: int) -> tuple[str, str]:
    return STEP_STYLES[t % len(STEP_STYLES)]


# ------------------------------------------------------------------------------------- learning


def draw_curves(curves, title=None) -> np.ndarray:
    """Curves over steps (above) and over minutes (below).

    curves: a dictionary from names to triples of equally long lists: steps, seconds and values. A
    value may be None.
    """
    figure = Figure(figsize=(2.9 * len(curves), 4.6), dpi=DPI)
    axes = figure.subplots(2, len(curves), squeeze=False)
    figure.subplots_adjust(left=0.05, right=0.99, top=0.86, bottom=0.1, wspace=0.25, hspace=0.35)
    for column, (name, (steps, seconds, values)) in zip(axes.T, curves.items()):
        values = np.array(values, float)
        for axis, at, unit in zip(column, (steps, np.divide(seconds, 60)), ("step", "minutes of training")):
            axis.plot(at, values, ".-", color="C0")
            axis.set_xlabel(unit, fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        column[0].set_title(name, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return render(figure)


def draw_confusion(confusion, title=None) -> np.ndarray:
    """True against inferred count, `[true, inferred]` numbers of images, as a heat map of each row's shares."""
    confusion = np.asarray(confusion)
    shares = confusion / confusion.sum(1, keepdims=True).clip(min=1)
    rows, columns = confusion.shape
    figure = Figure(figsize=(1.3 + 1.0 * columns, 1.3 + 0.8 * rows), dpi=DPI, layout="tight")
    axis = figure.subplots()
    # The few errors shall be seen beside the many that are right.
    axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.4, 0, 1))
    for true, inferred in np.ndindex(confusion.shape):
        colour = "white" if shares[true, inferred] > 0.3 else "black"
        axis.text(inferred, true, f"{confusion[true, inferred]:,}", ha="center", va="center", color=colour, fontsize=9)
    axis.set(xlabel="inferred count", ylabel="true count", xticks=range(columns), yticks=range(rows))
    if title:
        axis.set_title(title, fontsize=10)
    return render(figure)


def render(figure: Figure, most: int = 0) -> np.ndarray:
    """The figure's pixels, with a legend of the first `most` steps' boxes if there are several."""
    if most > 1:
        styles = [Rectangle((0, 0), 1, 1, fill=False, ec=c, ls=s, lw=1.5) for c, s in map(step_style, range(most))]
        labels = [f"step {t + 1}" for t in range(most)]
        figure.legend(styles, labels, loc="lower center", ncols=most, fontsize=8, frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# --------------------------------------------------------------------------------------- showing


def png(picture: np.ndarray) -> bytes:
    """An RGB array as a PNG file's content."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="png")
    return stream.getvalue()


class Dashboard:
    """A visdom server that shows pictures, each in a window of its own that is updated in place.

    url: the server's, as in `http://user:password@host:8097/base`; user, password, port and base may be left out.
    Raises ConnectionError, with a message for the user that has no password in it, if the server does not
    answer (within a second at first, later within five) or refuses.
    """

    def __init__(self, url: str, env: str):
        import requests
        from visdom import Visdom  # only here: most who draw have no use for it

        logging.getLogger("visdom").setLevel(logging.ERROR)  # It warns of what is meant to be so.
        try:
            parts = urlsplit(url)
            if "@" in "".join(parts[2:]):
                raise ValueError  # The password has ended the host's part of the URL.
            host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
            server, port, base = f"{parts.scheme}://{host}", parts.port or 8097, parts.path.rstrip("/")
            self.client = Visdom(
                server=server,
                port=port,
                base_url=base,
                username=parts.username and unquote(parts.username),
                password=parts.password and unquote(parts.password),
                env=env,
                send=False,  # not yet: only `post` has time limits
                raise_exceptions=True,
                use_incoming_socket=False,
            )
        except (ValueError, AssertionError) as error:
            if isinstance(error, ValueError) and "@" in url:  # It may quote the password.
                error = "in user and password, special characters are written as %2F (for /) and the like"
            url = re.sub("(?s)//.*@", "//", url)
            raise ConnectionError(f"{url} is not the URL of a visdom server: {error}") from None
        self.address, self.timeout = f"{server}:{port}{base}", 1.0
        self.session = requests.Session()
        self.session.trust_env = parts.hostname not in ("localhost", "127.0.0.1")  # no proxy for these
        self.client.send, self.client._handle_post = True, self.post
        self.connect()
        self.timeout = 5.0

    def connect(self) -> None:
        """Log in, if the URL has a user, and make the environment. Raises as above."""
        user, env = self.client.username, self.client.env
        if user:
            self.post(f"{self.address}/", json.dumps({"username": user, "password": self.client.password}))
        self.client._send({"eid": env}, endpoint=f"env/{env}")

    def post(self, url, data=None) -> str:
        """Send to the server. (visdom itself would wait for ever for one that is lost, and take errors for answers.)

        Raises as above.
        """
        try:
            response = self.session.post(url, data=data or {}, timeout=self.timeout, allow_redirects=False)
        except (ValueError, OSError, HTTPError):
            hint = "`python -m visdom.server -bind_local` in another terminal starts one"
            raise ConnectionError(f"no visdom server answers at {self.address} ({hint})") from None
        if response.status_code != 200:
            raise ConnectionError(self.refusal(response.status_code))
        return response.text

    def refusal(self, status: int) -> str:
        """What it means that the server answers with this status, and what to do."""
        user, at = self.client.username, f"{self.address} (status {status})"
        if status in (400, 401, 403):  # visdom 0.2.4 says 400
            if user:
                return f"visdom at {at} refuses the login: check user and password"
            example = self.address.replace("//", "//user:password@", 1)
            return f"visdom at {at} wants a login, as in {example}"
        if user:
            return f"no visdom with a login at {at}: check host, port and path, or leave out user and password"
        return f"no visdom at {at}: check host, port and path"

    def show(self, name: str, title: str, picture: np.ndarray) -> None:
        height, width, _ = picture.shape
        # The window's size at first; it can be drawn larger on the page.
        options = {"title": title, "width": width * 6 // 10, "height": height * 6 // 10}
        self.client.image(picture.transpose(2, 0, 1), win=name, opts=options)
