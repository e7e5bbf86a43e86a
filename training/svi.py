"""Stochastic variational inference for AIR: the estimators, the optimizer, the schedules, steps that go wrong."""

import math
import sys

import numpy as np
import pyro
import torch
from pyro.infer import SVI, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.optim import PyroOptim
from torch.nn.utils import clip_grads_with_norm_
from tqdm import tqdm

from air import AIR
from training.parallel import Processes

# So many skipped steps within so many end a run.
MAX_SKIPPED_STEPS, SKIPPED_WITHIN = 3, 100
DIGIT_WINDOW = 50 / 3  # How long windows on multi-MNIST's digits are by the prior on poses, in pixels.


class NonFiniteError(ArithmeticError):
    """A run came to numbers that are not finite, from which nothing can be learned."""


def make_svi(
    air: AIR, estimator: str, processes: Processes | None = None, clip: bool = True
) -> tuple[SVI, torch.optim.Adam]:
    """The inference algorithm, and the optimizer behind it: one Adam, with a parameter group for the baseline's rate.

    estimator: "tracegraph" samples `z_pres` and reduces the variance of its gradient; "traceenum" sums
        over its values, all T + 1 counts, and has no such variance. The rest is sampled by both.
    clip: whether to cut gradients that are much longer than usual, see `clip_gradient`.

    `svi.step(x)` returns the loss, minus the ELBO summed over the mini-batch. It is NaN if the loss or the
    gradient is not finite, in one of the processes; the parameters are then left as they were.
    """
    processes = processes or Processes()
    baseline = [p for name, p in air.named_parameters() if name.startswith("baseline.")]
    others = [p for name, p in air.named_parameters() if not name.startswith("baseline.")]
    # A short memory of squared gradients: with the usual 0.999, a rare step can put out `z_pres` for good.
    groups = [{"params": group, "running_norm": 0.0} for group in (others, baseline) if group]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    if estimator == "tracegraph":
        guide, elbo = air.guide, TraceGraph_ELBO(max_plate_nesting=1)
    else:
        # z_pres is the guide's only discrete choice.
        guide, elbo = config_enumerate(air.guide), TraceEnum_ELBO(max_plate_nesting=1)

    def loss_and_grads(model, guide, x):
        try:
            loss = elbo.loss_and_grads(model, guide, x)
        except (RuntimeError, ValueError):
            if is_finite(guide, x):
                raise
            loss = math.nan
        loss, norms = processes.all_reduce_gradients(loss, [group["params"] for group in adam.param_groups])
        if not math.isfinite(loss + sum(norms)):
            adam.zero_grad()  # Without gradients the optimizer's step changes nothing.
            return math.nan
        if clip:
            for group, norm in zip(adam.param_groups, norms):
                clip_gradient(group, norm)
        return loss

    return SVI(air.model, guide, SingleOptimizer(adam), elbo.loss, loss_and_grads), adam


class SingleOptimizer(PyroOptim):
    """Lets SVI step one torch optimizer for all parameters, where Pyro would make one for each of them."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def __call__(self, params) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def clip_gradient(group: dict, norm: float, factor: float = 1.2, memory: float = 0.98) -> None:
    """Make the gradient of a parameter group, of that norm, at most `factor` times as long as it usually is."""
    running = group["running_norm"] or norm
    group["running_norm"] = memory * running + (1 - memory) * min(norm, 3 * running)
    clip_grads_with_norm_(group["params"], factor * group["running_norm"], torch.tensor(norm))


@torch.no_grad()
def is_finite(guide, x: torch.Tensor) -> bool:
    """Whether the guide's distributions have parameters that are numbers, by Pyro's own validation.

    (PyTorch refuses to sample a Bernoulli of NaN with a RuntimeError, which can mean anything.)
    """
    try:
        with pyro.validation_enabled():
            guide(x)
    except ValueError:
        return False
    return True


def skip_step(step: int, skipped: list[int], is_main: bool) -> None:
    """Note in `skipped` that the step after `step` was skipped. Raises NonFiniteError where too many were."""
    if is_main:
        tqdm.write(f"skipped step {step + 1}: loss or gradient is not finite", sys.stderr)
    skipped[:] = [earlier for earlier in skipped if earlier > step - SKIPPED_WITHIN] + [step]
    if len(skipped) == MAX_SKIPPED_STEPS:
        counts = f"{MAX_SKIPPED_STEPS} of {SKIPPED_WITHIN} steps were skipped"
        raise NonFiniteError(f"{counts}, loss or gradient is not finite; a smaller --learning-rate may help")


def check_finite(air: AIR, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Raise NonFiniteError if parameters or optimizer are not finite: nothing can be learned from there."""
    moments = [value for state in optimizer.state.values() for value in state.values()]
    if not all(value.isfinite().all() for value in [*air.parameters(), *moments]):
        raise NonFiniteError(f"after step {step} the parameters are not finite, and are not saved")


def schedule(step: int, num_steps: int, warm_up: int = 100) -> float:
    """The learning rate at `step`, as a part of its largest: a short linear rise, then half a cosine down to 0."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def count_ratio(step: int, num_steps: int, window: float = DIGIT_WINDOW) -> float:
    """The ratio of the prior on the count at `step`, while training; `window`: how long windows usually are, in pixels.

    Strict from the 200th step on, and slowly less so, so that one object is not explained by several pieces; but not
    at first: before the decoder can paint anything, everything would become no object. What a second piece gains
    grows with the pixels of an object, and so must its price; but Pyro takes no probability below 1.2e-7 (16 nats).
    """
    price = np.clip((window / DIGIT_WINDOW) ** 2, 1, 1.75)
    return math.exp(price * np.interp(step, [0, 100, 200, max(num_steps, 201)], [-3, -3, -9, -4]))
