"""What is read out of the guide, and what the search makes of it."""

import itertools

import numpy as np
import pytest
import torch
from pyro.infer import TraceGraph_ELBO
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm
from test_air import small_air
from torch.distributions import Normal

import inference
from air import AIR
from inference import OVERLAP, PRICE, View, infer, search
from modules import Look, Step, image_to_object, object_to_image
from patches import find


@pytest.fixture
def air(x):
    """One that finds objects in some of the images."""
    air = small_air()
    last = air.attend.present[-1]
    last.weight.data *= 100
    last.bias.data -= air.attend(Step(x, 0 * x, None, None, air.attend.init_state(x)))[0].mean()
    return air


def test_the_guide_is_read_out(air, x):
    torch.manual_seed(5)
    seen = infer(air, x)
    torch.manual_seed(5)
    elbo = -TraceGraph_ELBO(max_plate_nesting=1).loss(air.eval().model, air.guide, x)
    torch.manual_seed(5)
    slots = air.guide(x)
    assert float(seen.log_weight.sum()) == pytest.approx(elbo)
    for i, count in enumerate(seen.counts.tolist()):
        assert count == sum(slot.z_pres[i] for slot in slots)
        a, b, c = (slot.z_pres_prob[i].item() for slot in slots)
        assert seen.count_probs[i].tolist() == pytest.approx([1 - a, a * (1 - b), a * b * (1 - c), a * b * c])
        canvas = object_to_image(seen.z_where[i], air.decode(seen.z_what[i]), 50)[:count].sum(0).detach()
        for part in (seen.reconstruction[i], seen.canvases[i, count]):
            torch.testing.assert_close(part, canvas)
        torch.testing.assert_close(seen.x_att[i], image_to_object(seen.z_where[i], x[[i] * 3, None], 9)[:, 0])


def by_hand(air, x, canvas, most, moves):
    """`search` of one image `[h, h]`, by its docstring and without Pyro: the objects, the evidence, the best of each
    count, and the objects taken off by each move. canvas: what is painted already."""
    size, window = x.shape[-1], 2 / 3
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(air.z_what_size, generator=rng).double()
    prior = Normal(torch.tensor([3.0, 0, 0]).double(), torch.tensor([0.2, 1, 1]).double())
    mixture = [buffer.numpy() for buffer in air.familiarity.buffers()]

    def propose(seen, place, shift, side=None):
        look = Look(None if place is None else place[None], shift)
        image = x if side is None else torch.where(side, x, seen)
        logit, loc, scale, _ = air.attend(Step(image[None], seen[None], None, None, (), look))
        mean, sd = air.encode(air.crop(loc, image[None], seen[None]))
        code = mean + sd * noise
        in_the_middle = torch.cat([loc[:, :1], torch.zeros_like(loc[:, 1:])], 1)  # as probable as any other place
        log_p = prior.log_prob(in_the_middle).sum() + Normal(0, 1).log_prob(code).sum()
        log_q = Normal(loc, scale).log_prob(loc).sum() + Normal(mean, sd).log_prob(code).sum()
        features = np.append((loc[0, 0] - 3) / 0.2, code[0])
        parts = [
            weight + multivariate_normal(mean, root @ root.T).logpdf(features) for weight, mean, root in zip(*mixture)
        ]
        weight = log_p - log_q + logsumexp(parts) - logsumexp(mixture[0]) - norm.logpdf(features).sum() - PRICE
        return loc[0], object_to_image(loc, air.decode(code), size)[0], weight, logit.item()

    def judge(objects):
        overlap = sum((a[1] * b[1]).sum() for a, b in itertools.combinations([(0, canvas), *objects], 2))
        evidence = Normal(painted(objects), 0.3).log_prob(x).sum() + sum(o[2] for o in objects) - OVERLAP * overlap
        best[len(objects)] = max(best[len(objects)], float(evidence))
        return float(evidence)

    def place(o):
        return -o[0][1:] / o[0][0].clamp(min=1)

    def painted(objects):
        return sum((o[1] for o in objects), canvas)

    best, found, idle, taken = [-np.inf] * (most + 1), [], 0, []
    while len(found) < most and (new := propose(painted(found), None, torch.zeros(2)))[3] >= 0:
        found.append(new)
    evidence = judge(found)
    for move in range(moves):
        if idle >= 12 * max(1, len(found)):
            break
        uniform, shifts = torch.rand(most + 3, generator=rng).double(), torch.randn(most + 1, 3, generator=rng).double()
        jitter, one = 0.15 * window * shifts[:2, :2], int(uniform[0] * len(found))
        here = place(found[one]) if found else torch.zeros(2).double()
        others = sorted(set(range(len(found))) - {one}, key=lambda i: (place(found[i]) - here).norm())
        nearest = others[0] if others else one
        looks, off = [(None, jitter[0]), (None, jitter[1])], {one, nearest}
        if move % 4 == 0:
            off = {i for i in range(len(found)) if uniform[3 + i] <= 0.4}
        elif move % 4 == 2:
            looks = [(here, jitter[0]), (place(found[nearest]) if found else here, jitter[0])]
        elif move % 4 == 3:
            reach = window * (0.3 + 0.2 * uniform[2])
            shift = reach * torch.stack([(2 * np.pi * uniform[1]).cos(), (2 * np.pi * uniform[1]).sin()])
            at = torch.linspace(-1 + 1 / size, 1 - 1 / size, size).double()
            points = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)
            side = ((points - here) @ shift) > 0
            looks, off = [(here, shift, side), (here, -shift, ~side)], {one}
        kept = [o for i, o in enumerate(found) if i not in off]
        first = propose(painted(kept), *looks[0])
        second = propose(painted([*kept, first]), *looks[1])
        again = propose(painted([*kept, second]), place(first), torch.zeros(2))
        last = propose(painted([*kept, again]), place(second), torch.zeros(2))
        choices = [kept, [*kept, first], [*kept, first, second], [*kept, second, again], [*kept, again, last]]
        choices = [(judge(choice), choice) for choice in choices if len(choice) <= most]
        value, choice = max(choices, key=lambda pair: pair[0])
        idle = 0 if value > evidence + 1 else idle + 1
        taken.append(off)
        if value > evidence + 1e-3:
            evidence, found = value, choice
    return found, evidence, best, taken


@pytest.mark.parametrize("most", [3, 6])
def test_the_search_is_what_its_docstring_says(x, most, monkeypatch):
    """For each image, against a slow one without Pyro: the objects, the evidence, and that of each other count."""
    monkeypatch.setattr(inference, "PATIENCE", 12)
    air, compared = small_air(0.0).eval(), 0
    for buffer in air.familiarity.buffers():
        buffer += 0.3 * torch.randn_like(buffer).tril() if buffer.dim() == 3 else torch.randn_like(buffer)
    everywhere = torch.tensor([-np.inf, -np.inf, np.inf, np.inf]).expand(len(x), 4)
    canvas = x.flip(0) / 4
    with torch.no_grad():
        seen = search(air, View(x, canvas, everywhere), most, moves=30, seed=0)
    for i in range(len(x)):
        with torch.no_grad():
            objects, evidence, best, taken = by_hand(air, x[i], canvas[i], most, 30)
        assert seen.counts[i] == len(objects) and float(seen.evidence[i]) == pytest.approx(evidence)
        assert seen.count_evidence[i].tolist() == pytest.approx(best)
        for pose, (expected, *_) in zip(seen.z_where[i], objects):
            torch.testing.assert_close(pose, expected)
        compared += len(taken) > 10
    assert compared > 1


def test_an_answer_of_the_rnn_guide_depends_on_the_image_alone(scenes, monkeypatch):
    """Not on its place among others, on their number, nor on random numbers; and moves find more evidence."""
    monkeypatch.setattr(inference, "TOGETHER", 32)
    air, x = AIR(guide="rnn"), scenes.x[:70]
    torch.nn.init.constant_(air.decode.mlp[-1].bias, 0.0)
    seen = find(air, x, moves=12)
    gained = np.array([a.log_weight - b.log_weight for a, b in zip(seen, find(air, x, moves=0))])
    assert len({found.count for found in seen}) > 1 and (gained > -1e-2).all() and (gained > 1).any()
    order = np.random.default_rng(0).permutation(70)
    for others, which in ((find(air, x[order], moves=12), order), (find(air, x[5:6], moves=12), [5])):
        for other, found in zip(others, (seen[i] for i in which)):
            for part in ("count", "log_weight", "cell_evidence", "explained", "reconstruction"):
                torch.testing.assert_close(getattr(other, part), getattr(found, part), rtol=1e-6, atol=1e-5)


def test_how_many_objects_can_be_found(x, monkeypatch):
    """One sample: as in training, or as many as are asked for. The search: eight, or more if training had more."""
    monkeypatch.setattr("inference.PRICE", -1e4)
    monkeypatch.setattr("patches.PRICE", -1e4)
    for config, sampled, found in (({}, 3, 8), ({"max_objects": 12}, 12, 12), ({"guide": "rnn"}, 3, 3)):
        air = small_air(**config)
        (air.attend.present if air.sees_residual else air.attend.predict)[-1].bias.data[0] = 1000.0
        assert infer(air, x).counts.tolist() == [sampled] * 6 and infer(air, x, 5).counts.tolist() == [5] * 6
        assert [seen.count for seen in find(air, x, moves=2)] == [found] * 6


@pytest.mark.filterwarnings("error")  # There is nothing to say of ordinary ones.
def test_arrays_and_tensors_are_the_same_canvases(scenes):
    air, canvases = small_air().float(), scenes.x[:4]
    expected = find(air, torch.from_numpy(canvases).float() / 255, moves=1)
    for x in (canvases, torch.from_numpy(canvases), canvases / np.float32(255)):
        for other, found in zip(find(air, x, moves=1), expected):
            assert other.log_weight == found.log_weight and torch.equal(other.boxes, found.boxes)
    with pytest.warns(UserWarning, match="1 of 4 canvases are not light on black"):
        infer(air, np.concatenate([255 - canvases[:1], canvases[1:]]))

    # One line says what is wrong: the shape, or else the values.
    wrong = [(np.zeros(shape), "shape") for shape in ((2, 64, 64), (50, 50), (50, 50, 3), (0, 50, 50))]
    wrong += [(torch.full((1, 50, 50), value), "values") for value in (1.5, -0.1, np.nan, np.inf)]
    for x, error in wrong:
        with pytest.raises(ValueError, match=rf"^canvases have {error} [^\n]*\Z"):
            infer(air, x)
