"""Stochastic variational inference for AIR: the estimators, the optimizer, the schedules, steps that go wrong."""

import math
import sys

import pyro
import torch
from pyro.infer import SVI, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.optim import PyroOptim
from tqdm import tqdm

from air import AIR
from training.parallel import Processes

# So many skipped steps within so many end a run.
MAX_SKIPPED_STEPS, SKIPPED_WITHIN = 3, 100


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
    baseline = [p for name, p in air.named_parameters() if name.startswith("baseline.")]
    others = [p for name, p in air.named_parameters() if not name.startswith("baseline.")]
    adam = torch.optim.Adam([{"params": group} for group in (others, baseline) if group], fused=True)
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
        loss = processes.all_reduce_gradients(loss, [*others, *baseline])
        if not math.isfinite(loss):
            adam.zero_grad()  # Without gradients the optimizer's step changes nothing.
        return loss

    return SVI(air.model, guide, SingleOptimizer(adam), elbo.loss, loss_and_grads), adam


class SingleOptimizer(PyroOptim):
    """Lets SVI step one torch optimizer for all parameters, where Pyro would make one for each of them."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def __call__(self, params) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


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


def schedule(step: int, num_steps: int) -> float:
    """The learning rate at `step`, as a part of its largest: half a cosine, down to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / num_steps))
