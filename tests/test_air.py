import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from torch import nn

from air import AIR
from modules import image_to_object, object_to_image

SMALL = {"image_size": 50, "window_size": 9, "z_what_size": 4, "rnn_size": 16, "hidden_size": 12, "baseline_size": 8}


@pytest.fixture
def air():
    return AIR(**SMALL).double()


def choices(counts, num_steps=3, code=4):
    """Values for all choices: random poses and codes, and as many objects as `counts` says."""
    values = {}
    for t in range(num_steps):
        values[f"z_pres_{t}"] = (torch.tensor(counts) > t).double()
        pose = torch.randn(len(counts), 3).double() * torch.tensor([0.2, 1, 1])
        values[f"z_where_{t}"] = pose + torch.tensor([3.0, 0, 0])
        values[f"z_what_{t}"] = torch.randn(len(counts), code).double()
    return values


def log_density(program, x, values):
    """The log-density `[n]` that a Pyro program gives to these values."""
    trace = poutine.trace(poutine.condition(program, values)).get_trace(x)
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site).detach()


def normal(value, loc, scale):
    """Log-density of a Normal, by the formula."""
    return float((-0.5 * ((value - loc) / scale) ** 2 - torch.log(torch.ones_like(value) * scale)).sum()) - (
        0.5 * math.log(2 * math.pi) * value.numel()
    )


COUNTS = [0, 1, 2, 3, 1, 2]


def test_model_density_by_hand(air, x):
    """One image at a time, object by object, stopping at the first z_pres = 0: no masks, no batches."""
    air.set_count_prior(0.01)
    values = choices(COUNTS)
    actual = log_density(air.model, x, values)
    prior = [0.01**n / sum(0.01**k for k in range(4)) for n in range(4)]
    for i, count in enumerate(COUNTS):
        expected, canvas = math.log(prior[count]), torch.zeros(50, 50).double()
        for t in range(count):
            z_where, z_what = values[f"z_where_{t}"][i], values[f"z_what_{t}"][i]
            expected += normal(z_where, torch.tensor([3.0, 0, 0]), torch.tensor([0.2, 1, 1]))
            expected += normal(z_what, torch.tensor(0.0), torch.tensor(1.0))
            canvas += object_to_image(z_where[None], air.decode(z_what[None]), 50)[0]
        expected += normal(x[i], canvas.detach(), torch.tensor(0.3))
        assert float(actual[i]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("refine", [True, False])
def test_guide_density_by_hand(x, refine):
    air = AIR(**SMALL, refine=refine).double().eval()
    if refine:
        nn.init.normal_(air.refine.correct.weight, std=0.3)
    values = choices(COUNTS)
    actual = log_density(air.guide, x, values)
    for i, count in enumerate(COUNTS):
        # The RNN's inputs: the last pose (3), code (4) and, with the second look, what it saw (12).
        expected, previous, state = 0.0, torch.zeros(1, 3 + 4 + (12 if refine else 0)).double(), air.rnn.start(1)
        for t in range(3):
            state = air.rnn(air.rnn.project_image(x[i : i + 1]), previous, state)
            p, loc, scale = air.predict(state[0])
            seen = torch.zeros(1, 0)
            if refine:
                loc, scale, seen = air.refine(image_to_object(loc, x[i : i + 1], 9, widen=1.5), loc, scale)
            if t == count:
                expected += math.log(1 - p.item())
                break
            z_where, z_what = values[f"z_where_{t}"][i : i + 1], values[f"z_what_{t}"][i : i + 1]
            expected += math.log(p.item()) + normal(z_where, loc.detach(), scale.detach())
            loc, scale = air.encode(image_to_object(z_where, x[i : i + 1], 9))
            expected += normal(z_what, loc.detach(), scale.detach())
            previous = torch.cat([z_where, z_what, seen], 1)
        assert float(actual[i]) == pytest.approx(expected, abs=1e-4)


def test_steps_after_the_last_object_contribute_nothing(air, x):
    values = choices(COUNTS)
    changed = dict(values)
    for t in range(3):
        unused = (values[f"z_pres_{t}"] == 0)[:, None]
        for name in (f"z_where_{t}", f"z_what_{t}"):
            changed[name] = torch.where(unused, 7 * torch.randn_like(values[name]), values[name])
    assert torch.equal(log_density(air.model, x, values), log_density(air.model, x, changed))
    assert torch.equal(log_density(air.guide, x, values), log_density(air.guide, x, changed))
    # And z_pres after a 0: the same log-probability in model and guide, so nothing in the ELBO.
    traces = [poutine.trace(poutine.condition(p, values)).get_trace(x) for p in (air.model, air.guide)]
    for trace in traces:
        trace.compute_log_prob()
    for t in range(1, 3):
        complete = values[f"z_pres_{t - 1}"] == 0
        in_model, in_guide = (trace.nodes[f"z_pres_{t}"]["log_prob"][complete] for trace in traces)
        assert torch.equal(in_model, in_guide) and complete.any()


def test_exploration_only_while_training(x):
    air = AIR(**SMALL, exploration=0.1).double()
    with torch.no_grad():
        air.predict.mlp[-1].bias[0] = -1000.0  # the guide is sure that there is nothing
    assert air.guide(x)[0].p_more.tolist() == pytest.approx([0.1] * 6)
    with torch.no_grad():
        air.predict.mlp[-1].bias[0] = 1000.0
    assert air.guide(x)[0].p_more.tolist() == pytest.approx([0.9] * 6)
    assert air.infer(x).counts.tolist() == [3] * 6 and air.training


def test_prior_over_counts(air):
    assert air.p_more.cumprod(0).tolist() == pytest.approx([3 / 4, 2 / 4, 1 / 4])  # uniform
    air.set_count_prior(0.01)
    total = 1 + 0.01 + 0.01**2 + 0.01**3
    assert air.p_more.cumprod(0).tolist() == pytest.approx(
        [1 - 1 / total, (0.01**2 + 0.01**3) / total, 0.01**3 / total]
    )
    loose = AIR(**SMALL, count_ratio=0.5)
    with pyro.plate("scenes", 20_000):
        z_pres, _, _ = loose.prior(20_000)
    shares = torch.stack(z_pres).sum(0).long().bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([8, 4, 2, 1]) / 15, atol=0.015, rtol=0)


def test_baseline_and_elbo_do_not_train_each_other(air, x):
    values = choices(COUNTS)
    model, guide = (poutine.trace(poutine.condition(p, values)).get_trace(x) for p in (air.model, air.guide))
    baselines = [guide.nodes[f"z_pres_{t}"]["infer"]["baseline"]["baseline_value"] for t in range(3)]
    theirs = {name for name, _ in air.named_parameters() if name.startswith("baseline.")}

    def trained_by(loss):
        names, parameters = zip(*air.named_parameters())
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        return {name for name, grad in zip(names, grads) if grad is not None}

    assert trained_by(sum(value.sum() for value in baselines)) == theirs
    elbo = model.log_prob_sum() - guide.log_prob_sum()
    assert trained_by(elbo) == {name for name, _ in air.named_parameters()} - theirs
    # Where a scene is complete there is nothing to predict.
    for t in range(1, 3):
        complete = guide.nodes[f"z_pres_{t - 1}"]["value"] == 0
        assert complete.any() and baselines[t][complete].abs().max() == 0
        assert baselines[t][~complete].abs().min() > 0


def test_inference_reads_the_guide_out(air, x):
    torch.manual_seed(5)
    seen = air.infer(x)
    assert air.training
    air.eval()
    torch.manual_seed(5)
    loss = TraceGraph_ELBO(max_plate_nesting=1).loss(air.model, air.guide, x)
    assert float(seen.elbo.sum()) == pytest.approx(-loss)
    torch.testing.assert_close(seen.count_probs.sum(-1), torch.ones(6).double())
    for i, count in enumerate(seen.counts.tolist()):
        canvas = sum(object_to_image(seen.z_where[i, t][None], seen.y_att[i, t][None], 50)[0] for t in range(count))
        torch.testing.assert_close(seen.reconstruction[i], canvas + torch.zeros(50, 50).double())
        torch.testing.assert_close(seen.x_att[i, 1], image_to_object(seen.z_where[i, 1][None], x[i][None], 9)[0])
    # What q(n) says is how often each count is sampled.
    many = torch.stack([air.infer(x).counts for _ in range(200)])
    shares = torch.stack([(many == n).double().mean(0) for n in range(4)], -1)
    assert (shares - seen.count_probs).abs().max() < 0.2


def test_inference_without_sampling(air, x):
    """Neither chance nor the other images matter, and no pose beside it has a greater density."""
    seen = air.infer(x, sample=False)
    alone = air.infer((255 * x[2:3]).round().byte().numpy(), sample=False)
    for together, single in zip(seen, alone):
        torch.testing.assert_close(together[2:3], single)
    for t in range(3):
        beside = seen.z_where[:, t] + 0.01 * torch.randn(6, 3).double()
        steps = {f"z_pres_{k}": torch.ones(6).double() for k in range(3)}
        steps |= {f"z_where_{k}": seen.z_where[:, k] for k in range(t)}
        steps |= {f"z_what_{k}": seen.z_what[:, k] for k in range(t)}
        densities = []
        for z_where in (seen.z_where[:, t], beside):
            conditioned = poutine.condition(air.eval().guide, steps | {f"z_where_{t}": z_where})
            trace = poutine.trace(conditioned).get_trace(x)
            trace.compute_log_prob()
            densities.append(trace.nodes[f"z_where_{t}"]["log_prob"])
        assert (densities[0] > densities[1]).all()
    more = seen.count_probs.flip(-1).cumsum(-1).flip(-1)  # [n, T + 1], q(count >= n)
    expected = (more[:, 1:] / more[:, :-1] > 0.5).int().cumprod(-1).sum(-1)
    assert torch.equal(seen.counts, expected)


def test_inference_takes_arrays_of_any_layout(air, x):
    """Also such as are turned or mirrored views of others, which have negative strides."""
    arrays = x.numpy()[::-1, :, ::-1]
    for array, tensor in ((arrays, x.flip(0, 2)), (arrays.astype(">f8"), x.flip(0, 2))):
        expected, actual = air.infer(tensor, sample=False), air.infer(array, sample=False)
        torch.testing.assert_close(expected.z_where, actual.z_where)


@pytest.mark.parametrize(
    "images, error",
    [
        (torch.zeros(2, 64, 64), r"expected \[n, 50, 50\]"),
        (torch.zeros(50, 50), "shape"),
        (255 * torch.ones(1, 50, 50), "outside"),
    ],
)
def test_images_that_are_none(images, error, air):
    with pytest.raises(ValueError, match=error):
        air.infer(images)


def test_imagined_scenes_have_as_many_objects_as_asked_for(air):
    scenes = air.prior_samples(torch.tensor([0, 1, 2, 3]))
    assert scenes.shape == (4, 50, 50) and scenes[0].max() == 0 and (scenes[1:].amax((1, 2)) > 0).all()
    torch.manual_seed(0)
    one = air.prior_samples(torch.tensor([1, 1]))
    torch.manual_seed(0)
    two = air.prior_samples(torch.tensor([1, 2]))  # The same objects, and one more.
    assert torch.equal(one[0], two[0]) and (two[1] >= one[1]).all() and two[1].sum() > one[1].sum()
