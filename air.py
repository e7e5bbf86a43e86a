"""Attend, Infer, Repeat as a Pyro model and guide (Eslami et al., NIPS 2016, arXiv:1603.08575).

A scene is painted object by object: up to T times, decide whether there is one more object
(`z_pres_t`), where it is (`z_where_t`) and what it looks like (`z_what_t`), and add it to the canvas.
The guide undoes that: object by object, it attends to a place in the image, decides whether an object
is there, and encodes the crop.

There are two guides of one interface (`AIR(guide=..)`): "rnn" is the paper's, "residual" looks at what
the canvas does not explain yet. That is an idea of the paper as well, which feeds its RNN with the difference
(*Difference AIR*). New are that the guide has no memory, finds one place to look at without parameters, and looks
twice (see `modules.py`). Other differences from the paper:

- The log-likelihood is written as a sum of what each object adds to it (see `AIR.model`): the same
  density, but `TraceGraph_ELBO` then sees that a choice does not affect what came before it.
- The prior on the number of objects is a strict one: an object costs 6 nats, see `count_ratio`.
- No step is told `z_pres`: wherever its output matters, all earlier ones were 1.
- `z_where` is predicted relative to its prior.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.params import param_with_module_name
from torch import Tensor, nn

from modules import (
    Decoder,
    Encoder,
    ImageLSTM,
    Look,
    ResidualAttention,
    RNNAttention,
    Step,
    image_to_object,
    object_to_image,
    to_channels,
)

# The cost to come is some hundreds of nats. A network of unit scale would take long to reach that.
BASELINE_SCALE = 100.0
MAX_OBJECTS = 50  # that a model may be made for


class Slot(NamedTuple):
    """What the guide chose at a step, for `n` images, and what it carries to the next."""

    state: tuple  # of the network that attends
    baseline_state: tuple | None  # of the baseline's RNN
    z_pres_prob: Tensor  # [n], q(z_pres_t = 1) given that all before it are 1
    z_pres: Tensor  # [n]; has further dimensions on the left while Pyro enumerates it
    z_where: Tensor  # [n, 3]
    z_what: Tensor  # [n, z_what_size]
    z_what_mean: Tensor  # [n, z_what_size], that of q(z_what_t | x, z_where_t)
    canvas: Tensor  # [n, h, h], what is painted so far, if all z_pres so far are 1


class AIR(nn.Module):
    """Model, guide and baseline; every size and prior is an argument.

    max_objects: T, the most objects an image can have; model and guide may be given another.
    image_size, window_size: sides of the canvas and of an object, in pixels.
    z_what_size, hidden_size, look_size, rnn_size, baseline_size: numbers of units: of the code, of encoder and
        decoder, of the guide's look at a place, of the LSTM of the RNN guide, of that of the baseline.
    count_ratio: the prior on the count is a geometric one cut off at T, `p(n) ~ count_ratio ** n`. A small one keeps
        one object from being explained by several pieces. The search has a price of its own, `inference.PRICE`.
    z_where_loc, z_where_scale: mean and sd of the Normal prior on the pose `[s, x, y]`.
    likelihood_sd: sd of the Normal noise on each pixel.
    guide: "residual" or "rnn", see the module's docstring.
    baseline: what is subtracted from the cost of a discrete choice to reduce the variance of its
        gradient: "rnn" (a network that sees the image and the choices so far) or "none".
    """

    def __init__(
        self,
        max_objects: int = 3,
        image_size: int = 50,
        window_size: int = 28,
        z_what_size: int = 50,
        hidden_size: int = 400,
        look_size: int = 200,
        rnn_size: int = 256,
        baseline_size: int = 64,
        count_ratio: float = math.exp(-6),
        z_where_loc: tuple[float, float, float] = (3.0, 0.0, 0.0),
        z_where_scale: tuple[float, float, float] = (0.2, 1.0, 1.0),
        likelihood_sd: float = 0.3,
        guide: str = "residual",
        baseline: str = "rnn",
    ):
        if guide not in ("residual", "rnn"):
            raise ValueError(f"guide must be 'residual' or 'rnn', not {guide!r}")
        if baseline not in ("rnn", "none"):
            raise ValueError(f"baseline must be 'rnn' or 'none', not {baseline!r}")
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        for name, value in self.config.items():
            if name.endswith(("_objects", "_size")) and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")
        if max_objects > MAX_OBJECTS:
            raise ValueError(f"max_objects must be at most {MAX_OBJECTS}, not {max_objects}")
        if not all(0 < value < math.inf for value in (likelihood_sd, count_ratio, *z_where_scale)):
            raise ValueError("likelihood_sd, count_ratio and z_where_scale must be greater than 0")
        super().__init__()
        self.max_objects, self.image_size, self.window_size = max_objects, image_size, window_size
        self.z_what_size, self.likelihood_sd, self.count_ratio = z_what_size, likelihood_sd, count_ratio
        self.usual_window = image_size / z_where_loc[0]  # How long a window usually is, in pixels.
        self.register_buffer("z_where_loc", torch.tensor(z_where_loc), persistent=False)
        self.register_buffer("z_where_scale", torch.tensor(z_where_scale), persistent=False)

        # The model's only network.
        self.decode = Decoder(z_what_size, hidden_size, window_size)
        # The guide's. The encoder of the residual guide also sees what the canvas lacks.
        prior = z_where_loc, z_where_scale
        self.sees_residual = guide == "residual"
        if self.sees_residual:
            self.attend = ResidualAttention(image_size, window_size, look_size, prior)
        else:
            self.attend = RNNAttention(image_size, z_what_size, rnn_size, look_size, prior)
        self.encode = Encoder(2 if self.sees_residual else 1, window_size, hidden_size, z_what_size)
        # The baseline's: no part of either distribution, and with a learning rate of its own.
        self.baseline = Baseline(image_size, 3 + z_what_size, baseline_size) if baseline == "rnn" else None
        self.familiarity = Familiarity(1 + z_what_size)  # has no part in training

    # -------------------------------------------------------------------------- generative model

    def prior(self, n: int, max_objects: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Sample `p(z)` for `n` scenes: `z_pres_t`, `z_where_t` and `z_what_t` of each step, given `z_pres_{t-1}`.

        Every scene takes all steps. Once it is complete, the mask takes what is sampled out of all
        densities, and `z_pres_t`, then always 0, keeps it off the canvas.
        """
        steps, z_pres = [], self.z_where_loc.new_ones(n)
        for t in range(max_objects):
            weights = [self.count_ratio**k for k in range(max_objects - t + 1)]  # of no more objects, one more, ..
            p_more = sum(weights[1:]) / sum(weights)
            z_pres = pyro.sample(f"z_pres_{t}", dist.Bernoulli(p_more * z_pres))
            with poutine.mask(mask=z_pres.bool()):
                pose = dist.Normal(self.z_where_loc, self.z_where_scale).expand([n, 3])
                z_where = pyro.sample(f"z_where_{t}", pose.to_event(1))
                code = dist.Normal(z_where.new_zeros(n, self.z_what_size), 1.0)
                z_what = pyro.sample(f"z_what_{t}", code.to_event(1))
            steps.append((z_pres, z_where, z_what))
        return steps

    def features(self, z_where: Tensor, z_what: Tensor) -> Tensor:
        """What `Familiarity` is told of objects, `[.., 1 + z_what_size]`: size and code, by the prior N(0, 1) each."""
        return torch.cat([(z_where[..., :1] - self.z_where_loc[0]) / self.z_where_scale[0], z_what], -1)

    def paint(self, z_where: Tensor, z_what: Tensor) -> Tensor:
        """One object for each scene, decoded and placed on an empty canvas, `[n, h, h]`."""
        return object_to_image(z_where, self.decode(z_what), self.image_size)

    def register_parameters(self) -> None:
        """Tell Pyro all parameters, the guide's as well, so that SVI trains them.

        Pyro knows parameters by name, and would go on to train those of an AIR that it was told of before.
        """
        store = pyro.get_param_store()
        for name, parameter in self.named_parameters():
            name = param_with_module_name("air", name)
            if name in store and store[name] is not parameter:
                del store[name]
        pyro.module("air", self)

    def model(self, x: Tensor | None = None, num_scenes: int = 1, max_objects: int | None = None) -> Tensor:
        """Sample `p(x, z)`: `num_scenes` scenes `[n, h, h]`; or, given the images `x`, be its density there.

        Given x, "x" itself has no part in the density (it is masked). With `ll_k` the log-likelihood of `x` given the
        canvas after k objects, and c the count, we write instead
        `log p(x | z) = ll_c = ll_0 + sum_t z_pres_t * (ll_{t+1} - ll_t)`: the same number, but each choice is
        charged only with what happens from its step on, which takes most of the noise out of its
        gradient; and summing over all counts needs T + 1 canvases, not 2^T.
        """
        max_objects = max_objects or self.max_objects
        if torch.is_grad_enabled():
            self.register_parameters()
        n = num_scenes if x is None else len(x)
        with pyro.plate("scenes", n, dim=-1, device=self.z_where_loc.device):
            steps = self.prior(n, max_objects)
            canvases = [self.z_where_loc.new_zeros(n, self.image_size, self.image_size)]
            for _, z_where, z_what in steps:
                canvases.append(canvases[-1] + self.paint(z_where, z_what))
            counts = sum(z_pres for z_pres, _, _ in steps).long()
            scenes = x
            if x is None or counts.dim() == 1:  # Pyro needs no scenes while it enumerates z_pres.
                means = torch.stack(canvases)[counts, torch.arange(n, device=counts.device)]
                pixels = dist.Normal(means, self.likelihood_sd).to_event(2)
                scenes = pyro.sample("x", pixels.mask(x is None), obs=x)
            if x is not None:
                pyro.factor("empty", dist.Normal(canvases[0], self.likelihood_sd).to_event(2).log_prob(x))
                errors = [(x - canvas).square().sum((-2, -1)) / (2 * self.likelihood_sd**2) for canvas in canvases]
                for t, (z_pres, _, _) in enumerate(steps):
                    with poutine.mask(mask=z_pres.bool()):
                        pyro.factor(f"gain_{t}", errors[t] - errors[t + 1])
        return scenes

    # ------------------------------------------------------------------------------------- guide

    def crop(self, z_where: Tensor, x: Tensor, canvas: Tensor) -> Tensor:
        """What the encoder sees: the window in the image, and with the residual guide in what the canvas lacks."""
        seen = to_channels(x - canvas.detach(), x) if self.sees_residual else x[:, None]
        return image_to_object(z_where, seen, self.window_size)

    def guide_step(self, t: int, x: Tensor, look: Look, baseline_projection: Tensor | None, previous: Slot) -> Slot:
        """Sample `q(z_pres_t, z_where_t, z_what_t | x, earlier steps)`, by attending to one place in `x`."""
        z_where, z_what, canvas = previous.z_where, previous.z_what, previous.canvas
        x = x if look.side is None else torch.where(look.side, x, canvas)
        logit, loc, scale, state = self.attend(Step(x, canvas, z_where, z_what, previous.state, look))
        z_pres_prob = torch.sigmoid(logit)
        baseline_state, options = None, {}
        if baseline_projection is not None:
            # Detached: the baseline's own loss must not train the guide.
            inputs = torch.cat([z_where, z_what], -1).detach()
            value, baseline_state = self.baseline(baseline_projection, inputs, previous.baseline_state)
            # In a complete scene nothing is left to choose, and nothing to predict.
            value = value * previous.z_pres.detach()
            # (Of a single image, Pyro wants a number, not a vector of one.)
            options = {"baseline_value": value if len(x) > 1 else value.squeeze()}

        bernoulli = dist.Bernoulli(z_pres_prob * previous.z_pres)
        z_pres = pyro.sample(f"z_pres_{t}", bernoulli, infer={"baseline": options})
        with poutine.mask(mask=z_pres.bool()):
            z_where = pyro.sample(f"z_where_{t}", dist.Normal(loc, scale).to_event(1))
            z_what_mean, z_what_scale = self.encode(self.crop(z_where, x, canvas))
            z_what = pyro.sample(f"z_what_{t}", dist.Normal(z_what_mean, z_what_scale).to_event(1))
        canvas = canvas + self.paint(z_where, z_what)
        return Slot(state, baseline_state, z_pres_prob, z_pres, z_where, z_what, z_what_mean, canvas)

    def guide(
        self, x: Tensor, max_objects: int | None = None, canvas: Tensor | None = None, looks: Sequence[Look] = ()
    ) -> list[Slot]:
        """Sample `q(z | x)` for images `[n, h, h]`; returns the steps.

        canvas: what is painted already, `[n, h, h]`; nothing, if not given. looks: where the residual guide looks at
        each step, if not at the peaks. Having no memory, it may begin with any canvas, and look anywhere.
        """
        n = len(x)
        baseline = self.baseline if canvas is None else None  # It predicts what is gained from an empty canvas on.
        baseline_projection = baseline and baseline.rnn.project_image(x)
        slots = [
            Slot(
                state=self.attend.init_state(x),
                baseline_state=baseline and baseline.rnn.init_state(n),
                z_pres_prob=x.new_ones(n),
                z_pres=x.new_ones(n),
                z_where=x.new_zeros(n, 3),
                z_what=x.new_zeros(n, self.z_what_size),
                z_what_mean=x.new_zeros(n, self.z_what_size),
                canvas=torch.zeros_like(x) if canvas is None else canvas,
            )
        ]
        with pyro.plate("scenes", n, dim=-1, device=x.device):
            for t in range(max_objects or self.max_objects):
                look = looks[t] if looks else Look()
                slots.append(self.guide_step(t, x, look, baseline_projection, slots[-1]))
        return slots[1:]


class Baseline(nn.Module):
    """Predicts, at each choice of `z_pres`, what is still to be gained, in nats: a data-dependent baseline.

    It parameterizes no distribution. It is trained to predict the part of the ELBO that comes after
    a choice, and what it predicts is subtracted there before the choice is credited with it.
    """

    def __init__(self, image_size: int, input_size: int, state_size: int):
        super().__init__()
        self.rnn = ImageLSTM(image_size, input_size, state_size)
        self.linear = nn.Linear(state_size, 1)
        self.scale = BASELINE_SCALE

    def forward(self, projection: Tensor, inputs: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        state = self.rnn(projection, inputs, state)
        return self.scale * self.linear(state[0])[:, 0], state


class Familiarity(nn.Module):
    """By how many nats an object is likelier, given what objects turned out to be, than it is by the prior.

    A mixture of Gaussians over `AIR.features`. Training knows nothing of it; `evaluation.learn_objects` fits it at the
    end of a run to what was found, and until then it is the prior. (A density that is fitted to the codes of a trained
    autoencoder: ex-post density estimation, Ghosh et al., ICLR 2020, arXiv:1903.12436.)
    """

    def __init__(self, size: int, components: int = 30):
        super().__init__()
        self.register_buffer("logits", torch.zeros(components))
        self.register_buffer("loc", torch.zeros(components, size))
        self.register_buffer("scale_tril", torch.eye(size).repeat(components, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """`[.., size]` to `[..]`."""
        gaussians = dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)
        mixture = dist.MixtureSameFamily(dist.Categorical(logits=self.logits), gaussians)
        return mixture.log_prob(features) - dist.Normal(0.0, 1.0).log_prob(features).sum(-1)
