import numpy as np
import pytest
import torch
from pyro import poutine

from air import AIR
from evaluation import baseline_r2, evaluate, unusual, usual
from multi_mnist import Scenes


@pytest.fixture(scope="module")
def air():
    torch.manual_seed(0)
    return AIR(look_size=16, hidden_size=16, baseline_size=8)


def test_the_numbers_are_what_they_are_called(air, scenes):
    evaluation = evaluate(air, scenes, batch_size=64)
    result = evaluation.metrics
    torch.manual_seed(0)
    x = torch.from_numpy(scenes.x).float() / 255
    seen = [air.infer(x[start : start + 64]) for start in range(0, 200, 64)]
    counts = np.concatenate([part.counts for part in seen])
    modes = np.concatenate([part.count_probs.argmax(1) for part in seen])
    assert result["images"] == 200
    assert result["count_accuracy"] == np.mean(counts == scenes.counts)
    assert result["count_accuracy_mode"] == np.mean(modes == scenes.counts)
    assert result["elbo"] == pytest.approx(np.concatenate([part.elbo for part in seen]).mean(), rel=1e-5)
    assert result["last_step_rate"] == np.mean(counts == 3)
    for true, row in enumerate(result["confusion"]):
        assert row == [int(((scenes.counts == true) & (counts == n)).sum()) for n in range(4)]
    # And what was seen is of the very same samples.
    assert np.array_equal(evaluation.counts, counts)
    assert np.array_equal(evaluation.boxes, np.concatenate([part.boxes for part in seen]))
    assert np.array_equal(evaluation.first.canvases, seen[0].canvases[:30])


def test_several_looks_are_measured_beside_one_sample(air, scenes):
    one, more = evaluate(air, scenes).metrics, evaluate(air, scenes, looks=3).metrics
    right = air.infer(scenes.x, sample=False, looks=3).counts.numpy() == scenes.counts
    assert one["count_accuracy_looks"] is None and more == one | {"count_accuracy_looks": right.mean()}


def test_any_batch_size_and_the_same_again(air, scenes):
    few = Scenes(scenes.x[:10], scenes.counts[:10])
    results = [evaluate(air, few, batch_size=size).metrics for size in (1, 3, 10, 500, 500)]
    assert all(result["images"] == 10 and np.sum(result["confusion"]) == 10 for result in results)
    assert results[-1] == results[-2] == results[-3]


def test_it_disturbs_nothing(air, scenes):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    evaluate(air, Scenes(scenes.x[:5], scenes.counts[:5]))
    assert torch.equal(torch.rand(4), expected)
    assert air.training and all(p.grad is None for p in air.parameters())


def test_few_ordinary_scenes_are_unusual():
    """Whatever their counts are; and more objects than were seen may cost as much more as they did there."""
    rng = np.random.default_rng(0)
    for kinds in ([0, 1, 2], [1, 2, 3], [2], [0, 3], [0]):
        counts = rng.choice(kinds, 20_000)
        elbo = 700 - 50 * counts - rng.exponential(10, 20_000) * (counts > 0)
        explained, largest = rng.beta(20, 2, 20_000), rng.poisson(15, 20_000)
        bounds = usual(counts[:10_000], elbo[:10_000], explained[:10_000], largest[:10_000])
        others = zip(counts[10_000:], elbo[10_000:], explained[10_000:], largest[10_000:])
        flagged = np.mean([bool(unusual(bounds, *scene)) for scene in others])
        assert 0.002 < flagged < 0.015, kinds
        assert (
            unusual(bounds, 1, -1000, 1.0, 10) and unusual(bounds, 1, 1000, 0.1, 10) and unusual(bounds, 1, 1000, 1, 99)
        )
        if kinds == [0, 1, 2]:
            assert not unusual(bounds, 5, 700 - 5 * 50 - 40, 1.0, 10)
            assert unusual(bounds, 5, 700 - 5 * 50 - 80, 1.0, 10)


def test_large_images_are_looked_at_few_at_a_time(scenes, monkeypatch):
    """So that memory does not grow with the canvas."""
    air, seen = AIR(image_size=200, look_size=16, hidden_size=16, baseline_size=8), []
    explain = air.explain
    monkeypatch.setattr(air, "explain", lambda x, **options: seen.append(len(x)) or explain(x, **options))
    evaluate(air, Scenes(np.zeros((50, 200, 200), np.uint8)))
    assert sum(seen) == 50 and max(seen) * 200**2 <= 500 * 50**2


def test_without_true_counts(air, scenes):
    result = evaluate(air, Scenes(scenes.x[:5] / np.float32(255))).metrics
    assert result["images"] == 5 and np.isfinite(result["elbo"])
    assert result["count_accuracy"] is result["count_accuracy_mode"] is result["confusion"] is None


def test_how_much_the_baseline_r2(scenes):
    """With one step, what follows the choice is the ELBO without the empty canvas's likelihood."""
    torch.manual_seed(0)
    air = AIR(num_steps=1, look_size=16, hidden_size=16, baseline_size=8, exploration=0.0)
    x = torch.from_numpy(scenes.x).float() / 255
    torch.manual_seed(1)
    elbo = air.infer(x).elbo
    empty = torch.distributions.Normal(0.0, 0.3).log_prob(x).sum((1, 2))
    gains = (elbo - empty).double()
    for constant in (0.0, float(gains.mean())):
        with torch.no_grad():
            air.baseline.linear.weight.zero_()
            air.baseline.linear.bias.fill_(constant / 100)  # BASELINE_SCALE
        torch.manual_seed(1)
        expected = 1 - float((gains - constant).square().mean() / gains.var(correction=0))
        assert baseline_r2(air, x) == pytest.approx(expected, abs=1e-3)
    assert expected == pytest.approx(0, abs=1e-6)  # The mean is a baseline that explains nothing.
    assert baseline_r2(AIR(num_steps=1, look_size=16, hidden_size=16, baseline_size=8), x[:1]) is None


def test_a_baseline_that_sees_the_future_explains_it_all(scenes, monkeypatch):
    """With three steps: predictions that are what each step and the later ones will add."""
    torch.manual_seed(0)
    air = AIR(look_size=16, hidden_size=16, baseline_size=8, exploration=0.0)
    x = torch.from_numpy(scenes.x[:50]).float() / 255
    torch.manual_seed(1)
    guide = poutine.trace(air.guide).get_trace(x)
    model = poutine.trace(poutine.replay(air.model, trace=guide)).get_trace(x)
    for trace in (guide, model):
        trace.compute_log_prob()
    to_come = [
        sum(
            trace.nodes[name]["log_prob"] * sign
            for trace, sign in ((model, 1), (guide, -1))
            for name in trace.nodes
            if name[-1] in "012"[t:] and "log_prob" in trace.nodes[name]
        )
        for t in range(3)
    ]
    told = iter(to_come)
    monkeypatch.setattr(air.baseline, "forward", lambda look, inputs, state: (next(told), state))
    torch.manual_seed(1)
    assert baseline_r2(air, x) == pytest.approx(1)
