"""The estimators against slow and independent references, the optimizer, and the schedules."""

import itertools
import math
from unittest.mock import Mock

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceGraph_ELBO
from test_air import small_air

from training.svi import make_svi, schedule


def loss_and_gradients(svi, x):
    """What one call computes, with the noise of `brute_force`."""
    air = svi.model.__self__
    air.zero_grad()
    torch.manual_seed(1)
    loss = svi.loss_and_grads(svi.model, svi.guide, x)
    return {n: p.grad.clone() for n, p in air.named_parameters()} | {"loss": torch.tensor(loss, dtype=torch.float64)}


def brute_force(air, x):
    """The same with `z_pres` summed out: a run of guide and model for each of its 2^T sequences, times q."""
    loss = 0.0
    for sequence in itertools.product([0.0, 1.0], repeat=air.max_objects):
        z_pres = {f"z_pres_{t}": torch.full((len(x),), value).double() for t, value in enumerate(sequence)}
        torch.manual_seed(1)  # the same poses and codes each time
        guide = poutine.trace(poutine.condition(air.guide, z_pres)).get_trace(x)
        model = poutine.trace(poutine.replay(poutine.condition(air.model, z_pres), trace=guide)).get_trace(x)
        model.compute_log_prob()
        guide.compute_log_prob()
        log_p, log_q = (sum(s["log_prob"] for s in t.nodes.values() if "log_prob" in s) for t in (model, guide))
        loss += (sum(guide.nodes[name]["log_prob"] for name in z_pres).exp() * (log_q - log_p)).sum()
    parameters = {name: p for name, p in air.named_parameters() if not name.startswith("baseline.")}
    return dict(zip(parameters, torch.autograd.grad(loss, [*parameters.values()]))) | {"loss": loss.detach()}


@pytest.mark.parametrize("kind", ["residual", "rnn"])
@pytest.mark.parametrize("max_objects", [2, 3])
def test_traceenum_is_the_sum_over_all_sequences(max_objects, kind, x):
    air = small_air(guide=kind, max_objects=max_objects, baseline="none")
    expected, actual = brute_force(air, x), loss_and_gradients(make_svi(air, "traceenum")[0], x)
    assert all(value.abs().max() > 1e-6 for value in expected.values())
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind, baseline", [("residual", "rnn"), ("rnn", "none")])
def test_tracegraph_is_unbiased(kind, baseline, x, monkeypatch):
    """The mean over all 4 * 4 counts of two images, each as often as q says, of what it computes."""
    air, x = small_air(guide=kind, baseline=baseline), x[:2]
    svi, _ = make_svi(air, "tracegraph")
    # What is drawn for z_pres, step by step; Pyro has to see that it depends on what its probability depends on.
    monkeypatch.setattr(torch, "bernoulli", lambda probs: draws.pop(0) + 0 * probs)
    torch.manual_seed(1)
    draws = [torch.ones(2).double()] * 3
    more = torch.stack([torch.ones(2).double(), *(slot.z_pres_prob.detach() for slot in air.guide(x))])
    q = more.cumprod(0) * torch.cat([1 - more[1:], more[:1]])  # [count, image]
    expected = brute_force(air, x)
    mean = dict.fromkeys(expected, 0.0)
    for counts in itertools.product(range(4), repeat=2):
        draws = [(torch.tensor(counts) > t).double() for t in range(3)]
        sample, share = loss_and_gradients(svi, x), q[counts, (0, 1)].prod()
        mean = {name: mean[name] + share * sample[name] for name in expected}
    torch.testing.assert_close(mean, expected, rtol=1e-7, atol=1e-7)


def test_schedule():
    assert [schedule(step, 4000) for step in (0, 2000, 3999)] == pytest.approx([1, 0.5, 0], abs=1e-6)


def test_the_baseline_has_its_own_learning_rate():
    air = small_air()
    others, baseline = (group["params"] for group in make_svi(air, "tracegraph")[1].param_groups)
    assert {*baseline} == {*air.baseline.parameters()} and {*others} == {*air.parameters()} - {*baseline}


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("estimator", ["tracegraph", "traceenum"])
@pytest.mark.parametrize("value", [math.nan, 1e200, 1e160])
def test_a_step_that_is_not_finite_changes_nothing(value, estimator, x):
    """A NaN stops the guide, 1e200 gives an infinite loss, 1e160 a finite one whose gradient's norm is infinite."""
    pyro.enable_validation(False)
    air = small_air(baseline="rnn" if estimator == "tracegraph" else "none")
    svi, adam = make_svi(air, estimator)
    states, broken = [], x.clone()
    broken[3, 20, 20] = value
    for images in (x, broken, x):
        assert math.isfinite(svi.step(images)) == (images is x)
        moments = [value for state in adam.state.values() for value in state.values()]
        states.append([value.detach().clone() for value in (*air.parameters(), *moments)])
    assert all(map(torch.equal, *states[:2])) and not any(map(torch.equal, *states[1:]))


def test_other_errors_are_raised(x):
    air = small_air()
    air.model = Mock(side_effect=RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        make_svi(air, "tracegraph")[0].step(x)


def test_plain_svi_trains_the_air_that_it_is_given(x):
    """As a reader of the Pyro tutorials writes it, after another AIR was trained under the same names."""
    for _ in range(2):
        air = small_air()
        before = {name: p.detach().clone() for name, p in air.named_parameters()}
        svi = SVI(air.model, air.guide, pyro.optim.Adam({"lr": 1e-3}), TraceGraph_ELBO())
        for _ in range(5):  # In a single one, perhaps nothing but black was cropped.
            svi.step(x)
        assert not [name for name, p in air.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.parametrize("estimator", ["tracegraph", "traceenum"])
def test_a_step_on_a_device_that_is_not_the_cpu(estimator, monkeypatch):
    """On the device "meta", whose tensors have shapes only: what mixes it with a tensor left on the CPU raises."""
    pyro.enable_validation(False)  # It looks at values.
    for name, value in (("item", 1.0), ("__bool__", True), ("tolist", [1.0])):
        monkeypatch.setattr(torch.Tensor, name, lambda self, value=value: value)
    with torch.device("meta"):
        air, x = small_air(baseline="rnn" if estimator == "tracegraph" else "none"), torch.zeros(4, 50, 50).double()
    svi, adam = make_svi(air, estimator)
    for group in adam.param_groups:
        group["fused"] = False  # There is no such kernel for shapes.
    svi.step(x)
    air.register_buffer("z_where_loc", torch.zeros(3))  # left behind
    with pytest.raises(RuntimeError, match="device"):
        svi.step(x)


@pytest.mark.parametrize("guide", ["residual", "rnn"])
@pytest.mark.parametrize("estimator", ["tracegraph", "traceenum"])
def test_steps_that_are_never_taken_do_no_harm(guide, estimator, x):
    """Nothing trains them, and in time the standard deviations that they put out can come to 0."""
    air = small_air(guide=guide).float()
    present, pose = (air.attend.present, air.attend.propose) if guide == "residual" else [air.attend.predict] * 2
    for layer, part, value in (
        (present[-1], slice(0, 1), -1000.0),
        (pose if guide == "residual" else pose[-1], slice(-3, None), -300.0),
        (air.encode.net[-1], slice(air.z_what_size, None), -300.0),
    ):
        layer.bias.data[part] = value
    assert math.isfinite(make_svi(air, estimator)[0].step(x.float()))
