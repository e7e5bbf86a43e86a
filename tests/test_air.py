import copy
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from torch import nn

from air import AIR, MostProbable, to_images
from images import to_canvases
from modules import image_to_object, object_to_image

SMALL = {"image_size": 50, "window_size": 9, "z_what_size": 4, "rnn_size": 16, "hidden_size": 12, "baseline_size": 8}
SMALL |= {"look_size": 10}


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


def residual_step_by_hand(air, x, canvas):
    """What the residual guide proposes for one image `[1, h, h]`, with loops over pixels where it has products."""
    net, n = air.attend, x.shape[-1]
    thick = torch.stack(
        [canvas[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].max() for i in range(n) for j in range(n)]
    ).view(1, n, n)
    residual = (x - thick).clamp(min=0)

    def mean_around(i, j, reach):  # outside the image there is nothing
        return (
            residual[0, max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1].sum()
            / (2 * reach + 1) ** 2
        )

    score = {(i, j): mean_around(i, j, 6) - mean_around(i, j, 12) for i in range(n) for j in range(n)}
    i, j = max(score, key=score.get)
    place = (torch.tensor([j, i]).double() * 2 + 1) / n - 1

    def look(network, pose, widen):
        crops = [image_to_object(pose, picture, 9, widen) for picture in (residual, x)]
        return network(torch.cat(crops, -1))

    first = look(air.attend.look, torch.cat([torch.tensor([3.0]).double(), -3 * place])[None], 2.0)
    shift, scale = net.propose(first).chunk(2, -1)
    s = 3 + 0.2 * shift[0, 0]
    loc = torch.stack([s, 0.6 * shift[0, 1] - s * place[0], 0.6 * shift[0, 2] - s * place[1]])[None]
    second = look(net.look_closer, loc, 1.5)
    correction, factor = net.correct(second).chunk(2, -1)
    units = torch.tensor([0.2, 1, 1])
    p = torch.sigmoid(net.present(torch.cat([first, second], -1)))[0, 0]
    scale = units * torch.nn.functional.softplus(scale) * 2 * torch.sigmoid(factor)
    return p, loc + units * correction, scale


@pytest.mark.parametrize("kind", ["residual", "rnn"])
def test_guide_density_by_hand(x, kind):
    """One image at a time, object by object, stopping at the first z_pres = 0."""
    air = AIR(**SMALL, guide=kind).double().eval()
    if kind == "residual":
        nn.init.normal_(air.attend.correct.weight, std=0.3)
    nn.init.constant_(air.decode.mlp[-1].bias, 3.0)  # so that the canvas matters
    values = choices(COUNTS)
    actual = log_density(air.guide, x, values)
    for i, count in enumerate(COUNTS):
        image, expected, canvas = x[i : i + 1], 0.0, torch.zeros(1, 50, 50).double()
        previous, state = torch.zeros(1, 3 + 4).double(), air.attend.start(image)
        for t in range(3):
            if kind == "residual":
                p, loc, scale = residual_step_by_hand(air, image, canvas)
            else:
                projection, rnn = state
                rnn = air.attend.rnn(projection, previous, rnn)
                p, loc, scale = air.attend.predict(rnn[0]).split([1, 3, 3], -1)
                p, units = torch.sigmoid(p)[0, 0], torch.tensor([0.2, 1, 1])
                loc = torch.tensor([3.0, 0, 0]) + units * loc
                scale, state = units * torch.nn.functional.softplus(scale), (projection, rnn)
            if t == count:
                expected += math.log(1 - p.item())
                break
            z_where, z_what = values[f"z_where_{t}"][i : i + 1], values[f"z_what_{t}"][i : i + 1]
            expected += math.log(p.item()) + normal(z_where, loc.detach(), scale.detach())
            pictures = (image - canvas, image) if kind == "residual" else (image,)
            crop = torch.cat([image_to_object(z_where, picture, 9) for picture in pictures], -1)
            loc, scale = air.encode(crop)
            expected += normal(z_what, loc.detach(), scale.detach())
            canvas = canvas + object_to_image(z_where, air.decode(z_what), 50).detach()
            previous = torch.cat([z_where, z_what], 1)
        assert float(actual[i]) == pytest.approx(expected, abs=1e-4)


def test_a_step_of_the_residual_guide_depends_on_what_is_left_only(x):
    """What an object leaves of the image, not which step it is: the reason why it counts what it has not seen."""
    air = AIR(**SMALL).double().eval()
    canvas = 0.7 * x.flip(0)
    first = air.attend(x, canvas, torch.zeros(6, 3).double(), torch.zeros(6, 4).double(), air.attend.start(x))
    other = air.attend(x, canvas, torch.rand(6, 3).double(), torch.rand(6, 4).double(), first[3])
    assert all(torch.equal(a, b) for a, b in zip(first[:3], other[:3]))


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


def last_layer_of_presence(air):
    return air.attend.present[-1] if air.config["guide"] == "residual" else air.attend.predict[-1]


@pytest.mark.parametrize("kind", ["residual", "rnn"])
def test_exploration_only_while_training(x, kind):
    air = AIR(**SMALL, guide=kind, exploration=0.1).double()
    with torch.no_grad():
        last_layer_of_presence(air).bias[0] = -1000.0  # the guide is sure that there is nothing
    assert air.guide(x)[0].p_more.tolist() == pytest.approx([0.1] * 6)
    with torch.no_grad():
        last_layer_of_presence(air).bias[0] = 1000.0
    assert air.guide(x)[0].p_more.tolist() == pytest.approx([0.9] * 6)
    assert air.infer(x).counts.tolist() == [3] * 6 and air.training
    assert air.infer(x, num_steps=5).counts.tolist() == [5] * 6


def test_prior_over_counts():
    """While training it may be another; as many steps as are asked for."""
    air = AIR(**SMALL, count_ratio=0.5)
    air.set_count_prior(2.0)
    for training, num_steps, weights in ((False, 3, [8, 4, 2, 1]), (True, 3, [1, 2, 4, 8]), (False, 1, [2, 1])):
        air.train(training)
        with pyro.plate("scenes", 20_000):
            z_pres, _, _ = air.prior(20_000, num_steps)
        shares = torch.stack(z_pres).sum(0).long().bincount(minlength=num_steps + 1) / 20_000
        torch.testing.assert_close(shares, torch.tensor(weights) / sum(weights), atol=0.015, rtol=0)


def test_the_canvas_is_painted_once(air, x, monkeypatch):
    """What the guide has painted, the model takes as it is; another's choices it paints itself."""
    calls, paint = [], air.paint
    monkeypatch.setattr(air, "paint", lambda *args: calls.append(1) or paint(*args))
    guide = poutine.trace(air.guide).get_trace(x)
    model = poutine.trace(poutine.replay(air.model, guide)).get_trace(x)
    assert len(calls) == 3
    again = poutine.trace(poutine.replay(air.model, guide)).get_trace(x)
    assert len(calls) == 6
    torch.testing.assert_close(model.log_prob_sum(), again.log_prob_sum())
    with torch.no_grad():
        unlike = poutine.trace(air.guide).get_trace(x)
    model = poutine.trace(poutine.replay(air.model, unlike)).get_trace(x)
    model.log_prob_sum().backward()  # The decoder learns though the guide painted without gradients.
    assert air.decode.mlp[0].weight.grad.abs().max() > 0
    air.guide(x)
    other = poutine.trace(poutine.replay(air.model, guide)).get_trace(x)
    torch.testing.assert_close(other.log_prob_sum(), again.log_prob_sum())


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
    alone = air.infer((255 * x[2:3]).round().byte(), sample=False)
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


def test_the_best_of_several_looks(x):
    """Of each image all that the look with the largest weight saw; the first is the ordinary one."""
    air = AIR(**SMALL).double()
    looks = []
    for look in range(4):
        with MostProbable():
            looks.append(air.log_importance_weight(x, look=look))
    steps, weights = zip(*looks)
    weights = torch.stack(weights)
    best = weights.argmax(0)
    assert len(best.unique()) > 1
    seen = air.infer(x, sample=False, looks=4)
    torch.testing.assert_close(seen.elbo, weights.amax(0))
    for i, look in enumerate(best.tolist()):
        assert seen.counts[i] == sum(step.z_pres[i] for step in steps[look])
        for t in range(3):
            assert torch.equal(seen.z_where[i, t], steps[look][t].z_where[i])
            assert torch.equal(seen.canvases[i, t + 1], steps[look][t].canvas[i])
    first = air.infer(x, sample=False)
    assert torch.equal(first.elbo, weights[0])
    # Each look begins a fifth of a window away from the place, and in another direction.
    away = torch.stack([air.attend.start(x, look)[0] for look in range(4)])
    assert away[0].tolist() == [0, 0] and away[1:].norm(dim=-1).tolist() == pytest.approx([0.2 * 2 / 3] * 3)
    assert torch.pdist(away).min() > 0.1
    with pytest.raises(ValueError, match="looks"):
        air.infer(x, looks=0)


def test_inference_brings_arrays_to_the_model(air):
    """By the rule in images.py: of any range, polarity and layout, also turned and mirrored views; and says so."""
    mask = np.zeros((3, 60, 50), np.uint8)
    mask[0, 10:30, 20:30] = mask[1, 40:50, 5:25] = 1
    mask[2] = mask[1, ::-1]
    canvases = to_canvases([mask], 50).x
    assert canvases.max() == 255
    expected = air.infer(to_images(canvases), sample=False)
    for array in (mask, mask.astype(bool), mask * 255, 4095 * mask.astype(np.uint16), mask[::-1][::-1].astype(">f8")):
        torch.testing.assert_close(air.infer(array, sample=False).boxes, expected.boxes)
    with pytest.warns(UserWarning, match="dark objects"):
        inverted = air.infer(1 - mask, sample=False)  # Interpolating makes edges a little different.
    torch.testing.assert_close(inverted.boxes, expected.boxes, atol=0.01, rtol=0)
    with pytest.warns(UserWarning, match="too low to be told from noise"):
        air.infer(mask + 200)


def test_copies(air, x):
    air.guide(x)  # leaves what it painted, with a graph behind it
    other = copy.deepcopy(air)
    assert torch.equal(other.infer(x, sample=False).boxes, air.infer(x, sample=False).boxes)
    for num_steps in (0, -1, 51):
        with pytest.raises(ValueError, match="num_steps"):
            air.infer(x, num_steps=num_steps)


@pytest.mark.parametrize(
    "images, error",
    [
        (torch.zeros(2, 64, 64), r"expected \[n, 50, 50\]"),
        (torch.zeros(50, 50), "shape"),
        (255 * torch.ones(1, 50, 50), "outside"),
        (torch.stack([torch.zeros(50, 50), torch.ones(50, 50)]), "light on black"),
        (torch.eye(50, dtype=torch.uint8)[None], "light on black"),  # a mask of 0 and 1
        (np.full((1, 50, 50), np.nan), "NaN"),
        (np.zeros((50, 50)), "shape"),
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
