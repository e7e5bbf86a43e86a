"""The networks of AIR and its spatial transformers: plain torch.nn, nothing of Pyro.

A pose `z_where = [s, x, y]` (shape `[batch, 3]`) puts a square window on a square canvas. In canvas
coordinates, which run from -1 to 1 over the whole canvas, x to the right and y downwards, the
window's half-width is `1/s` and its centre lies at `(-x/s, -y/s)`. `s` is taken to be at least 1
(`MIN_SCALE`): a window is never larger than the canvas, and `1/s` never blows up.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

MIN_SCALE = 1.0
# A step that is never taken is never trained. Its standard deviations would fall until their squares are 0, and then
# its gradient is not a number, though it is masked.
MIN_SD = 1e-6
PosePrior = tuple[tuple[float, float, float], tuple[float, float, float]]  # its mean and standard deviation


class Look(NamedTuple):
    """Where the residual guide looks, (x, y) in canvas coordinates: `shift` away from `place`."""

    place: Tensor | None = None  # [n, 2]; the peak of the residual, if not given
    shift: Tensor | float = 0.0  # [2]
    within: Tensor | None = None  # [n, 4]; the left, top, right and bottom edge of where a peak may be
    side: Tensor | None = None  # bool [n, h, h]; the pixels it sees, if not all: elsewhere nothing is left


class Step(NamedTuple):
    """What a guide's network is given at each step."""

    image: Tensor  # [n, h, h]
    canvas: Tensor  # [n, h, h], what is painted so far
    z_where: Tensor  # [n, 3], the pose of the step before, 0 at first
    z_what: Tensor  # [n, z_what_size], its code, 0 at first
    state: tuple  # what the network returned at the step before, or its `init_state`
    look: Look = Look()


# -------------------------------------------------------------------------- spatial transformers


def object_to_image(z_where: Tensor, objects: Tensor, image_size: int) -> Tensor:
    """Paint objects `[batch, w, w]` at poses `[batch, 3]` on empty canvases `[batch, image_size, image_size]`.

    Each canvas pixel takes the bilinear interpolation of the object at the place that the pixel's
    centre falls on; outside the window it is 0.
    """
    s, xy = split_pose(z_where)
    centres = pixel_centres(image_size, z_where)
    # Where each canvas column and row lies in the window's own [-1, 1]: [batch, 2, image_size].
    columns, rows = bilinear_weights(s * centres + xy, objects.shape[-1]).unbind(1)
    return rows @ objects @ columns.mT


def image_to_object(z_where: Tensor, images: Tensor, window_size: int, widen: float = 1.0) -> Tensor:
    """Crop windows `[batch, c, window_size, window_size]` at poses `[batch, 3]` out of images `[batch, c, h, h]`.

    The inverse of `object_to_image`: each window pixel interpolates the image bilinearly, with 0
    outside the image. What is cropped is `widen` times as wide as the window, around the same centre.
    """
    s, xy = (part / widen for part in split_pose(z_where))
    centres = pixel_centres(window_size, z_where)
    columns, rows = bilinear_weights((centres - xy) / s, images.shape[-1]).unbind(1)
    # One product for the rows of all channels, one for their columns; see `to_channels`.
    crops = rows @ images.transpose(1, 2).flatten(2)
    crops = crops.unflatten(-1, images.shape[1::2]).flatten(1, 2) @ columns.mT
    return crops.unflatten(1, (window_size, -1)).transpose(1, 2)


def to_channels(*images: Tensor) -> Tensor:
    """Images `[batch, h, h]` as the channels of one, `[batch, c, h, h]`.

    In memory, rows of the channels lie beside one another: `image_to_object` then crops them all without a copy.
    """
    return torch.stack(images, 2).transpose(1, 2)


def pose_to_box(z_where: Tensor, image_size: int) -> Tensor:
    """Windows `[.., 3]` as boxes `[.., 4]`: `(x, y, w, h)`, in pixels from the canvas's upper left corner."""
    s, xy = split_pose(z_where)
    corner = (1 - (xy + 1) / s)[..., 0] * image_size / 2
    width = (image_size / s)[..., 0]
    return torch.cat([corner, width, width], -1)


def pose_to_place(z_where: Tensor) -> Tensor:
    """The centres of windows `[.., 3]`, (x, y) in canvas coordinates `[.., 2]`."""
    s, xy = split_pose(z_where)
    return (-xy / s)[..., 0]


def split_pose(z_where: Tensor) -> tuple[Tensor, Tensor]:
    """The bounded scale `[.., 1, 1]` and the offsets `[.., 2, 1]` of poses `[.., 3]`."""
    return z_where[..., :1, None].clamp(min=MIN_SCALE), z_where[..., 1:, None]


def pixel_centres(size: int, like: Tensor) -> Tensor:
    """The coordinates of `size` pixel centres whose outer edges lie at -1 and 1."""
    return (2 * torch.arange(size, dtype=like.dtype, device=like.device) + 1) / size - 1


def bilinear_weights(places: Tensor, size: int) -> Tensor:
    """How much each of `size` pixels over [-1, 1] adds to each place: `[.., n]` to `[.., n, size]`.

    A window that is not turned is resampled along x and y separately, each a product with such a matrix: less work
    than `affine_grid` and `grid_sample`.
    """
    pixels = torch.arange(size, dtype=places.dtype, device=places.device)
    index = ((places + 1) * size - 1) / 2
    return (1 - (index[..., None] - pixels).abs()).relu()


# --------------------------------------------------------------------------------------- networks


class MLP(nn.Sequential):
    """A multilayer perceptron, `[.., n_in]` to `[.., n_out]`, with one hidden layer."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int):
        super().__init__(nn.Linear(n_in, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_out))


class Encoder(nn.Module):
    """Parameterizes `q(z_what_t | ..)`, a Normal, from a crop `[batch, in_channels, window_size, window_size]`."""

    def __init__(self, in_channels: int, window_size: int, hidden_size: int, z_what_size: int):
        super().__init__()
        self.net = nn.Sequential(
            ConvNet(in_channels, window_size, hidden_size), nn.Linear(hidden_size, 2 * z_what_size)
        )

    def forward(self, crop: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation, `[batch, z_what_size]` each."""
        loc, scale = self.net(crop).chunk(2, -1)
        return loc, softplus(scale).clamp(min=MIN_SD)


class Decoder(nn.Module):
    """Paints an object: the mean of the pixels in `p(x | z)` that belong to one `z_what` `[batch, z_what_size]`."""

    def __init__(self, z_what_size: int, hidden_size: int, window_size: int, bias: float = -2.0):
        super().__init__()
        self.mlp = MLP(z_what_size, hidden_size, window_size**2)
        self.window_size = window_size
        # Before it has learned anything an object is nearly empty. If it were grey instead, any object
        # at all would make the picture worse, and the guide would learn at once to use none.
        self.bias = bias

    def forward(self, z_what: Tensor) -> Tensor:
        """Returns `y_att` in (0, 1), `[batch, window_size, window_size]`."""
        return torch.sigmoid(self.mlp(z_what) + self.bias).unflatten(-1, (self.window_size,) * 2)


class RNNAttention(nn.Module):
    """The paper's guide. Parameterizes `q(z_pres_t | ..)`, a Bernoulli, and `q(z_where_t | ..)`, a Normal.

    An LSTM sees the image and, of the step before, pose and code. `z_where` is predicted relative to its
    prior, so that the first guess is a plausible window.
    """

    def __init__(self, image_size: int, z_what_size: int, rnn_size: int, hidden_size: int, prior: PosePrior):
        super().__init__()
        self.rnn = ImageLSTM(image_size, 3 + z_what_size, rnn_size)
        self.predict = MLP(rnn_size, hidden_size, 1 + 2 * 3)
        self.register_buffer("z_where_loc", torch.tensor(prior[0]), persistent=False)
        self.register_buffer("z_where_scale", torch.tensor(prior[1]), persistent=False)

    def init_state(self, image: Tensor) -> tuple:
        """The image's projection, and the LSTM's first state."""
        return self.rnn.project_image(image), self.rnn.init_state(len(image))

    def forward(self, step: Step) -> tuple[Tensor, Tensor, Tensor, tuple]:
        """The logit of `z_pres` `[batch]`, mean and sd of `z_where` `[batch, 3]` each, and the next state."""
        projection, state = step.state
        state = self.rnn(projection, torch.cat([step.z_where, step.z_what], -1), state)
        z_pres, loc, scale = self.predict(state[0]).split([1, 3, 3], -1)
        loc, scale = self.z_where_loc + self.z_where_scale * loc, self.z_where_scale * softplus(scale)
        return z_pres[:, 0], loc, scale.clamp(min=MIN_SD), (projection, state)


class ResidualAttention(nn.Module):
    """A guide that looks at what is left: parameterizes `q(z_pres_t | ..)`, a Bernoulli, `q(z_where_t | ..)`, a Normal.

    It sees the image and the residual, what the canvas does not explain yet, and has no memory: what it learns of one
    more object holds for any number of them.

    1. One place is chosen, the peak of the residual: where most is left within about an object's size, and less around
       it. (The mean of two places would be a place between two objects, where there is nothing.)
    2. A network looks at the peak, twice as wide as an ordinary window, and proposes a window; another looks at
       that window, corrects it and decides whether there is one more object.

    The peak has no parameters. No gradient passes through the canvas that the guide sees: the effect of an earlier
    object on later steps is left out, which biases the gradient (and makes learning faster, see docs/inference.md).
    """

    first_look, second_look = 2.0, 1.5  # how wide, in widths of the window

    def __init__(self, image_size: int, window_size: int, hidden_size: int, prior: PosePrior):
        super().__init__()
        self.window_size = window_size
        window = image_size / prior[0][0]  # the side of an ordinary window, in pixels
        self.reach = 2 * round(window / 2) + 1  # the side of the square that a peak is the highest in
        # Sums over squares are products with matrices of ones near the diagonal, from both sides.
        apart = (torch.arange(image_size)[:, None] - torch.arange(image_size)).abs()
        for name, width in (("inner", 0.78 * window), ("outer", 1.5 * window)):
            band = (apart <= round((width - 1) / 2)).float()
            self.register_buffer(name, band / band[image_size // 2].sum(), persistent=False)
        self.register_buffer("centres", pixel_centres(image_size, band), persistent=False)
        self.register_buffer("z_where_loc", torch.tensor(prior[0]), persistent=False)
        self.register_buffer("z_where_scale", torch.tensor(prior[1]), persistent=False)
        self.look = nn.Sequential(nn.Flatten(), nn.Linear(2 * window_size**2, hidden_size), nn.ReLU())
        self.propose = nn.Linear(hidden_size, 2 * 3)
        self.look_closer = ConvNet(2, window_size, hidden_size)
        self.correct = nn.Linear(hidden_size, 2 * 3)
        nn.init.zeros_(self.correct.weight)  # At first it changes nothing.
        nn.init.zeros_(self.correct.bias)
        self.present = MLP(2 * hidden_size, 100, 1)

    def init_state(self, image: Tensor) -> tuple:
        """Nothing: it has no memory."""
        return ()

    @torch.no_grad()
    def residual(self, image: Tensor, canvas: Tensor) -> Tensor:
        """What the canvas leaves of the image, `[batch, h, h]`."""
        return (image - canvas).clamp(min=0)

    @torch.no_grad()
    def peak(self, residual: Tensor, within: Tensor | None = None) -> Tensor:
        """The place `[batch, 2]` where most is left, (x, y) in canvas coordinates; see `Look` for `within`."""
        size = residual.shape[-1]
        score = self.inner @ residual @ self.inner - self.outer @ residual @ self.outer
        if within is not None:
            inside = (self.centres >= within[:, :2, None]) & (self.centres <= within[:, 2:, None])
            score = score.where(self.is_highest(score) & inside[:, 1, :, None] & inside[:, 0, None], -torch.inf)
        at = score.flatten(1).argmax(-1)
        return torch.stack([self.centres[at % size], self.centres[at // size]], -1)

    def is_highest(self, score: Tensor) -> Tensor:
        """Where a score `[batch, h, h]` is the highest within half a usual window."""
        highest = pad(score, (self.reach // 2,) * 4, value=-torch.inf)
        for dim in (1, 2):  # faster here than max_pool2d
            highest = highest.unfold(dim, self.reach, 1).amax(-1)
        return score >= highest

    def forward(self, step: Step) -> tuple[Tensor, Tensor, Tensor, tuple]:
        """The logit of `z_pres` `[batch]`, mean and sd of `z_where` `[batch, 3]` each, and the state."""
        residual = self.residual(step.image, step.canvas)
        place = self.peak(residual, step.look.within) if step.look.place is None else step.look.place
        place, seen = place + step.look.shift, to_channels(residual, step.image)
        s = self.z_where_loc[0]
        window = torch.cat([s.expand(len(place), 1), -s * place], -1)
        # Flattened row by row, as they lie in memory.
        features = self.look(image_to_object(window, seen, self.window_size, self.first_look).transpose(1, 2))
        shift, scale = self.propose(features).chunk(2, -1)
        s = s + self.z_where_scale[0] * shift[:, :1]
        # 0.6: at first the window stays near that place.
        loc = torch.cat([s, 0.6 * shift[:, 1:] - s * place], -1)
        closer = self.look_closer(image_to_object(loc, seen, self.window_size, self.second_look))
        shift, factor = self.correct(closer).chunk(2, -1)
        loc = loc + self.z_where_scale * shift
        scale = (self.z_where_scale * softplus(scale) * 2 * torch.sigmoid(factor)).clamp(min=MIN_SD)
        return self.present(torch.cat([features, closer], -1))[:, 0], loc, scale, step.state


class ConvNet(nn.Sequential):
    """Features `[batch, size]` of crops `[batch, in_channels, window_size, window_size]`, by two convolutions."""

    def __init__(self, in_channels: int, window_size: int, size: int):
        if window_size < 9:
            raise ValueError(f"window_size must be at least 9 for two convolutions, not {window_size}")
        side = ((window_size - 5) // 2 + 1 - 3) // 2 + 1
        super().__init__(
            nn.Conv2d(in_channels, 16, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * side**2, size),
            nn.ReLU(),
        )


class ImageLSTM(nn.Module):
    """An LSTM cell that sees the same image at every step, beside an input that changes.

    The image's part of the gates, nearly all of the arithmetic, is computed once, by `project_image`.
    """

    def __init__(self, image_size: int, input_size: int, state_size: int):
        super().__init__()
        self.image = nn.Linear(image_size**2, 4 * state_size)
        self.rest = nn.Linear(input_size + state_size, 4 * state_size, bias=False)
        self.state_size = state_size
        for parameter in self.parameters():  # as nn.LSTMCell does
            nn.init.uniform_(parameter, -(state_size**-0.5), state_size**-0.5)

    def init_state(self, n: int) -> tuple[Tensor, Tensor]:
        """The state (h, c) before the first step: zeros, `[n, state_size]` each."""
        h = self.rest.weight.new_zeros(n, self.state_size)
        return h, h

    def project_image(self, images: Tensor) -> Tensor:
        """The image's part of the gates: `[batch, h, h]` to `[batch, 4 * state_size]`."""
        return self.image(images.flatten(1))

    def forward(self, projection: Tensor, inputs: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """One step from state `(h, c)` to the next, `[batch, state_size]` each."""
        h, c = state
        i, f, g, o = (projection + self.rest(torch.cat([inputs, h], -1))).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
