"""What is read out of the guide, and what it may be asked."""

import numpy as np
import pytest
import torch
from pyro.infer import TraceGraph_ELBO
from test_air import small_air

from inference import MostProbable, explain, infer, log_importance_weight, traces
from modules import Step, image_to_object, object_to_image


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
    assert air.training  # It was looked at as in evaluation, but is left as it was.
    torch.manual_seed(5)
    elbo = -TraceGraph_ELBO(max_plate_nesting=1).loss(air.eval().model, air.guide, x)
    torch.manual_seed(5)
    slots = air.guide(x)
    assert float(seen.log_weight.sum()) == pytest.approx(elbo)
    assert seen.q_count.sum(1).tolist() == pytest.approx([1] * 6)
    for i, count in enumerate(seen.counts.tolist()):
        assert count == sum(slot.z_pres[i] for slot in slots)
        a, b, c = (slot.z_pres_prob[i].item() for slot in slots)
        assert seen.q_count[i].tolist() == pytest.approx([1 - a, a * (1 - b), a * b * (1 - c), a * b * c])
        canvas = object_to_image(seen.z_where[i], air.decode(seen.z_what[i]), 50)[:count].sum(0).detach()
        for part in (seen.reconstruction[i], seen.canvases[i, count]):
            torch.testing.assert_close(part, canvas)
        torch.testing.assert_close(seen.x_att[i], image_to_object(seen.z_where[i], x[[i] * 3, None], 9)[:, 0])
        error, ink = ((part**2).sum().item() for part in (x[i] - canvas, x[i]))
        assert float(seen.explained[i]) == pytest.approx(1 - min(1, error / max(ink, 1e-6)))


def test_without_sampling_nothing_is_left_to_chance(air, x):
    """Neither random numbers nor the other images matter; of `z_pres` and poses, the likeliest value is taken."""
    seen = infer(air, x, sample=False)
    for first, again, alone in zip(seen, infer(air, x, sample=False), infer(air, x[2:3], sample=False)):
        assert torch.equal(first, again)
        torch.testing.assert_close(first[2:3], alone)
    with MostProbable():
        nodes = traces(air, x)[0].nodes
    slots = nodes["_RETURN"]["value"]
    likely = torch.stack([slot.z_pres_prob > 0.5 for slot in slots]).int().cumprod(0)
    assert torch.equal(seen.counts, likely.sum(0)) and 0 < likely.sum() < 18
    assert all(torch.equal(slot.z_where, nodes[f"z_where_{t}"]["fn"].mean) for t, slot in enumerate(slots))


def test_the_best_of_several_looks(air, x):
    """Of each image all that the look with the largest weight saw; the first look is the plain one."""
    with MostProbable():
        looks = [log_importance_weight(air, x, look=look) for look in range(4)]
    weights = torch.stack([weight for _, weight in looks])
    best, seen = weights.argmax(0).tolist(), infer(air, x, sample=False, looks=4)
    assert len({*best}) > 1 and torch.equal(seen.log_weight, weights.amax(0))
    assert torch.equal(infer(air, x, sample=False).log_weight, weights[0])
    for i, look in enumerate(best):
        assert seen.counts[i] == sum(slot.z_pres[i] for slot in looks[look][0])
        assert torch.equal(seen.canvases[i, 1:], torch.stack([slot.canvas[i] for slot in looks[look][0]]))


@pytest.mark.parametrize("kind", ["residual", "rnn"])
def test_more_objects_than_in_training(kind, x):
    """As many as are asked for. What predict.py reports: up to eight, by five looks, if the guide can use them."""
    air = small_air(guide=kind)
    (air.attend.present if kind == "residual" else air.attend.predict)[-1].bias.data.fill_(1000.0)
    assert [infer(air, x, max_objects=n).counts.tolist() for n in (None, 5)] == [[3] * 6, [5] * 6]
    by_hand = infer(air, x, False, 8, 5) if kind == "residual" else infer(air, x, False)
    assert all(torch.equal(a, b) for a, b in zip(explain(air, x), by_hand))
    assert explain(air, x, max_objects=2).counts.tolist() == [2] * 6
    for wrong in ({"max_objects": 0}, {"max_objects": 51}, {"looks": 0}):
        with pytest.raises(ValueError, match=f"^{[*wrong][0]} must be"):
            infer(air, x, **wrong)


def test_a_faint_canvas_among_others(air, x):
    """It is not refused, nor is an empty one, and the others are seen as they are without them."""
    faint = 0.05 / x[1].max() * x[1:2]
    together = infer(air, torch.cat([x[:1], faint, 0 * faint, x[2:]]), sample=False)
    for all_of_it, others in zip(together, infer(air, torch.cat([x[:1], x[2:]]), sample=False)):
        torch.testing.assert_close(all_of_it[[0, 3, 4, 5, 6]], others)


@pytest.mark.filterwarnings("error")  # There is nothing to say of ordinary ones.
def test_arrays_and_tensors_are_the_same_canvases(scenes):
    air, canvases = small_air().float(), scenes.x[:4]
    expected = infer(air, torch.from_numpy(canvases).float() / 255, sample=False)
    for x in (canvases, torch.from_numpy(canvases), canvases / np.float32(255)):
        assert all(torch.equal(a, b) for a, b in zip(infer(air, x, sample=False), expected))
    with pytest.warns(UserWarning, match="1 of 4 canvases are not light on black"):
        infer(air, np.concatenate([255 - canvases[:1], canvases[1:]]))


def test_what_cannot_be_canvases(air):
    """One line says what is wrong: the shape, or else the values."""
    wrong = [(np.zeros(shape), "shape") for shape in ((2, 64, 64), (50, 50), (50, 50, 3), (0, 50, 50))]
    wrong += [(torch.full((1, 50, 50), value), "values") for value in (1.5, -0.1, np.nan, np.inf)]
    for x, error in wrong:
        with pytest.raises(ValueError, match=rf"^canvases have {error} [^\n]*\Z"):
            infer(air, x)
