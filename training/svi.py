"""Stochastic variational inference for AIR: the estimators, the optimizer, the schedules, steps that go wrong."""

import math

import numpy as np
import pyro
import torch
from pyro.infer import SVI, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.infer.enum import get_importance_trace
from pyro.ops.provenance import ProvenanceTensor, get_provenance
from pyro.optim import PyroOptim
from torch.nn.utils import clip_grads_with_norm_

from air import AIR
from training.parallel import Processes

DIGIT_WINDOW = 50 / 3  # How long, in pixels, the windows on multi-MNIST's digits are by the prior on poses.


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
        guide, elbo = air.guide, StaticTraceGraph_ELBO(max_plate_nesting=1)
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


def clip_gradient(group: dict, norm: float, factor: float = 1.2, memory: float = 0.98) -> None:
    """Make the gradient of a parameter group, of that norm, at most `factor` times as long as it mostly is."""
    running = group["running_norm"] or norm
    group["running_norm"] = memory * running + (1 - memory) * min(norm, 3 * running)
    clip_grads_with_norm_(group["params"], factor * group["running_norm"], torch.tensor(norm))


@torch.no_grad()
def is_finite(guide, x: torch.Tensor) -> bool:
    """Whether the guide's distributions have parameters that are numbers.

    PyTorch refuses to sample a Bernoulli of NaN with a RuntimeError, as it has many; Pyro's validation
    says it with a ValueError.
    """
    try:
        with pyro.validation_enabled():
            guide(x)
    except ValueError:
        return False
    return True


def schedule(step: int, num_steps: int, warm_up: int = 100) -> float:
    """The learning rate at `step`, as a part of its largest: a short linear rise, then half a cosine down to 0."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def count_ratio(step: int, num_steps: int, window: float = DIGIT_WINDOW) -> float:
    """The ratio of the prior on the count at `step`, while training; `window`: how long windows mostly are, in pixels.

    Strict from the 200th step on, and slowly less so, so that one object is not explained by several pieces; but not
    at first: before the decoder can paint anything, everything would become no object. What a second piece gains
    grows with the pixels of an object, and so must its price; but Pyro takes no probability below 1.2e-7 (16 nats).
    """
    price = np.clip((window / DIGIT_WINDOW) ** 2, 1, 1.75)
    return math.exp(price * np.interp(step, [0, 100, 200, max(num_steps, 201)], [-3, -3, -9, -4]))


class SingleOptimizer(PyroOptim):
    """Lets SVI step one torch optimizer for all parameters, where Pyro would make one for each of them."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def __call__(self, params) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Labelled(ProvenanceTensor):
    """A tensor that says which choices it depends on, but does not pass it on to what is computed from it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # as nn.Parameter has it


class StaticTraceGraph_ELBO(TraceGraph_ELBO):
    """TraceGraph_ELBO for programs in which it never changes which choice affects which cost.

    Pyro finds that out by passing every tensor operation through a Python hook, anew at each step.
    Here the first step's answer is kept. Loss and gradients are the same.
    """

    dependencies = None

    def _get_trace(self, model, guide, args, kwargs):
        if self.dependencies is None:
            traces = super()._get_trace(model, guide, args, kwargs)
            self.dependencies = [
                {
                    name: get_provenance(site["log_prob_sum"])
                    for name, site in trace.nodes.items()
                    if "log_prob_sum" in site
                }
                for trace in traces
            ]
        else:
            traces = get_importance_trace("dense", self.max_plate_nesting, model, guide, args, kwargs)
            for trace, dependencies in zip(traces, self.dependencies):
                for name, upstream in dependencies.items():
                    site = trace.nodes[name]
                    site["log_prob_sum"] = Labelled(site["log_prob_sum"], upstream)
        return traces
