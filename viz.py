"""Pictures of scenes and of learning, as RGB arrays, and the visdom server that shows them.

The functions that draw return uint8 `[height, width, 3]`. They take grey images `[h, w]`, light on black, uint8 (255 is
white) or floats in [0, 1], and boxes `(x, y, w, h)` in pixels of their image, in the order of the steps.
"""

import io
import json
from urllib.parse import unquote, urlsplit

import numpy as np
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw

DPI = 110  # pixels to an inch
# The steps' boxes: the paper's colours, and kinds of lines for readers who cannot tell colours apart.
COLOURS = ["red", "limegreen", "deepskyblue", "orange", "magenta", "yellow", "mediumpurple", "tan"]
BOX_STYLES = cycler(ec=COLOURS, ls=2 * ["-", "--", ":", "-."])
TIMEOUT = 3, 5  # seconds that a visdom server has to accept a connection, and to answer
URL_EXAMPLE = "http://user:password@host:8097/base (in a password, / is written as %2F, ? as %3F, # as %23)"


def draw_scenes(images, boxes=None, captions=None, columns=10, title=None, labels=None, size=(1.1, 1.1)) -> np.ndarray:
    """Images `[n, h, w]`, each with boxes `[k, 4]` and a text above it; labels of rows; size of an image in inches."""
    sheet = Sheet(max(1, -(-len(images) // columns)), columns, title, labels, *size)
    for i, image in enumerate(images):
        sheet.draw_image(divmod(i, columns), image, () if boxes is None else boxes[i])
        sheet.write(divmod(i, columns), "" if captions is None else captions[i])
    return render(sheet.axis.figure)


def draw_boxes(image: np.ndarray, boxes) -> np.ndarray:
    """One image of any size `[h, w]` with boxes `[k, 4]`, pixel by pixel; a small one is enlarged to 480 pixels."""
    pixel = -(-480 // max(image.shape))
    grey = np.rint(255 * image.clip(0, 1)).astype(np.uint8).repeat(pixel, 0).repeat(pixel, 1)
    picture = Image.fromarray(grey).convert("RGB")
    for i, (x, y, w, h) in enumerate(np.asarray(boxes).reshape(-1, 4) * pixel):
        ImageDraw.Draw(picture).rectangle((x, y, x + w, y + h), outline=COLOURS[i % len(COLOURS)], width=2)
    return np.asarray(picture)


def draw_steps(images, boxes, counts, x_att, y_att, canvases, q_count, title=None) -> np.ndarray:
    """How scenes are taken apart, one in a row: the image, what every step saw and painted, and q(count) as bars.

    images `[n, h, w]`, boxes `[n, T, 4]`, counts `[n]`, x_att and y_att `[n, T, w, w]`, canvases `[n, T + 1, h, w]`
    (with 0, 1, .. objects), q_count `[n, T + 1]`. Steps that a scene did not use stay empty.
    """
    most = max(counts, default=0)  # no columns that no scene uses
    sheet = Sheet(len(images), 2 + 3 * most, title)
    for row, count in enumerate(counts):
        sheet.draw_image((row, 0), images[row], boxes[row][:count])
        for t in range(count):
            for k, image in enumerate((x_att[row, t], y_att[row, t], canvases[row, t + 1])):
                sheet.draw_image((row, 1 + 3 * t + k), image)
        sheet.draw_bars((row, 1 + 3 * most), q_count[row])
    names = [f"{t + 1}: {name}" for t in range(most) for name in ("crop", "object", "canvas")]
    for column, name in enumerate(["image", *names, "q(count)"]):
        sheet.write((0, column), name)
    return render(sheet.axis.figure)


class Sheet:
    """Images in rows and columns, on one axis in inches from the upper left. (An axis for each would take seconds.)"""

    def __init__(self, rows: int, columns: int, title=None, labels=None, width=1.1, height=1.1):
        self.width, self.height = width, height  # of an image, in inches
        self.left, self.top = (0.9 if labels else 0.1), (0.45 if title else 0.1) + 0.242
        size = np.add(self.corner((rows, columns)), (0.1, 0.108))
        figure = Figure(figsize=size, dpi=DPI)
        figure.suptitle(title or "", fontsize=10, y=1 - 0.08 / size[1])
        self.axis = figure.add_axes([0, 0, 1, 1], xlim=(0, size[0]), ylim=(size[1], 0))
        self.axis.set_axis_off()
        for row, label in enumerate(labels or ()):
            left, top = self.corner((row, 0))
            self.axis.text(left - 0.055, top + height / 2, label, fontsize=8, ha="right", va="center")

    def corner(self, place: tuple[int, int]) -> tuple[float, float]:
        """The upper left corner of the image at a place (row, column)."""
        return self.left + (self.width + 0.088) * place[1], self.top + (self.height + 0.275) * place[0]

    def draw_image(self, place, image, boxes=()) -> None:
        """An image and its boxes, in whose units pixel (0, 0) covers [0, 1] x [0, 1]."""
        (left, top), (h, w) = self.corner(place), image.shape
        pixel, white = self.width / w, 255 if image.dtype == np.uint8 else 1
        extent = left, left + self.width, top + h * pixel, top
        self.axis.imshow(image, "gray", vmin=0, vmax=white, extent=extent, interpolation="nearest", aspect="auto")
        for t, ((x, y, *size), style) in enumerate(zip(np.asarray(boxes) * pixel, BOX_STYLES()), 1):
            self.axis.add_patch(Rectangle((left + x, top + y), *size, fill=False, lw=1.5, label=f"step {t}", **style))

    def draw_bars(self, place, probs: np.ndarray) -> None:
        """Probabilities of 0, 1, .. as bars."""
        (left, top), step = self.corner(place), self.width / len(probs)
        x, zero = left + step * (np.arange(len(probs)) + 0.5), top + 0.85 * self.height
        self.axis.bar(x, -0.85 * self.height * probs, 0.8 * step, zero, color="0.3", ec="0.3")
        for n in range(len(probs)):
            self.axis.text(x[n], top + 0.98 * self.height, n, fontsize=7, ha="center")

    def write(self, place, text) -> None:
        """A text above the image at a place."""
        left, top = self.corner(place)
        self.axis.text(left + self.width / 2, top - 0.055, text, fontsize=8, ha="center")


def draw_curves(curves: dict, title=None) -> np.ndarray:
    """Curves by name, over steps (above) and over minutes (below): triples of steps, seconds, values (may be None)."""
    figure = Figure(figsize=(2.9 * len(curves), 4.6), dpi=DPI)
    axes = figure.subplots(2, len(curves), squeeze=False)
    figure.subplots_adjust(left=0.05, right=0.99, top=0.86, bottom=0.1, wspace=0.25, hspace=0.35)
    for (above, below), (name, (steps, seconds, values)) in zip(axes.T, curves.items()):
        above.set_title(name, fontsize=9)
        for axis, at, unit in (above, steps, "step"), (below, np.divide(seconds, 60), "minutes of training"):
            axis.plot(at, np.array(values, float), ".-")
            axis.set_xlabel(unit, fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
    figure.suptitle(title or "", fontsize=10)
    return render(figure)


def draw_confusion(confusion, title=None) -> np.ndarray:
    """True against inferred count, numbers of images `[true, inferred]`, as a heat map of each row's shares."""
    confusion = np.asarray(confusion)
    shares = confusion / confusion.sum(1, keepdims=True).clip(min=1)
    rows, columns = confusion.shape
    figure = Figure(figsize=(1.3 + 1.0 * columns, 1.3 + 0.8 * rows), dpi=DPI, layout="tight")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.4, 0, 1))  # a few errors are seen beside the many that are right
    for (true, inferred), n in np.ndenumerate(confusion):
        colour = "white" if shares[true, inferred] > 0.3 else "black"
        axis.text(inferred, true, f"{n:,}", ha="center", va="center", color=colour, fontsize=9)
    axis.set(xlabel="inferred count", ylabel="true count", xticks=range(columns), yticks=range(rows))
    axis.set_title(title or "", fontsize=10)
    return render(figure)


def draw_reliability(probabilities, shares, numbers, title=None) -> np.ndarray:
    """How often counts are right, over their probability, with how many there are; on the diagonal it is as often."""
    figure = Figure(figsize=(4, 4), dpi=DPI, layout="tight")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], "--", color="0.6")
    axis.plot(probabilities, shares, ".-")
    for k, (x, y, n) in enumerate(zip(probabilities, shares, numbers)):  # To the right and left of the line in turn.
        axis.annotate(f"{n:,}", (x, y), (-14 if k % 2 else 14, -4), textcoords="offset points", fontsize=7, ha="center")
    axis.set(xlabel="probability of the count", ylabel="share that is right", xlim=(0, 1.03), ylim=(0, 1.03))
    axis.set_title(title or "", fontsize=10)
    return render(figure)


def render(figure: Figure) -> np.ndarray:
    """The figure's pixels; with a legend, if there are boxes of several steps."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    steps = dict(zip(labels, handles))
    if len(steps) > 1:
        figure.legend(steps.values(), steps, loc="lower center", ncols=len(steps), fontsize=8, frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png(picture: np.ndarray) -> bytes:
    """An RGB array as a PNG file's content."""
    Image.fromarray(picture).save(stream := io.BytesIO(), format="png")
    return stream.getvalue()


class Dashboard:
    """A visdom server that shows pictures, each in a window of its own that is updated in place.

    url: as in URL_EXAMPLE; user and password, port and base may be left out. Raises ConnectionError, with one line for
    the user that has no password in it, if the server does not answer within TIMEOUT or refuses.
    """

    def __init__(self, url: str, env: str):
        import requests
        from visdom import Visdom  # only here: drawing does not need it

        try:
            parts = urlsplit(url)
            port, base = parts.port or 8097, f"/{parts.path.strip('/')}".rstrip("/")
            if not parts.hostname or "@" in "".join(parts[2:]):  # as of a password with / in it
                raise ValueError
        except ValueError:  # Its message may quote the password.
            raise ConnectionError(f"not the URL of a visdom server, such as {URL_EXAMPLE}") from None
        server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2].removesuffix(f':{parts.port}')}"
        login = {name: unquote(getattr(parts, name)) for name in ("username", "password")} if parts.password else {}
        # It sends nothing yet, since it would wait for ever for a server that is gone; `post` does not.
        self.client = Visdom(server, port=port, base_url=base, env=env, **login, send=False, use_incoming_socket=False)
        self.address = f"{server}:{port}{base}"
        self.session = requests.Session()
        self.session.trust_env = parts.hostname not in ("localhost", "127.0.0.1")  # no proxy for these
        self.client.send, self.client._handle_post = True, self.post
        self.show({})

    def show(self, pictures: dict[str, np.ndarray]) -> None:
        """Show RGB arrays in windows of these names, at first a little smaller than they are. Raises as above."""
        if self.client.username:  # Each time: a server that was started again wants a new login.
            login = {"username": self.client.username, "password": self.client.password}
            self.post(f"{self.address}/", json.dumps(login))
        self.client._send({"eid": self.client.env}, endpoint=f"env/{self.client.env}")
        for name, picture in pictures.items():
            height, width = (side * 6 // 10 for side in picture.shape[:2])
            opts = {"title": name, "width": width, "height": height}
            self.client.image(picture.transpose(2, 0, 1), win=name, opts=opts)

    def post(self, url: str, data: str) -> str:
        """Send to the server and return its answer; visdom itself would take errors for answers. Raises as above."""
        try:
            response = self.session.post(url, data, timeout=TIMEOUT, allow_redirects=False)
        except (ValueError, OSError):
            hint = "`python -m visdom.server -bind_local` in another terminal starts one"
            raise ConnectionError(f"no visdom server answers at {self.address} ({hint})") from None
        if response.status_code != 200:  # such as 400 or 401 for a wrong password
            raise ConnectionError(f"{self.address} answers with status {response.status_code}: check {URL_EXAMPLE}")
        return response.text
