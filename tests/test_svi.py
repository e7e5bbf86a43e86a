"""The estimators against slow and independent references, and the schedules."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceGraph_ELBO
from torch import nn

import evaluation
from air import AIR, to_images
from training.svi import StaticTraceGraph_ELBO, clip_gradient, count_ratio, make_svi, schedule

SMALL = {"image_size": 50, "window_size": 9, "z_what_size": 4, "rnn_size": 16, "hidden_size": 12, "baseline_size": 8}
SMALL |= {"look_size": 10}


@pytest.mark.parametrize("kind", ["residual", "rnn"])
@pytest.mark.parametrize("baseline", ["rnn", "none"])
def test_static_tracegraph_is_tracegraph(x, baseline, kind):
    """Same loss and same gradients, at the first step and at later ones."""
    results = []
    for elbo in (TraceGraph_ELBO(max_plate_nesting=1), StaticTraceGraph_ELBO(max_plate_nesting=1)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        air = AIR(**SMALL, baseline=baseline, guide=kind).double()
        for _ in range(3):
            air.zero_grad()
            loss = elbo.loss_and_grads(air.model, air.guide, x)
            results.append([torch.tensor(loss), *(p.grad for p in air.parameters())])
    for first, second in zip(results[:3], results[3:]):
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def an_air(kind, **options):
    """Of a guide whose second look corrects the first."""
    air = AIR(**SMALL, guide=kind, baseline="none", **options).double()
    if kind == "residual":
        nn.init.normal_(air.attend.correct.weight, std=0.1)
    return air


def brute_force_elbo(air, x, seed):
    """The ELBO with `z_pres` summed out: a run of guide and model for each of its 2^T sequences."""
    elbo = 0.0
    for sequence in itertools.product([0.0, 1.0], repeat=air.num_steps):
        z_pres = {f"z_pres_{t}": torch.full((len(x),), value).double() for t, value in enumerate(sequence)}
        torch.manual_seed(seed)  # the same poses and codes each time
        guide = poutine.trace(poutine.condition(air.guide, z_pres)).get_trace(x)
        model = poutine.trace(poutine.replay(poutine.condition(air.model, z_pres), trace=guide)).get_trace(x)
        for trace in (guide, model):
            trace.compute_log_prob()
        log_q = sum(guide.nodes[name]["log_prob"] for name in z_pres)
        log_p, log_q_all = (
            sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site) for trace in (model, guide)
        )
        elbo = elbo + (log_q.exp() * (log_p - log_q_all)).sum()
    return elbo


@pytest.mark.parametrize("kind", ["residual", "rnn"])
@pytest.mark.parametrize("num_steps", [2, 3])
def test_traceenum_is_the_sum_over_all_counts(x, num_steps, kind):
    """Same loss and same gradients as autograd through the sum by brute force."""
    air = an_air(kind, num_steps=num_steps)
    svi, _ = make_svi(air, "traceenum", clip=False)
    names, parameters = zip(*air.named_parameters())
    expected = brute_force_elbo(air, x, seed=1)
    gradients = torch.autograd.grad(-expected, parameters)
    torch.manual_seed(1)
    assert svi.loss_and_grads(svi.model, svi.guide, x) == pytest.approx(-expected.item(), rel=1e-12)
    for name, parameter, gradient in zip(names, parameters, gradients):
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-9, msg=name)


def gradients(air, estimator, x, calls):
    """Gradients of many calls, each a row, by parameter group."""
    svi, _ = make_svi(air, estimator, clip=False)
    rows = []
    for _ in range(calls):
        air.zero_grad()
        svi.loss_and_grads(svi.model, svi.guide, x)
        rows.append({name: p.grad.flatten().clone() for name, p in air.named_parameters()})
    groups = ("decode", "attend", "encode")
    return {g: torch.stack([torch.cat([row[n] for n in row if n.startswith(g + ".")]) for row in rows]) for g in groups}


@pytest.mark.parametrize("kind", ["residual", "rnn"])
@pytest.mark.parametrize("baseline", ["rnn", "none"])
def test_tracegraph_is_unbiased(x, baseline, kind):
    """The mean of its gradients is that of the exact sums, within the standard error, in every group."""
    x = x[:3].repeat(40, 1, 1)  # so that each call is a mean over as many samples
    results = []
    for estimator, options in ("traceenum", "none"), ("tracegraph", baseline):
        pyro.set_rng_seed(7)
        air = an_air(kind)
        other = AIR(**SMALL, guide=kind, baseline=options).double()
        other.load_state_dict(air.state_dict(), strict=False)  # all but a baseline
        results.append(gradients(other, estimator, x, calls=40))
    exact, sampled = results
    for group in exact:
        # Along some random directions, and along the gradient itself, where a wrong scale would show most.
        directions = torch.cat([torch.randn(8, exact[group].shape[1]).double(), exact[group].mean(0, keepdim=True)])
        means, errors = [], []
        for rows in (exact[group], sampled[group]):
            along = rows @ directions.T
            means.append(along.mean(0))
            errors.append(along.std(0) / len(rows) ** 0.5)
        z = (means[0] - means[1]) / torch.stack(errors).square().sum(0).sqrt()
        assert z.abs().max() < 4.5, (group, z)


def test_schedules():
    rates = [schedule(step, 4000) for step in range(4000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) > 0.99 and rates[-1] < 1e-6
    assert rates[2000] == pytest.approx(0.5)
    ratios = [math.log(count_ratio(step, 1000)) for step in (0, 99, 150, 200, 600, 1000)]
    assert ratios == pytest.approx([-3, -3, -6, -9, -6.5, -4])
    assert math.log(count_ratio(49, 50)) == -3
    # An object of more pixels has a larger price, but one that Pyro's Bernoulli can tell from the next larger.
    small, digit, large, huge = (math.log(count_ratio(200, 1000, window)) for window in (8, 50 / 3, 20, 80))
    assert small == digit == -9 and large == pytest.approx(-9 * 1.44)
    strictest, more_so = (dist.Bernoulli(math.exp(price)).log_prob(torch.tensor(1.0)) for price in (huge, huge - 0.1))
    assert strictest == pytest.approx(huge, abs=1e-3) and more_so < strictest


def test_clipping():
    """A gradient as long as usual is left alone; a much longer one is cut, and does not count as usual at once."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    group = {"params": [parameter], "running_norm": 0.0}
    for _ in range(100):
        parameter.grad = torch.tensor([3.0, 4.0])
        clip_gradient(group, 5.0)
        assert parameter.grad.tolist() == [3.0, 4.0] and group["running_norm"] == pytest.approx(5)
    parameter.grad = torch.tensor([3e6, 4e6])
    clip_gradient(group, 5e6)
    assert group["running_norm"] == pytest.approx(0.98 * 5 + 0.02 * 15)
    assert parameter.grad.norm().item() == pytest.approx(1.2 * group["running_norm"])


def test_the_baseline_has_its_own_learning_rate(x):
    air = AIR(**SMALL).double()
    svi, adam = make_svi(air, "tracegraph")
    before = {name: p.detach().clone() for name, p in air.named_parameters()}
    adam.param_groups[0]["lr"], adam.param_groups[1]["lr"] = 0.0, 1e-3
    svi.step(x)
    changed = {name for name, p in air.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith("baseline.")}


@pytest.mark.parametrize("estimator", ["tracegraph", "traceenum"])
@pytest.mark.parametrize("value", [float("nan"), 1e200, 1e160])
def test_a_step_that_is_not_finite_changes_nothing(estimator, value, x):
    """A NaN stops the guide, 1e200 gives an infinite loss, 1e160 a finite one whose gradient's norm is infinite."""
    pyro.enable_validation(False)
    air = AIR(**SMALL, baseline="rnn" if estimator == "tracegraph" else "none").double()
    svi, adam = make_svi(air, estimator)
    assert torch.tensor(svi.step(x)).isfinite()
    before = [p.detach().clone() for p in air.parameters()]
    moments = [value.clone() for state in adam.state.values() for value in state.values()]
    broken = x.clone()
    broken[3, 20, 20] = value
    assert torch.tensor(svi.step(broken)).isnan()
    assert all(torch.equal(a, b) for a, b in zip(before, air.parameters()))
    after = [value for state in adam.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after))
    assert torch.tensor(svi.step(x)).isfinite()
    assert not any(torch.equal(a, b) for a, b in zip(before, air.parameters()))


def test_other_errors_are_raised(x, monkeypatch):
    air = AIR(**SMALL).double()
    svi, _ = make_svi(air, "tracegraph")

    def out_of_memory(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(air.decode, "forward", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        svi.step(x)


def test_plain_svi_trains_the_air_that_it_is_given(x):
    """As a reader of the Pyro tutorials writes it, after another AIR was read out and trained."""
    x = x.float()
    AIR(**SMALL).infer(x)
    for _ in range(2):
        air = AIR(**SMALL)
        before = {name: p.detach().clone() for name, p in air.named_parameters()}
        svi = SVI(air.model, air.guide, pyro.optim.Adam({"lr": 1e-3}), TraceGraph_ELBO())
        svi.step(x)
        svi.step(x)
        same = [name for name, p in air.named_parameters() if torch.equal(p, before[name])]
        assert not same


@pytest.mark.parametrize("estimator", ["tracegraph", "traceenum"])
@pytest.mark.parametrize("left_behind", [None, "z_where_loc"])
def test_a_step_and_an_evaluation_on_a_device_that_is_not_the_cpu(left_behind, estimator, scenes, monkeypatch):
    """On the device "meta", whose tensors have shapes only: what mixes it with a tensor left on the CPU raises."""
    pyro.enable_validation(False)  # It looks at values.
    for name, value in (("item", 1.0), ("__bool__", True), ("tolist", [1.0])):
        monkeypatch.setattr(torch.Tensor, name, lambda self, value=value: value)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.zeros(self.shape, dtype=self.dtype))
    monkeypatch.setattr(evaluation, "baseline_r2", lambda air, x: None)  # It selects by values.
    with torch.device("meta"):
        air = AIR(baseline="rnn" if estimator == "tracegraph" else "none")
    svi, adam = make_svi(air, estimator)
    for group in adam.param_groups:
        group["fused"] = False  # There is no such kernel for shapes.
    if left_behind:
        air.register_buffer(left_behind, getattr(AIR(), left_behind))
        with pytest.raises(RuntimeError, match="device"):
            svi.loss_and_grads(svi.model, svi.guide, torch.rand(4, 50, 50, device="meta"))
        return
    for step in range(2):
        air.set_count_prior(count_ratio(step, 2))
        svi.step(to_images(torch.zeros(4, 50, 50, dtype=torch.uint8, device="meta")))
    moments = [value for state in adam.state.values() for value in state.values() if value.ndim]
    assert len(moments) == 2 * len(list(air.parameters())) and {m.device.type for m in moments} == {"meta"}
    assert evaluation.evaluate(air, scenes).metrics["images"] == 200
