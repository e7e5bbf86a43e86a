"""Attend, Infer, Repeat as a Pyro model and guide (Eslami et al., NIPS 2016, arXiv:1603.08575).

A scene is painted object by object: up to T times, decide whether there is one more object
(`z_pres_t`), where it is (`z_where_t`) and what it looks like (`z_what_t`), and add it to the canvas.
The guide undoes that: an RNN looks at the image and proposes, object by object, the same choices;
the image is cropped at the proposed place, and an encoder looks at the crop.

What differs from the paper's description; the generative model's structure is the same:

- The log-likelihood is written as a sum of what each object adds to it (see `AIR.model`): the same
  density, but `TraceGraph_ELBO` then sees that a choice does not affect what came before it.
- The prior on the number of objects may change while training (see `AIR.set_count_prior`).
- The guide's RNN is not told `z_pres`: wherever its output matters, all earlier ones were 1.
- The image's projection into the RNN is computed once per image (see `modules.ImageLSTM`).
- The guide predicts `z_where` relative to its prior.
- The guide looks at the window that its RNN proposes, corrects it, and tells the RNN what it saw
  (`refine`).
- While training, the guide keeps a small chance of either choice of `z_pres` (`exploration`).
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.params import param_with_module_name
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from modules import Decoder, Encoder, ImageLSTM, Predict, Refine, image_to_object, object_to_image, pose_to_box

# The cost to come is some hundreds of nats. A network of unit scale would take long to reach that.
BASELINE_SCALE = 100.0
# Of a network, an image or a count: more is a mistake or, in a checkpoint, malice.
LARGEST_SIZE = 10_000
# How wide a look the guide takes at a proposed window, in widths of that window.
GLIMPSE_WIDTH = 1.5


class Step(NamedTuple):
    """What the guide carries from one step to the next."""

    rnn: tuple[Tensor, Tensor]  # state (h, c) of the guide's RNN, [n, rnn_size] each
    baseline: tuple[Tensor, Tensor]  # and of the baseline's, [n, baseline_size] each
    p_more: Tensor  # [n], q(z_pres_t = 1) given that all before it are 1
    z_pres: Tensor  # [n]; has further dimensions on the left while Pyro enumerates it
    z_where: Tensor  # [n, 3]
    z_what: Tensor  # [n, z_what_size]
    seen: Tensor  # [n, hidden_size], features of the place that `refine` looked at; [n, 0] without it


class Inference(NamedTuple):
    """What AIR sees in `n` images, by one run of the guide. A step t was used where `t < counts`."""

    counts: Tensor  # int64 [n], the number of objects
    count_probs: Tensor  # [n, T + 1], q(number of objects) given these poses and codes
    elbo: Tensor  # [n], nats: log p(x, z) - log q(z | x), of which the ELBO is the mean over samples
    z_where: Tensor  # [n, T, 3], poses [s, x, y]; see modules.py for their units
    z_what: Tensor  # [n, T, z_what_size], codes
    boxes: Tensor  # [n, T, 4], the windows as (x, y, w, h) in pixels
    x_att: Tensor  # [n, T, w, w], the windows' contents in the image
    y_att: Tensor  # [n, T, w, w], the objects as the decoder paints them
    canvases: Tensor  # [n, T + 1, h, h], the reconstruction with 0, 1, .. T objects
    reconstruction: Tensor  # [n, h, h], the one with `counts` objects


class AIR(nn.Module):
    """Model, guide and baselines; every size and prior is an argument.

    num_steps: T, the most objects an image can have.
    image_size, window_size: sides of the canvas and of an object, in pixels.
    z_what_size, rnn_size, hidden_size, baseline_size: numbers of units.
    count_ratio: the prior on the count is a geometric one cut off at T, `p(n) ~ count_ratio ** n`;
        see `set_count_prior`.
    z_where_loc, z_where_scale: mean and sd of the Normal prior on the pose `[s, x, y]`.
    likelihood_sd: sd of the Normal noise on each pixel.
    exploration: the least probability, while training, that the guide gives to either value of
        `z_pres_t`. Without it, a guide that has come to stop too early never sees what it misses.
    refine: whether the guide looks at the window that its RNN proposes, and corrects it, before it
        chooses `z_where`, and its RNN is told what was seen there; the paper's does not.
    baseline: what is subtracted from the cost of a discrete choice to reduce the variance of its
        gradient: "rnn" (a network that sees the image and the choices so far) or "none".
    """

    def __init__(
        self,
        num_steps: int = 3,
        image_size: int = 50,
        window_size: int = 28,
        z_what_size: int = 50,
        rnn_size: int = 256,
        hidden_size: int = 200,
        baseline_size: int = 64,
        count_ratio: float = 1.0,
        z_where_loc: tuple[float, float, float] = (3.0, 0.0, 0.0),
        z_where_scale: tuple[float, float, float] = (0.2, 1.0, 1.0),
        likelihood_sd: float = 0.3,
        exploration: float = 0.03,
        refine: bool = True,
        baseline: str = "rnn",
    ):
        if baseline not in ("rnn", "none"):
            raise ValueError(f"baseline must be 'rnn' or 'none', not {baseline!r}")
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        for name, size in self.config.items():
            if name.endswith(("_steps", "_size")) and not (isinstance(size, int) and 1 <= size <= LARGEST_SIZE):
                raise ValueError(f"{name} must be a whole number from 1 to {LARGEST_SIZE:,}, not {size!r}")
        for name in ("likelihood_sd", "count_ratio"):
            if not 0 < self.config[name] < math.inf:
                raise ValueError(f"{name} must be greater than 0, not {self.config[name]!r}")
        if not all(0 < scale < math.inf for scale in z_where_scale):
            raise ValueError(f"z_where_scale must be greater than 0, not {z_where_scale!r}")
        if not 0 <= exploration < 0.5:
            raise ValueError(f"exploration must be at least 0 and less than 0.5, not {exploration!r}")
        super().__init__()
        self.num_steps, self.image_size, self.window_size = num_steps, image_size, window_size
        self.z_what_size, self.likelihood_sd, self.exploration = z_what_size, likelihood_sd, exploration

        self.register_buffer("p_more", torch.empty(num_steps))  # prior's p(z_pres_t = 1 | z_pres_{t-1} = 1)
        self.set_count_prior(count_ratio)
        self.register_buffer("z_where_loc", torch.tensor(z_where_loc), persistent=False)
        self.register_buffer("z_where_scale", torch.tensor(z_where_scale), persistent=False)

        # The model's only network.
        self.decode = Decoder(z_what_size, hidden_size, window_size)
        # The guide's. The RNN is told the last pose, the last code and what was seen there.
        rnn_inputs = 3 + z_what_size + (hidden_size if refine else 0)
        self.rnn = ImageLSTM(image_size, rnn_inputs, rnn_size)
        self.predict = Predict(rnn_size, hidden_size, self.z_where_loc, self.z_where_scale)
        self.refine = Refine(window_size, hidden_size, self.z_where_scale) if refine else None
        self.encode = Encoder(window_size, hidden_size, z_what_size)
        # The baseline's: no part of either distribution, and with a learning rate of its own.
        self.baseline = Baseline(image_size, rnn_inputs, baseline_size) if baseline == "rnn" else None

    def set_count_prior(self, ratio: float) -> None:
        """Make the prior on the number of objects `p(n) ~ ratio ** n` for n = 0 .. T.

        A strict one (1e-4) at first keeps the guide from explaining one object by several halves; once
        the decoder can paint whole objects, a uniform one (1) lets it tell close neighbours apart.
        """
        weights = [ratio**n for n in range(self.num_steps + 1)]
        for t in range(self.num_steps):  # filled in one by one: a copy from the CPU would make a GPU wait
            self.p_more[t] = sum(weights[t + 1 :]) / sum(weights[t:])

    # -------------------------------------------------------------------------- generative model

    def prior_step(self, t: int, z_pres: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sample `p(z_pres_t, z_where_t, z_what_t | z_pres_{t-1})` for `n` scenes.

        Every scene takes every step; in those that are complete the mask takes what is sampled out
        of all densities, and `z_pres_t`, 0 for sure, keeps it off the canvas.
        """
        z_pres = pyro.sample(f"z_pres_{t}", dist.Bernoulli(self.p_more[t] * z_pres))
        with poutine.mask(mask=z_pres.bool()):
            pose = dist.Normal(self.z_where_loc, self.z_where_scale).expand([n, 3])
            z_where = pyro.sample(f"z_where_{t}", pose.to_event(1))
            code = dist.Normal(z_where.new_zeros(n, self.z_what_size), 1.0)
            z_what = pyro.sample(f"z_what_{t}", code.to_event(1))
        return z_pres, z_where, z_what

    def prior(self, n: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Sample what `n` scenes contain: `z_pres` (T times `[n]`), `z_where` and `z_what` (`[T, n, ..]`)."""
        z_pres = self.z_where_loc.new_ones(n)
        steps = []
        for t in range(self.num_steps):
            z_pres, z_where, z_what = self.prior_step(t, z_pres, n)
            steps.append((z_pres, z_where, z_what))
        z_pres, z_where, z_what = zip(*steps)
        return z_pres, torch.stack(z_where), torch.stack(z_what)

    def paint(self, z_where: Tensor, z_what: Tensor) -> tuple[Tensor, Tensor]:
        """Objects `y_att` `[T, n, w, w]`, and the canvases `[T + 1, n, h, h]` after 0, 1, .. T of them."""
        y_att = self.decode(z_what.flatten(0, 1))
        y = object_to_image(z_where.flatten(0, 1), y_att, self.image_size).unflatten(0, z_where.shape[:2])
        return y_att.unflatten(0, z_where.shape[:2]), torch.cat([torch.zeros_like(y[:1]), y.cumsum(0)])

    def register_parameters(self) -> None:
        """Tell Pyro all parameters, the guide's as well, so that SVI trains them.

        Pyro would go on to train another AIR's, if it knows such under the same names.
        """
        store = pyro.get_param_store()
        for name, parameter in self.named_parameters():
            name = param_with_module_name("air", name)
            if name in store and store[name] is not parameter:
                del store[name]
        pyro.module("air", self)

    def model(self, x: Tensor) -> None:
        """The joint density `p(x, z)` of images `x` `[n, h, h]` and the choices that explain them.

        With `ll_k` the log-likelihood of `x` given the canvas after k objects, and c the count,
        `log p(x | z) = ll_c = ll_0 + sum_t z_pres_t * (ll_{t+1} - ll_t)`. Written so, each choice is
        charged only with what happens from its step on, which takes most of the noise out of its
        gradient; and summing over all counts needs T + 1 canvases, not 2^T.
        """
        if torch.is_grad_enabled():
            self.register_parameters()
        with pyro.plate("scenes", len(x), dim=-1, device=x.device):
            z_pres, z_where, z_what = self.prior(len(x))
            _, canvases = self.paint(z_where, z_what)
            gains = -(x - canvases).square().sum((-2, -1)).diff(dim=0) / (2 * self.likelihood_sd**2)
            pyro.sample("x", dist.Normal(canvases[0], self.likelihood_sd).to_event(2), obs=x)
            for t in range(self.num_steps):
                with poutine.mask(mask=z_pres[t].bool()):
                    pyro.factor(f"gain_{t}", gains[t])

    # ------------------------------------------------------------------------------------- guide

    def guide_step(self, t: int, x: Tensor, projections: tuple, previous: Step) -> Step:
        """Sample `q(z_pres_t, z_where_t, z_what_t | x, earlier steps)`, by attending to one place in `x`."""
        inputs = torch.cat([previous.z_where, previous.z_what, previous.seen], -1)
        rnn = self.rnn(projections[0], inputs, previous.rnn)
        p_more, loc, scale = self.predict(rnn[0])
        if self.training:
            p_more = self.exploration + (1 - 2 * self.exploration) * p_more
        seen = previous.seen
        if self.refine is not None:
            crop = image_to_object(loc, x, self.window_size, GLIMPSE_WIDTH)
            loc, scale, seen = self.refine(crop, loc, scale)

        baseline, options = previous.baseline, {}
        if self.baseline is not None:
            # Detached: the baseline's own loss must not train the guide.
            value, baseline = self.baseline(projections[1], inputs.detach(), baseline)
            # In a complete scene nothing is left to choose, and nothing to predict.
            value = value * previous.z_pres.detach()
            # (Of a single image, Pyro wants a number, not a vector of one.)
            options = {"baseline_value": value if len(x) > 1 else value.squeeze()}

        bernoulli = dist.Bernoulli(p_more * previous.z_pres)
        z_pres = pyro.sample(f"z_pres_{t}", bernoulli, infer={"baseline": options})
        with poutine.mask(mask=z_pres.bool()):
            z_where = pyro.sample(f"z_where_{t}", dist.Normal(loc, scale).to_event(1))
            x_att = image_to_object(z_where, x, self.window_size)
            z_what = pyro.sample(f"z_what_{t}", dist.Normal(*self.encode(x_att)).to_event(1))
        return Step(rnn, baseline, p_more, z_pres, z_where, z_what, seen)

    def guide(self, x: Tensor) -> list[Step]:
        """Sample `q(z | x)` for images `[n, h, h]`; returns the T steps."""
        n = len(x)
        projections = (self.rnn.project_image(x), self.baseline and self.baseline.rnn.project_image(x))
        step = Step(
            rnn=self.rnn.start(n),
            baseline=self.baseline and self.baseline.rnn.start(n),
            p_more=x.new_ones(n),
            z_pres=x.new_ones(n),
            z_where=x.new_zeros(n, 3),
            z_what=x.new_zeros(n, self.z_what_size),
            seen=x.new_zeros(n, self.refine.correct.in_features if self.refine else 0),
        )
        steps = []
        with pyro.plate("scenes", n, dim=-1, device=x.device):
            for t in range(self.num_steps):
                step = self.guide_step(t, x, projections, step)
                steps.append(step)
        return steps

    # ---------------------------------------------------------------------------------- read-out

    @torch.no_grad()
    def prior_samples(self, counts: Tensor) -> Tensor:
        """Scenes `[n, h, h]` from the prior, as the decoder paints them, with given numbers of objects `[n]`."""
        given = {f"z_pres_{t}": (counts > t).to(self.p_more.dtype) for t in range(self.num_steps)}
        with pyro.plate("scenes", len(counts), dim=-1):
            _, z_where, z_what = poutine.condition(self.prior, given)(len(counts))
        _, canvases = self.paint(z_where, z_what)
        return canvases[counts, torch.arange(len(counts), device=counts.device)]

    @torch.no_grad()
    def log_importance_weight(self, x: Tensor) -> tuple[list[Step], Tensor]:
        """One sample of the guide for the images `x`, and its `log p(x, z) - log q(z | x)` `[n]`, in nats."""
        training = self.training
        self.eval()
        try:
            guide = poutine.trace(self.guide).get_trace(x)
            model = poutine.trace(poutine.replay(self.model, trace=guide)).get_trace(x)
        finally:
            self.train(training)
        log_probs = []
        for trace in (model, guide):
            trace.compute_log_prob()
            log_probs.append(sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site))
        return guide.nodes["_RETURN"]["value"], log_probs[0] - log_probs[1]

    @torch.no_grad()
    def infer(self, x: Tensor, sample: bool = True) -> Inference:
        """What is in the images `x`, `[n, h, h]`, floats in [0, 1] (or uint8), a tensor or an array.

        sample: whether to sample the guide, as the literature does to report accuracy, or to take at each
            choice what it holds most probable. Raises ValueError for what cannot be such images.
        """
        x = to_images(x, self.p_more.device).to(self.p_more.dtype)
        if x.shape[1:] != (self.image_size, self.image_size) or not x.numel():
            raise ValueError(f"images have shape {list(x.shape)}, expected [n, {self.image_size}, {self.image_size}]")
        if not (x.min() >= 0 and x.max() <= 1):  # false for NaN as well
            raise ValueError("images have values outside [0, 1], or NaN")
        with nullcontext() if sample else MostProbable():
            steps, log_weight = self.log_importance_weight(x)
        z_where = torch.stack([step.z_where for step in steps])
        z_what = torch.stack([step.z_what for step in steps])
        z_pres = torch.stack([step.z_pres for step in steps])
        p_more = torch.stack([step.p_more for step in steps])
        y_att, canvases = self.paint(z_where, z_what)
        x_att = torch.stack([image_to_object(pose, x, self.window_size) for pose in z_where])
        counts = z_pres.sum(0).long()
        # q(n) = (more, n times) * (then no more); after T steps it is over for sure.
        ones = torch.ones_like(p_more[:1])
        count_probs = torch.cat([ones, p_more.cumprod(0)]) * torch.cat([1 - p_more, ones])
        return Inference(
            counts=counts,
            count_probs=count_probs.mT,
            elbo=log_weight,
            z_where=z_where.transpose(0, 1),
            z_what=z_what.transpose(0, 1),
            boxes=pose_to_box(z_where, self.image_size).transpose(0, 1),
            x_att=x_att.transpose(0, 1),
            y_att=y_att.transpose(0, 1),
            canvases=canvases.transpose(0, 1),
            reconstruction=canvases[counts, torch.arange(len(x), device=x.device)],
        )


def to_images(x, device="cpu") -> Tensor:
    """Images, a tensor or an array, as the model takes them: uint8 becomes floats in [0, 1]."""
    if isinstance(x, np.ndarray):
        x = np.ascontiguousarray(x, x.dtype.newbyteorder("="))  # PyTorch takes no other byte order or negative strides.
    x = torch.as_tensor(x).to(device)
    return x.float() / 255 if x.dtype == torch.uint8 else x


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


class MostProbable(Messenger):
    """Within it, choices are not sampled: they are the mean of a Normal, the likelier value of a Bernoulli."""

    def _pyro_sample(self, msg):
        if msg["value"] is None and isinstance(msg["fn"], torch.distributions.Distribution):
            mean = msg["fn"].mean
            msg["value"] = (mean > 0.5).to(mean) if isinstance(msg["fn"], dist.Bernoulli) else mean
