"""The networks of AIR and its spatial transformers: plain torch.nn, nothing of Pyro.

A pose `z_where = [s, x, y]` (shape `[batch, 3]`) puts a square window on a square canvas. In canvas
coordinates, which run from -1 to 1 over the whole canvas, x to the right and y downwards, the
window's half-width is `1/s` and its centre lies at `(-x/s, -y/s)`. So `s = 1, x = y = 0` is the whole
canvas, and larger `s` is a smaller window. `s` is taken to be at least 1 (`MIN_SCALE`): a window is
never larger than the canvas, and `1/s` never blows up.
"""

import math
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

MIN_SCALE = 1.0
# Mean and standard deviation of the prior on a pose.
PosePrior = tuple[tuple[float, float, float], tuple[float, float, float]]


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
    Of k images side by side, `[batch, h, k * h]`, the crops are side by side, `[batch, w, k * w]`.
    """
    s, xy = (part / widen for part in split_pose(z_where))
    centres = pixel_centres(window_size, z_where)
    columns, rows = bilinear_weights((centres - xy) / s, images.shape[-2]).unbind(1)
    crops = (rows @ images).unflatten(-1, (-1, images.shape[-2])).flatten(1, 2) @ columns.mT
    return crops.unflatten(1, (window_size, -1)).flatten(2)


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
    """Parameterizes `q(z_what_t | ..)`, a Normal, from a crop `[batch, w, k * w]` of `crop_size` pixels in all."""

    def __init__(self, crop_size: int, hidden_size: int, z_what_size: int):
        super().__init__()
        self.mlp = MLP(crop_size, hidden_size, 2 * z_what_size)

    def forward(self, crop: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation, `[batch, z_what_size]` each."""
        loc, scale = self.mlp(crop.flatten(1)).chunk(2, -1)
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


class RNNAttention(nn.Module):
    """The paper's guide. Parameterizes `q(z_pres_t | ..)`, a Bernoulli, and `q(z_where_t | ..)`, a Normal.

    An LSTM sees the image and, of the step before, pose and code. `z_where` is predicted relative to its
    prior, so that the first guess is a plausible window. The encoder sees the image.
    """

    pictures = 1  # that the encoder sees
    looks = 1  # at an image that pay

    def __init__(self, image_size: int, z_what_size: int, rnn_size: int, hidden_size: int, prior: PosePrior):
        super().__init__()
        self.rnn = ImageLSTM(image_size, 3 + z_what_size, rnn_size)
        self.predict = MLP(rnn_size, hidden_size, 1 + 2 * 3)
        self.register_buffer("z_where_loc", torch.tensor(prior[0]), persistent=False)
        self.register_buffer("z_where_scale", torch.tensor(prior[1]), persistent=False)

    def start(self, x: Tensor, look: int = 0) -> tuple:
        """What is carried from step to step, before the first: the image's projection, and the LSTM's state."""
        return self.rnn.project_image(x), self.rnn.start(len(x))

    def forward(self, x: Tensor, canvas: Tensor, z_where: Tensor, z_what: Tensor, state: tuple) -> tuple:
        """One step for images `[batch, h, h]`, of which `z_where` and `z_what` of the step before are known.

        Returns the logit of `z_pres` `[batch]`, mean and sd of `z_where` `[batch, 3]` each, and the next state.
        """
        projection, state = state
        state = self.rnn(projection, torch.cat([z_where, z_what], -1), state)
        z_pres, loc, scale = self.predict(state[0]).split([1, 3, 3], -1)
        loc, scale = self.z_where_loc + self.z_where_scale * loc, self.z_where_scale * softplus(scale)
        return z_pres[:, 0], loc, scale, (projection, state)

    def crop(self, z_where: Tensor, x: Tensor, canvas: Tensor, window_size: int) -> Tensor:
        """What the encoder sees: the window in the image, `[batch, w, w]`."""
        return image_to_object(z_where, x, window_size)


class ResidualAttention(nn.Module):
    """A guide that looks at what is left: parameterizes `q(z_pres_t | ..)`, a Bernoulli, `q(z_where_t | ..)`, a Normal.

    Every step is the same: it sees the image and the residual, what the canvas does not explain yet, and has no
    memory. So what it learns of one more object holds for any number of them.

    1. The canvas is thickened before it is taken off the image: otherwise the edges of an imperfectly painted
       object look like one more object.
    2. One place is chosen, where most is left in about an object's size, and less around it. (The mean of two
       places would be a place between two objects, where there is nothing.)
    3. A network looks at that place, twice as wide as an ordinary window, and proposes a window; another looks at
       the window, corrects it and decides whether there is one more object.

    The place has no parameters, and no gradient passes through the canvas that the guide sees: what an earlier object
    has to do with later steps is left out of the gradient, which is biased by that. (Without this stop-gradient the
    ELBO is 2 nats lower at step 500 of a default run, three seeds: docs/inference.md.)
    """

    pictures, looks = 2, 5  # as above
    first_look, second_look = 2.0, 1.5  # how wide, in widths of the window

    def __init__(self, image_size: int, window_size: int, hidden_size: int, prior: PosePrior):
        super().__init__()
        self.window_size = window_size
        self.window = 2 / prior[0][0]  # an ordinary one's side, in canvas coordinates
        window = image_size / prior[0][0]  # and in pixels
        self.thickness = 2 * round(window / 16) + 1
        # Sums over squares are products with matrices of ones near the diagonal, from both sides.
        pixels = torch.arange(image_size)
        apart = (pixels[:, None] - pixels).abs()
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

    def start(self, x: Tensor, look: int = 0) -> tuple:
        """What is carried from step to step, and stays as it is: how far to look from the place, (x, y).

        The first look, 0, is at the place; later ones are a fifth of a window away from it, each in another direction.
        """
        if look == 0:
            return (x.new_zeros(2),)
        turn = 2.4 * look  # The golden angle: any number of looks are spread evenly.
        return (0.2 * self.window * x.new_tensor([math.cos(turn), math.sin(turn)]),)

    @torch.no_grad()
    def residual(self, x: Tensor, canvas: Tensor) -> Tensor:
        """What the thickened canvas leaves of the image, `[batch, h, h]`."""
        size, reach = x.shape[-1], self.thickness // 2
        thick = pad(canvas, (reach,) * 4)
        # The largest of shifted copies, along y and then along x: much faster here than max_pool2d.
        thick = reduce(torch.maximum, (thick[:, i : i + size] for i in range(self.thickness)))
        thick = reduce(torch.maximum, (thick[..., i : i + size] for i in range(self.thickness)))
        return (x - thick).clamp(min=0)

    @torch.no_grad()
    def place(self, residual: Tensor) -> Tensor:
        """The place `[batch, 2]`, (x, y) in canvas coordinates, of which most is left."""
        size = residual.shape[-1]
        score = self.inner @ residual @ self.inner - self.outer @ residual @ self.outer
        at = score.flatten(1).argmax(-1)
        return torch.stack([self.centres[at % size], self.centres[at // size]], -1)

    def forward(self, x: Tensor, canvas: Tensor, z_where: Tensor, z_what: Tensor, state: tuple) -> tuple:
        """One step for images and canvases `[batch, h, h]`; the step before is not looked at.

        Returns the logit of `z_pres` `[batch]`, mean and sd of `z_where` `[batch, 3]` each, and the state.
        """
        residual = self.residual(x, canvas)
        place, pictures = self.place(residual) + state[0], torch.cat([residual, x], -1)
        s = self.z_where_loc[0]
        window = torch.cat([s.expand(len(x), 1), -s * place], -1)
        seen = self.look(image_to_object(window, pictures, self.window_size, self.first_look))
        shift, scale = self.propose(seen).chunk(2, -1)
        s = s + self.z_where_scale[0] * shift[:, :1]
        # 0.6: at first the window stays near the place.
        loc = torch.cat([s, 0.6 * shift[:, 1:] - s * place], -1)
        seen_closer = self.look_closer(image_to_object(loc, pictures, self.window_size, self.second_look))
        shift, factor = self.correct(seen_closer).chunk(2, -1)
        loc = loc + self.z_where_scale * shift
        scale = self.z_where_scale * softplus(scale) * 2 * torch.sigmoid(factor)
        return self.present(torch.cat([seen, seen_closer], -1))[:, 0], loc, scale, state

    def crop(self, z_where: Tensor, x: Tensor, canvas: Tensor, window_size: int) -> Tensor:
        """What the encoder sees: the window in what the canvas lacks and in the image, `[batch, w, 2 * w]`."""
        return image_to_object(z_where, torch.cat([x - canvas.detach(), x], -1), window_size)


class ConvNet(nn.Sequential):
    """Features `[batch, size]` of pictures side by side, `[batch, w, pictures * w]`, by two convolutions."""

    def __init__(self, pictures: int, window_size: int, size: int):
        if window_size < 9:
            raise ValueError(f"window_size must be at least 9 for two convolutions, not {window_size}")
        side = ((window_size - 5) // 2 + 1 - 3) // 2 + 1
        super().__init__(
            nn.Conv2d(pictures, 16, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * side**2, size),
            nn.ReLU(),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return super().forward(pictures.unflatten(-1, (-1, pictures.shape[1])).transpose(1, 2))


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
