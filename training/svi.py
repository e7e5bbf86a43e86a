"""Stochastic variational inference for AIR: the estimators, the optimizer, the schedules, steps that go wrong."""

import math

import pyro
import torch
from pyro.infer import SVI, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.infer.enum import get_importance_trace
from pyro.ops.provenance import ProvenanceTensor, get_provenance
from pyro.optim import PyroOptim

from air import AIR
from training.parallel import Processes


class NonFiniteError(ArithmeticError):
    """A run came to numbers that are not finite, from which nothing can be learned."""


def make_svi(air: AIR, estimator: str, processes: Processes | None = None) -> tuple[SVI, torch.optim.Adam]:
    """The inference algorithm, and the optimizer behind it: one Adam, with a parameter group for the baseline's rate.

    estimator: "tracegraph" samples `z_pres` and reduces the variance of its gradient; "traceenum" sums
        over its values, all T + 1 counts, and has no such variance. The rest is sampled by both.

    `svi.step(x)` returns the loss, minus the ELBO summed over the mini-batch. It is NaN if the loss or the
    gradient is not finite, in one of the processes; the parameters are then left as they were.
    """
    processes = processes or Processes()
    parameters = list(air.parameters())
    baseline = [p for name, p in air.named_parameters() if name.startswith("baseline.")]
    others = [p for name, p in air.named_parameters() if not name.startswith("baseline.")]
    adam = torch.optim.Adam([{"params": others}, {"params": baseline}], fused=True)
    if estimator == "tracegraph":
        guide, elbo = air.guide, StaticTraceGraph_ELBO(max_plate_nesting=1)
    else:
        # z_pres is the guide's only discrete choice.
        guide, elbo = config_enumerate(air.guide), TraceEnum_ELBO(max_plate_nesting=1)

    def loss_and_grads(model, guide, x):
        try:
            loss = elbo.loss_and_grads(model, guide, x)
        except RuntimeError:
            if is_finite(guide, x):
                raise
            loss = math.nan
        loss, norm = processes.all_reduce_gradients(loss, parameters)
        if not math.isfinite(loss + norm):
            adam.zero_grad()  # Without gradients the optimizer's step changes nothing.
            return math.nan
        return loss

    return SVI(air.model, guide, SingleOptimizer(adam), elbo.loss, loss_and_grads), adam


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


def count_ratio(step: int, num_steps: int, first: float = 1e-4) -> float:
    """The ratio of the prior on the count at `step`: from a strict prior to a uniform one, in half of the run."""
    return first ** max(0.0, 1 - 2 * step / num_steps)


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
