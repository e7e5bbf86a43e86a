"""The networks of AIR and its spatial transformers: plain torch.nn, nothing of Pyro.

A pose `z_where = [s, x, y]` (shape `[batch, 3]`) puts a square window on a square canvas. In canvas
coordinates, which run from -1 to 1 over the whole canvas, x to the right and y downwards, the
window's half-width is `1/s` and its centre lies at `(-x/s, -y/s)`. So `s = 1, x = y = 0` is the whole
canvas, and larger `s` is a smaller window. `s` is taken to be at least 1 (`MIN_SCALE`): a window is
never larger than the canvas, and `1/s` never blows up.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

MIN_SCALE = 1.0


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
    """Crop windows `[batch, window_size, window_size]` at poses `[batch, 3]` out of images `[batch, h, h]`.

    The inverse of `object_to_image`: each window pixel interpolates the image bilinearly, with 0
    outside the image. What is cropped is `widen` times as wide as the window, around the same centre.
    """
    s, xy = (part / widen for part in split_pose(z_where))
    centres = pixel_centres(window_size, z_where)
    columns, rows = bilinear_weights((centres - xy) / s, images.shape[-1]).unbind(1)
    return rows @ images @ columns.mT


def pose_to_box(z_where: Tensor, image_size: int) -> Tensor:
    """Windows `[.., 3]` as boxes `[.., 4]`: `(x, y, w, h)`, in pixels from the canvas's upper left corner."""
    s, xy = split_pose(z_where)
    corner = (1 - (xy + 1) / s)[..., 0] * image_size / 2
    width = (image_size / s)[..., 0]
    return torch.cat([corner, width, width], -1)


def split_pose(z_where: Tensor) -> tuple[Tensor, Tensor]:
    """The bounded scale `[.., 1, 1]` and the offsets `[.., 2, 1]` of poses `[.., 3]`."""
    return z_where[..., :1, None].clamp(min=MIN_SCALE), z_where[..., 1:, None]


def pixel_centres(size: int, like: Tensor) -> Tensor:
    """The coordinates of `size` pixel centres whose outer edges lie at -1 and 1."""
    return (2 * torch.arange(size, dtype=like.dtype, device=like.device) + 1) / size - 1


def bilinear_weights(places: Tensor, size: int) -> Tensor:
    """How much each of `size` pixels over [-1, 1] adds to each place: `[.., n]` to `[.., n, size]`.

    A window whose sides are parallel to the canvas's is resampled along x and y separately, each a
    product with such a matrix: less work than `affine_grid` and `grid_sample`, which could also turn.
    """
    pixels = torch.arange(size, dtype=places.dtype, device=places.device)
    index = ((places + 1) * size - 1) / 2
    return (1 - (index[..., None] - pixels).abs()).relu()


# --------------------------------------------------------------------------------------- networks


class MLP(nn.Sequential):
    """A multilayer perceptron with layers of the given sizes, `[.., sizes[0]]` to `[.., sizes[-1]]`."""

    def __init__(self, *sizes: int):
        layers = []
        for n_in, n_out in zip(sizes, sizes[1:]):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        super().__init__(*layers[:-1])


class Encoder(nn.Module):
    """Parameterizes `q(z_what_t | x, z_where_t)`, a Normal, from the crop `x_att` `[batch, w, w]`."""

    def __init__(self, window_size: int, hidden_size: int, z_what_size: int):
        super().__init__()
        self.mlp = MLP(window_size**2, hidden_size, 2 * z_what_size)

    def forward(self, x_att: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation, `[batch, z_what_size]` each."""
        loc, scale = self.mlp(x_att.flatten(1)).chunk(2, -1)
        return loc, softplus(scale)


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


class Predict(nn.Module):
    """Parameterizes `q(z_pres_t | ..)`, a Bernoulli, and `q(z_where_t | ..)`, a Normal, from the RNN's state.

    `z_where` is predicted relative to its prior, so that the first guess is a plausible window.
    """

    def __init__(self, state_size: int, hidden_size: int, z_where_loc: Tensor, z_where_scale: Tensor):
        super().__init__()
        self.mlp = MLP(state_size, hidden_size, 1 + 2 * 3)
        self.register_buffer("z_where_loc", z_where_loc, persistent=False)
        self.register_buffer("z_where_scale", z_where_scale, persistent=False)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the probability of `z_pres` `[batch]`, and mean and sd of `z_where`, `[batch, 3]` each."""
        z_pres, loc, scale = self.mlp(h).split([1, 3, 3], -1)
        return (
            torch.sigmoid(z_pres[:, 0]),
            self.z_where_loc + self.z_where_scale * loc,
            self.z_where_scale * softplus(scale),
        )


class Refine(nn.Module):
    """Corrects `q(z_where_t | ..)`, a Normal, after a look at the place it proposes.

    Seen from the window itself, a digit beside its middle looks the same wherever on the canvas it
    is, so that this is learned once and not for every place. A pose's `x` and `y` are in units of
    the window's half-width: what has to be added to them can be read off the crop.
    """

    def __init__(self, window_size: int, hidden_size: int, z_where_scale: Tensor):
        super().__init__()
        if window_size < 9:
            raise ValueError(f"window_size must be at least 9 for two convolutions, not {window_size}")
        side = ((window_size - 5) // 2 + 1 - 3) // 2 + 1
        self.look = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * side**2, hidden_size),
            nn.ReLU(),
        )
        self.correct = nn.Linear(hidden_size, 2 * 3)
        self.register_buffer("z_where_scale", z_where_scale, persistent=False)
        nn.init.zeros_(self.correct.weight)  # At first it changes nothing.
        nn.init.zeros_(self.correct.bias)

    def forward(self, crop: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From a crop `[batch, w, w]` around the proposed window: mean and sd, corrected, and features of what is seen.

        Shapes `[batch, 3]`, `[batch, 3]` and `[batch, hidden_size]`.
        """
        seen = self.look(crop[:, None])
        shift, factor = self.correct(seen).chunk(2, -1)
        return loc + self.z_where_scale * shift, scale * 2 * torch.sigmoid(factor), seen


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

    def start(self, n: int) -> tuple[Tensor, Tensor]:
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
