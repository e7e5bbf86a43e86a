"""Attend, Infer, Repeat as a Pyro model and guide (Eslami et al., NIPS 2016, arXiv:1603.08575).

A scene is painted object by object: up to T times, decide whether there is one more object
(`z_pres_t`), where it is (`z_where_t`) and what it looks like (`z_what_t`), and add it to the canvas.
The guide undoes that: object by object, it attends to a place in the image, decides whether an object
is there, and encodes the crop.

There are two guides of one interface (`AIR(guide=..)`): "rnn" is the paper's, "residual" looks at what
the canvas does not explain yet, and has no memory (see `modules.py`). Other differences from the paper:

- The log-likelihood is written as a sum of what each object adds to it (see `AIR.model`): the same
  density, but `TraceGraph_ELBO` then sees that a choice does not affect what came before it.
- While training, the prior on the number of objects may be another (see `AIR.set_count_prior`), and
  the guide keeps a small chance of either choice of `z_pres` (`exploration`).
- No step is told `z_pres`: wherever its output matters, all earlier ones were 1.
- `z_where` is predicted relative to its prior.
"""

import math
import warnings
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

from images import FAINT, check_images, to_canvases
from modules import (
    Decoder,
    Encoder,
    ImageLSTM,
    ResidualAttention,
    RNNAttention,
    image_to_object,
    object_to_image,
    pose_to_box,
)

# The cost to come is some hundreds of nats. A network of unit scale would take long to reach that.
BASELINE_SCALE = 100.0
# Of a network, an image or a count: more is a mistake or, in a checkpoint, malice.
MAX_SIZE, MAX_STEPS = 10_000, 50


class Step(NamedTuple):
    """What the guide carries from one step to the next."""

    attention: tuple  # state of the network that attends
    baseline: tuple | None  # and of the baseline's RNN
    p_more: Tensor  # [n], q(z_pres_t = 1) given that all before it are 1
    z_pres: Tensor  # [n]; has further dimensions on the left while Pyro enumerates it
    z_where: Tensor  # [n, 3]
    z_what: Tensor  # [n, z_what_size]
    z_what_mean: Tensor  # [n, z_what_size], that of q(z_what_t | x, z_where_t)
    canvas: Tensor  # [n, h, h], what is painted so far, if all z_pres so far are 1


class Inference(NamedTuple):
    """What AIR sees in `n` images, by one run of the guide. A step t was used where `t < counts`."""

    counts: Tensor  # int64 [n], the number of objects
    count_probs: Tensor  # [n, T + 1], q(number of objects) given these poses and codes
    elbo: Tensor  # [n], nats: log p(x, z) - log q(z | x), of which the ELBO is the mean over samples
    explained: Tensor  # [n], the share of the image's ink (its squared pixels) that the reconstruction accounts for
    z_where: Tensor  # [n, T, 3], poses [s, x, y]; see modules.py for their units
    z_what: Tensor  # [n, T, z_what_size], codes
    z_what_mean: Tensor  # [n, T, z_what_size], the means of q(z_what_t | x, z_where_t)
    boxes: Tensor  # [n, T, 4], the windows as (x, y, w, h) in pixels
    x_att: Tensor  # [n, T, w, w], the windows' contents in the image
    y_att: Tensor  # [n, T, w, w], the objects as the decoder paints them
    canvases: Tensor  # [n, T + 1, h, h], the reconstruction with 0, 1, .. T objects
    reconstruction: Tensor  # [n, h, h], the one with `counts` objects


class AIR(nn.Module):
    """Model, guide and baseline; every size and prior is an argument.

    num_steps: T, the most objects an image can have; `infer` may be given another.
    image_size, window_size: sides of the canvas and of an object, in pixels.
    z_what_size, hidden_size, look_size, rnn_size, baseline_size: numbers of units: of the code, of encoder and
        decoder, of the guide's look at a place, of the LSTM of the RNN guide, of that of the baseline.
    count_ratio: the prior on the count is a geometric one cut off at T, `p(n) ~ count_ratio ** n`.
    z_where_loc, z_where_scale: mean and sd of the Normal prior on the pose `[s, x, y]`.
    likelihood_sd: sd of the Normal noise on each pixel.
    guide: "residual" or "rnn", see the module's docstring.
    exploration: the least probability, while training, that the guide gives to either value of
        `z_pres_t`. Without it, a guide that has come to stop too early never sees what it misses.
    baseline: what is subtracted from the cost of a discrete choice to reduce the variance of its
        gradient: "rnn" (a network that sees the image and the choices so far) or "none".
    """

    def __init__(
        self,
        num_steps: int = 3,
        image_size: int = 50,
        window_size: int = 28,
        z_what_size: int = 50,
        hidden_size: int = 400,
        look_size: int = 200,
        rnn_size: int = 256,
        baseline_size: int = 64,
        count_ratio: float = 1.0,
        z_where_loc: tuple[float, float, float] = (3.0, 0.0, 0.0),
        z_where_scale: tuple[float, float, float] = (0.2, 1.0, 1.0),
        likelihood_sd: float = 0.3,
        guide: str = "residual",
        exploration: float = 0.03,
        baseline: str = "rnn",
    ):
        if guide not in ("residual", "rnn"):
            raise ValueError(f"guide must be 'residual' or 'rnn', not {guide!r}")
        if baseline not in ("rnn", "none"):
            raise ValueError(f"baseline must be 'rnn' or 'none', not {baseline!r}")
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        for name, size in self.config.items():
            most = MAX_STEPS if name == "num_steps" else MAX_SIZE
            if name.endswith(("_steps", "_size")) and not (isinstance(size, int) and 1 <= size <= most):
                raise ValueError(f"{name} must be a whole number from 1 to {most:,}, not {size!r}")
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
        self.count_ratio = self.training_count_ratio = count_ratio
        self.usual_window = image_size / z_where_loc[0]  # How long a window mostly is, in pixels.
        self.register_buffer("z_where_loc", torch.tensor(z_where_loc), persistent=False)
        self.register_buffer("z_where_scale", torch.tensor(z_where_scale), persistent=False)

        # The model's only network.
        self.decode = Decoder(z_what_size, hidden_size, window_size)
        # The guide's.
        prior = z_where_loc, z_where_scale
        if guide == "residual":
            self.attend = ResidualAttention(image_size, window_size, look_size, prior)
        else:
            self.attend = RNNAttention(image_size, z_what_size, rnn_size, look_size, prior)
        self.encode = Encoder(self.attend.pictures * window_size**2, hidden_size, z_what_size)
        # The baseline's: no part of either distribution, and with a learning rate of its own.
        self.baseline = Baseline(image_size, 3 + z_what_size, baseline_size) if baseline == "rnn" else None
        self.just_painted = (), ()

    def __getstate__(self) -> dict:
        """For copies: without what was just painted, of which PyTorch refuses to make one."""
        return {**super().__getstate__(), "just_painted": ((), ())}

    def set_count_prior(self, ratio: float) -> None:
        """While training, make the prior on the number of objects `p(n) ~ ratio ** n` for n = 0 .. T.

        A strict one keeps the guide from explaining one object by several pieces.
        """
        self.training_count_ratio = ratio

    # -------------------------------------------------------------------------- generative model

    def prior_step(self, t: int, num_steps: int, z_pres: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sample `p(z_pres_t, z_where_t, z_what_t | z_pres_{t-1})` for `n` scenes.

        Every scene takes every step; in those that are complete the mask takes what is sampled out
        of all densities, and `z_pres_t`, 0 for sure, keeps it off the canvas.
        """
        ratio = self.training_count_ratio if self.training else self.count_ratio
        weights = [ratio**n for n in range(num_steps - t + 1)]  # of no more objects, one more, ..
        p_more = sum(weights[1:]) / sum(weights)
        z_pres = pyro.sample(f"z_pres_{t}", dist.Bernoulli(p_more * z_pres))
        with poutine.mask(mask=z_pres.bool()):
            pose = dist.Normal(self.z_where_loc, self.z_where_scale).expand([n, 3])
            z_where = pyro.sample(f"z_where_{t}", pose.to_event(1))
            code = dist.Normal(z_where.new_zeros(n, self.z_what_size), 1.0)
            z_what = pyro.sample(f"z_what_{t}", code.to_event(1))
        return z_pres, z_where, z_what

    def prior(self, n: int, num_steps: int) -> tuple[tuple[Tensor, ...], ...]:
        """Sample what `n` scenes contain: `z_pres` `[n]`, `z_where` and `z_what` `[n, ..]`, `num_steps` times each."""
        z_pres, steps = self.z_where_loc.new_ones(n), []
        for t in range(num_steps):
            steps.append(self.prior_step(t, num_steps, z_pres, n))
            z_pres = steps[-1][0]
        return tuple(zip(*steps))

    def paint(self, z_where: Tensor, z_what: Tensor) -> tuple[Tensor, Tensor]:
        """An object for each scene: as it is decoded, `y_att` `[n, w, w]`, and placed on a canvas, `[n, h, h]`."""
        y_att = self.decode(z_what)
        return y_att, object_to_image(z_where, y_att, self.image_size)

    def canvases(self, z_where: tuple[Tensor, ...], z_what: tuple[Tensor, ...]) -> list[Tensor]:
        """The canvases `[n, h, h]` with 0, 1, .. T objects.

        Those that the guide has just painted for itself are not painted again.
        """
        (choices, canvases), self.just_painted = self.just_painted, ((), ())
        same = len(choices) == 2 * len(z_where) and all(a is b for a, b in zip(choices, (*z_where, *z_what)))
        if same and (canvases[-1].requires_grad or not torch.is_grad_enabled()):
            return canvases
        size = self.image_size
        canvases = [z_where[0].new_zeros(len(z_where[0]), size, size)]
        for pose, code in zip(z_where, z_what):
            canvases.append(canvases[-1] + self.paint(pose, code)[1])
        return canvases

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

    def model(self, x: Tensor, num_steps: int | None = None) -> None:
        """The joint density `p(x, z)` of images `x` `[n, h, h]` and the choices that explain them.

        With `ll_k` the log-likelihood of `x` given the canvas after k objects, and c the count,
        `log p(x | z) = ll_c = ll_0 + sum_t z_pres_t * (ll_{t+1} - ll_t)`. Written so, each choice is
        charged only with what happens from its step on, which takes most of the noise out of its
        gradient; and summing over all counts needs T + 1 canvases, not 2^T.
        """
        num_steps = num_steps or self.num_steps
        if torch.is_grad_enabled():
            self.register_parameters()
        with pyro.plate("scenes", len(x), dim=-1, device=x.device):
            z_pres, z_where, z_what = self.prior(len(x), num_steps)
            canvases = self.canvases(z_where, z_what)
            pyro.sample("x", dist.Normal(canvases[0], self.likelihood_sd).to_event(2), obs=x)
            errors = [(x - canvas).square().sum((-2, -1)) / (2 * self.likelihood_sd**2) for canvas in canvases]
            for t in range(num_steps):
                with poutine.mask(mask=z_pres[t].bool()):
                    pyro.factor(f"gain_{t}", errors[t] - errors[t + 1])

    # ------------------------------------------------------------------------------------- guide

    def guide_step(self, t: int, x: Tensor, baseline_projection: Tensor | None, previous: Step) -> Step:
        """Sample `q(z_pres_t, z_where_t, z_what_t | x, earlier steps)`, by attending to one place in `x`."""
        z_where, z_what, canvas = previous.z_where, previous.z_what, previous.canvas
        logit, loc, scale, attention = self.attend(x, canvas, z_where, z_what, previous.attention)
        p_more = torch.sigmoid(logit)
        if self.training:
            p_more = self.exploration + (1 - 2 * self.exploration) * p_more

        baseline, options = None, {}
        if self.baseline is not None:
            # Detached: the baseline's own loss must not train the guide.
            inputs = torch.cat([z_where, z_what], -1).detach()
            value, baseline = self.baseline(baseline_projection, inputs, previous.baseline)
            # In a complete scene nothing is left to choose, and nothing to predict.
            value = value * previous.z_pres.detach()
            # (Of a single image, Pyro wants a number, not a vector of one.)
            options = {"baseline_value": value if len(x) > 1 else value.squeeze()}

        bernoulli = dist.Bernoulli(p_more * previous.z_pres)
        z_pres = pyro.sample(f"z_pres_{t}", bernoulli, infer={"baseline": options})
        with poutine.mask(mask=z_pres.bool()):
            z_where = pyro.sample(f"z_where_{t}", dist.Normal(loc, scale).to_event(1))
            crop = self.attend.crop(z_where, x, canvas, self.window_size)
            z_what_mean, z_what_scale = self.encode(crop)
            z_what = pyro.sample(f"z_what_{t}", dist.Normal(z_what_mean, z_what_scale).to_event(1))
        canvas = canvas + self.paint(z_where, z_what)[1]
        return Step(attention, baseline, p_more, z_pres, z_where, z_what, z_what_mean, canvas)

    def guide(self, x: Tensor, num_steps: int | None = None, look: int = 0) -> list[Step]:
        """Sample `q(z | x)` for images `[n, h, h]`; returns the steps. `look` is explained at `AIR.infer`."""
        n = len(x)
        baseline_projection = self.baseline and self.baseline.rnn.project_image(x)
        step = Step(
            attention=self.attend.start(x, look),
            baseline=self.baseline and self.baseline.rnn.start(n),
            p_more=x.new_ones(n),
            z_pres=x.new_ones(n),
            z_where=x.new_zeros(n, 3),
            z_what=x.new_zeros(n, self.z_what_size),
            z_what_mean=x.new_zeros(n, self.z_what_size),
            canvas=torch.zeros_like(x),
        )
        canvases, steps = [step.canvas], []
        with pyro.plate("scenes", n, dim=-1, device=x.device):
            for t in range(num_steps or self.num_steps):
                step = self.guide_step(t, x, baseline_projection, step)
                steps.append(step)
                canvases.append(step.canvas)
        self.just_painted = (*(step.z_where for step in steps), *(step.z_what for step in steps)), canvases
        return steps

    # ---------------------------------------------------------------------------------- read-out

    @torch.no_grad()
    def prior_samples(self, counts: Tensor) -> Tensor:
        """Scenes `[n, h, h]` from the prior, as the decoder paints them, with given numbers of objects `[n]`."""
        num_steps = int(counts.max().clamp(min=1))
        given = {f"z_pres_{t}": (counts > t).to(self.z_where_loc.dtype) for t in range(num_steps)}
        with pyro.plate("scenes", len(counts), dim=-1):
            _, z_where, z_what = poutine.condition(self.prior, given)(len(counts), num_steps)
        return torch.stack(self.canvases(z_where, z_what))[counts, torch.arange(len(counts), device=counts.device)]

    @torch.no_grad()
    def log_importance_weight(
        self, x: Tensor, num_steps: int | None = None, look: int = 0
    ) -> tuple[list[Step], Tensor]:
        """One sample of the guide for the images `x`, and its `log p(x, z) - log q(z | x)` `[n]`, in nats."""
        guide, model = self.traces(x, num_steps, look)
        log_p, log_q = (
            sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site) for trace in (model, guide)
        )
        return guide.nodes["_RETURN"]["value"], log_p - log_q

    @torch.no_grad()
    def traces(self, x: Tensor, num_steps: int | None = None, look: int = 0) -> tuple[poutine.Trace, poutine.Trace]:
        """A sample of the guide, and what the model makes of it: their traces, with log-probabilities, as evaluated."""
        training = self.training
        self.eval()
        try:
            guide = poutine.trace(self.guide).get_trace(x, num_steps, look)
            model = poutine.trace(poutine.replay(self.model, trace=guide)).get_trace(x, num_steps)
        finally:
            self.train(training)
        guide.compute_log_prob()
        model.compute_log_prob()
        return guide, model

    def infer(
        self, x: Tensor | np.ndarray, sample: bool = True, num_steps: int | None = None, looks: int = 1
    ) -> Inference:
        """What is in the images `x`, see `explain` for the rest.

        x: an array `[n, h, w]` of any images, which are brought to the model by the rule in images.py, with a warning
            that says what was done; or a tensor of canvases `[n, h, h]`, floats in [0, 1] (or uint8), light on black.

        Boxes are in pixels of the canvas. Raises ValueError for what cannot be such images.
        """
        if isinstance(x, np.ndarray):
            check_images(x)
            canvases = to_canvases([x], self.image_size)
            for remark in canvases.remarks:
                warnings.warn(remark, stacklevel=2)
            return self.explain(to_images(canvases.x), sample, num_steps, looks)
        x = to_images(x, self.z_where_loc.device)
        if x.shape[1:] != (self.image_size, self.image_size) or not x.numel():
            raise ValueError(f"images have shape {list(x.shape)}, expected [n, {self.image_size}, {self.image_size}]")
        if not (x.min() >= 0 and x.max() <= 1):  # false for NaN as well
            raise ValueError("images have values outside [0, 1], or NaN")
        border, brightest = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1).median(1)[0], x.amax((1, 2))
        if (border > 0.04).any() or ((0 < brightest) & (brightest < FAINT)).any():
            raise ValueError("canvases must be light on black; an array of images is brought to that, a tensor is not")
        return self.explain(x, sample, num_steps, looks)

    @torch.no_grad()
    def explain(self, x: Tensor, sample: bool = True, num_steps: int | None = None, looks: int = 1) -> Inference:
        """What is on canvases `[n, h, h]`, floats.

        sample: whether to sample the guide, as the literature does to report accuracy, or to take at each
            choice what it holds most probable (see `MostProbable`).
        num_steps: T, the most objects that can be found, if not as many as in training.
        looks: how many times to look at each image; what explains it best, with the largest
            `log p(x, z) - log q(z | x)`, is kept. The residual guide looks at slightly other places each time, which
            mends many of its mistakes; the RNN guide sees the same again.
        """
        if num_steps is not None and not 1 <= num_steps <= MAX_STEPS:
            raise ValueError(f"num_steps must be from 1 to {MAX_STEPS}, not {num_steps}")
        if looks < 1:
            raise ValueError(f"looks must be at least 1, not {looks}")
        x = x.to(self.z_where_loc)
        kept = None
        for look in range(looks):
            with nullcontext() if sample else MostProbable():
                steps, log_weight = self.log_importance_weight(x, num_steps, look)
            names = ("p_more", "z_pres", "z_where", "z_what", "z_what_mean", "canvas")
            seen = [log_weight, *(torch.stack([getattr(step, name) for step in steps], 1) for name in names)]
            kept = kept or seen
            better = log_weight > kept[0]
            kept = [torch.where(better.view(-1, *[1] * (part.dim() - 1)), new, part) for part, new in zip(kept, seen)]
        log_weight, p_more, z_pres, z_where, z_what, z_what_mean, canvases = kept
        canvases = torch.cat([torch.zeros_like(x)[:, None], canvases], 1)
        counts = z_pres.sum(1).long()
        reconstruction = canvases[torch.arange(len(x), device=x.device), counts]
        error, ink = ((part**2).sum((1, 2)) for part in (x - reconstruction, x))
        # q(n) = (more, n times) * (then no more); after T steps it is over for sure.
        ones = torch.ones_like(p_more[:, :1])
        return Inference(
            counts=counts,
            count_probs=torch.cat([ones, p_more.cumprod(1)], 1) * torch.cat([1 - p_more, ones], 1),
            elbo=log_weight,
            explained=1 - (error / ink.clamp(min=1e-6)).clamp(max=1),
            z_where=z_where,
            z_what=z_what,
            z_what_mean=z_what_mean,
            boxes=pose_to_box(z_where, self.image_size),
            x_att=torch.stack([image_to_object(pose, x, self.window_size) for pose in z_where.unbind(1)], 1),
            y_att=torch.stack([self.decode(code) for code in z_what.unbind(1)], 1),
            canvases=canvases,
            reconstruction=reconstruction,
        )


def to_images(x, device=None) -> Tensor:
    """Images, a tensor or an array, as the model takes them: uint8 becomes floats in [0, 1]."""
    if isinstance(x, np.ndarray):
        x = np.ascontiguousarray(x, x.dtype.newbyteorder("="))  # PyTorch takes no other byte order or negative strides.
    x = torch.as_tensor(x, device=device)
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
    """Within it nothing depends on chance: a Bernoulli takes its likelier value, a pose its mean.

    A code takes one fixed draw of its noise: the decoder has learned to paint from noisy codes, not from their means.
    """

    def _pyro_sample(self, msg):
        fn = msg["fn"]
        if msg["value"] is not None or not isinstance(fn, torch.distributions.Distribution):
            return
        if isinstance(fn, dist.Bernoulli):
            msg["value"] = (fn.mean > 0.5).to(fn.mean)
        elif msg["name"].startswith("z_what"):
            noise = torch.randn(fn.event_shape, generator=torch.Generator().manual_seed(0))
            msg["value"] = fn.mean + fn.stddev * noise.to(fn.mean)
        else:
            msg["value"] = fn.mean
