"""Model and guide against slow references: one image at a time, object by object, without masks and batches."""

import math

import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from scipy import ndimage
from torch import nn

from air import AIR
from modules import image_to_object, object_to_image

SMALL = {"image_size": 50, "window_size": 9, "z_what_size": 4, "rnn_size": 16, "hidden_size": 12, "baseline_size": 8}
SMALL |= {"look_size": 10}
COUNTS = [0, 1, 2, 3, 1, 2]  # of the six images `x`
POSE_MEAN, POSE_SD = torch.tensor([3.0, 0, 0]), torch.tensor([0.2, 1, 1])
PIXEL_SD = torch.tensor(0.3, dtype=torch.float64)


def small_air(bias=3.0, **options):
    """Its objects are bright, so that what is painted matters, or, with a bias of 0, a little brighter than nothing, so
    that some of them pay; and its second look corrects the first."""
    air = AIR(**SMALL | options).double()
    nn.init.constant_(air.decode.mlp[-1].bias, bias)
    if air.sees_residual:
        nn.init.normal_(air.attend.correct.weight, std=0.3)
    return air


@pytest.fixture
def air():
    return small_air()


def choices(counts, max_objects=3):
    """Values for all choices: random poses and codes, and as many objects as `counts` says."""
    values = {}
    for t in range(max_objects):
        values[f"z_pres_{t}"] = (torch.tensor(counts) > t).double()
        values[f"z_where_{t}"] = POSE_MEAN + POSE_SD * torch.randn(len(counts), 3).double()
        values[f"z_what_{t}"] = torch.randn(len(counts), SMALL["z_what_size"]).double()
    return values


def log_density(program, *args, **options):
    """The log-density `[n]` of what a Pyro program chooses."""
    trace = poutine.trace(program).get_trace(*args, **options)
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site).detach()


def normal(value, mean, sd):
    """The log-density of independent Normals, by the formula."""
    return (-0.5 * ((value - mean) / sd) ** 2 - sd.log() - 0.5 * math.log(2 * math.pi)).sum()


def paint_by_hand(air, values, i, count):
    """The canvas of scene `i`: its first objects, one on the other."""
    canvas = torch.zeros(1, 50, 50).double()
    for t in range(count):
        canvas += object_to_image(values[f"z_where_{t}"][i : i + 1], air.decode(values[f"z_what_{t}"][i : i + 1]), 50)
    return canvas[0].detach()


@pytest.mark.parametrize("ratio, max_objects", [(0.01, 3), (0.5, 3), (0.5, 5)])
def test_model_density_by_hand(ratio, max_objects, x):
    """As many objects as are asked for; and "x" may be given as a choice among others. What a step holds after the last
    object counts for nothing."""
    air = small_air(count_ratio=ratio)
    counts, expected = [0, 1, 2, 3, max_objects, 2], torch.zeros(6).double()
    values = choices(counts, max_objects)
    for i, count in enumerate(counts):
        expected[i] = math.log(ratio**count / sum(ratio**n for n in range(max_objects + 1)))
        for t in range(count):
            expected[i] += normal(values[f"z_where_{t}"][i], POSE_MEAN, POSE_SD)
            expected[i] += normal(values[f"z_what_{t}"][i], torch.tensor(0.0), torch.tensor(1.0))
        expected[i] += normal(x[i], paint_by_hand(air, values, i, count), PIXEL_SD)
    actual = log_density(poutine.condition(air.model, values), x, max_objects=max_objects)
    chosen = poutine.condition(air.model, values | {"x": x})
    for density in actual, log_density(chosen, num_scenes=6, max_objects=max_objects):
        torch.testing.assert_close(density, expected, rtol=1e-8, atol=0)


def residual_step_by_hand(net, image, canvas):
    """What the residual guide proposes for one image `[h, h]`; scipy's filters where it has shifts and products."""
    residual = (image - canvas).clamp(min=0)
    # Means over squares of about 0.78 and 1.5 windows of 50 / 3 pixels; there is nothing outside the image.
    inner, outer = (ndimage.uniform_filter(residual.numpy(), size, mode="constant") for size in (13, 25))
    i, j = divmod(int((inner - outer).argmax()), 50)
    peak = (torch.tensor([j, i]).double() * 2 + 1) / 50 - 1

    def crops(pose, widen):
        return [image_to_object(pose, picture[None, None], 9, widen)[:, 0] for picture in (residual, image)]

    # (The first network was made for crops that lie side by side.)
    first = net.look(torch.cat(crops(torch.cat([POSE_MEAN[:1], -3 * peak])[None], 2.0), -1))
    shift, scale = net.propose(first).chunk(2, -1)
    s = 3 + POSE_SD[0] * shift[0, 0]
    mean = torch.stack([s, 0.6 * shift[0, 1] - s * peak[0], 0.6 * shift[0, 2] - s * peak[1]])[None]
    second = net.look_closer(torch.stack(crops(mean, 1.5), 1))
    correction, factor = net.correct(second).chunk(2, -1)
    sd = POSE_SD * nn.functional.softplus(scale) * 2 * torch.sigmoid(factor)
    return net.present(torch.cat([first, second], -1))[0, 0], mean + POSE_SD * correction, sd


@pytest.mark.parametrize("kind", ["residual", "rnn"])
def test_guide_density_by_hand(kind, x):
    """Stopping at the first z_pres = 0."""
    air = small_air(guide=kind)
    values = choices(COUNTS)
    expected = torch.zeros(6).double()
    for i, count in enumerate(COUNTS):
        canvas, previous = torch.zeros(50, 50).double(), torch.zeros(1, 3 + 4).double()
        state = kind == "rnn" and air.attend.rnn.init_state(1)
        for t in range(3):
            if kind == "residual":
                logit, mean, sd = residual_step_by_hand(air.attend, x[i], canvas)
            else:
                state = air.attend.rnn(air.attend.rnn.project_image(x[i : i + 1]), previous, state)
                logit, mean, sd = air.attend.predict(state[0])[0].split([1, 3, 3])
                mean, sd = POSE_MEAN + POSE_SD * mean, POSE_SD * nn.functional.softplus(sd)
            p = torch.sigmoid(logit).item()
            if t == count:
                expected[i] += math.log(1 - p)
                break
            z_where, z_what = values[f"z_where_{t}"][i : i + 1], values[f"z_what_{t}"][i : i + 1]
            expected[i] += math.log(p) + normal(z_where, mean, sd).detach()
            seen = (x[i] - canvas, x[i]) if kind == "residual" else (x[i],)
            crop = torch.cat([image_to_object(z_where, picture[None, None], 9) for picture in seen], 1)
            mean, sd = air.encode.net(crop)[0].chunk(2)
            expected[i] += normal(z_what, mean, nn.functional.softplus(sd)).detach()
            canvas, previous = paint_by_hand(air, values, i, t + 1), torch.cat([z_where, z_what], 1)
    torch.testing.assert_close(log_density(poutine.condition(air.guide, values), x), expected, rtol=1e-6, atol=0)


def test_baseline_and_elbo_do_not_train_each_other(air, x):
    z_pres = {f"z_pres_{t}": (torch.tensor(COUNTS) > t).double() for t in range(3)}
    guide = poutine.trace(poutine.condition(air.guide, z_pres)).get_trace(x)
    model = poutine.trace(poutine.replay(poutine.condition(air.model, z_pres), guide)).get_trace(x)
    baselines = [guide.nodes[f"z_pres_{t}"]["infer"]["baseline"]["baseline_value"] for t in range(3)]
    names, parameters = zip(*air.named_parameters())

    def trained_by(loss):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        return {name for name, gradient in zip(names, gradients) if gradient is not None}

    theirs = {name for name in names if name.startswith("baseline.")}
    assert trained_by(sum(value.sum() for value in baselines)) == theirs
    assert trained_by(model.log_prob_sum() - guide.log_prob_sum()) == {*names} - theirs
    for t in range(1, 3):  # Where a scene is complete there is nothing to predict.
        assert ((baselines[t] == 0) == (guide.nodes[f"z_pres_{t - 1}"]["value"] == 0)).all()


@pytest.mark.parametrize("form", ["model", "uncondition", "Predictive"])
def test_the_model_runs_forward(form, air, x):
    """The pixels of a scene are Normal around the canvas with its objects, however it is sampled."""
    air.count_ratio = 1.0  # so that all counts are seen
    if form == "Predictive":  # of one scene, 40 times
        values = {name: value[:, 0] for name, value in Predictive(air.model, num_samples=40)().items()}
    else:
        unconditioned = poutine.uncondition(air.model), x.repeat(7, 1, 1)
        program, images = unconditioned if form == "uncondition" else (air.model, None)
        trace = poutine.trace(program).get_trace(images, num_scenes=40)
        values = {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "sample"}
        assert torch.equal(trace.nodes["_RETURN"]["value"], values["x"])
    counts = sum(values[f"z_pres_{t}"] for t in range(3)).int().tolist()
    assert {*counts} == {0, 1, 2, 3}
    for count in range(4):
        scenes = [i for i, its_count in enumerate(counts) if its_count == count]
        noise = torch.stack([values["x"][i] - paint_by_hand(air, values, i, count) for i in scenes])
        assert abs(noise.mean()) < 0.01 and abs(noise.std() - 0.3) < 0.01
