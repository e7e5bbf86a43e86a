from types import SimpleNamespace

import numpy as np
import pytest
import torch
from report import importance_bound
from scipy.stats import norm

import evaluation
from air import AIR
from evaluation import ReferenceStats, bounds, evaluate, find_at_scale, out_of_distribution, recombine
from images import to_canvas
from inference import Inference, infer, traces
from multi_mnist import Scenes
from patches import Found, find

SMALL = {"look_size": 16, "hidden_size": 16, "baseline_size": 8}


@pytest.fixture
def air():
    return AIR(**SMALL)


def test_the_numbers_are_what_they_are_called(air, scenes, monkeypatch):
    x, true = scenes.x[:40], scenes.counts[:40]
    monkeypatch.setattr(evaluation, "BATCH_PIXELS", 20 * 4 * 50**2)  # 20 images
    result, *others = evaluate(air, Scenes(x, true), measure_search=True, temperature=2.0)
    torch.manual_seed(0)
    seen = Inference(*map(torch.cat, zip(infer(air, x[:20]), infer(air, x[20:]))))
    counts, searched = seen.counts.numpy(), find(air, x)
    guesses = counts, seen.count_probs.argmax(1).numpy(), np.array([found.count for found in searched])
    ways = [result[f"count_accuracy{way}"] for way in ("", "_mode", "_search")]
    assert ways == [np.mean(guess == true) for guess in guesses]
    assert result.items() >= evaluation.search_metrics(searched, true, 2.0).items()
    assert result["images"] == 40 and result["last_step_rate"] == np.mean(counts == 3)
    assert result["elbo"] == pytest.approx(seen.log_weight.mean().item(), rel=1e-5)
    assert result["confusion"] == [[((true == i) & (counts == j)).sum() for j in range(4)] for i in range(3)]
    assert all(map(np.array_equal, [*others[:2], others[2].canvases], [counts, seen.boxes, seen.canvases[:30]]))
    # (Of large images, fewer are looked at together, so that memory does not grow with the canvas.)
    assert evaluation.default_batch_size(AIR(image_size=100, **SMALL), 3) == 20 // 4


def test_few_ordinary_scenes_are_out_of_distribution():
    """Whatever their counts are; and more objects than were seen may cost as much more as they did there."""
    rng = np.random.default_rng(0)
    for kinds in ([1, 2, 3], [2], [0, 3], [0], [0, 1, 2]):
        counts = rng.choice(kinds, 20_000)
        log_weight = 700 - 50 * counts - rng.exponential(10, 20_000) * (counts > 0)
        scenes = counts, log_weight, rng.beta(20, 2, 20_000)
        reference = ReferenceStats(*bounds(*(part[:10_000] for part in scenes)), 1.0)
        flagged = [bool(out_of_distribution(reference, *scene)) for scene in zip(*(part[10_000:] for part in scenes))]
        assert 0.002 < np.mean(flagged) < 0.01, kinds
        for strange in ((1, -1000, 1.0), (1, 1000, 0.1)):
            assert len(out_of_distribution(reference, *strange)) == 1
    assert not out_of_distribution(reference, 5, 700 - 5 * 50 - 40, 1.0)
    assert out_of_distribution(reference, 5, 700 - 5 * 50 - 80, 1.0)


def test_what_objects_look_like_is_learned(air, monkeypatch):
    """Of two kinds, told apart by one dimension of the code alone: nearly their true density; of few, the prior."""
    rng, most, n = np.random.default_rng(0), air.max_objects, 4000
    z_where, noise = rng.normal([3, 0, 0], [0.2, 1, 1], (n, most, 3)), rng.normal(size=(n, most, air.z_what_size))
    mean = np.zeros_like(noise)
    mean[..., 7] = rng.choice([-2, 2], (n, most)) + 0.2 * noise[..., 7]
    mean[:, 1:] = 5  # of steps that were not used
    code = np.where(np.arange(air.z_what_size) == 7, mean, mean + noise)

    def infer(air, numbers):
        parts = (torch.from_numpy(part[numbers]).float() for part in (z_where, code, mean))
        return SimpleNamespace(
            **dict(zip(("z_where", "z_what", "z_what_mean"), parts)), counts=torch.ones(len(numbers), dtype=int)
        )

    monkeypatch.setattr(evaluation, "infer", infer)
    features = air.features(*(torch.from_numpy(part[:500, 0]).float() for part in (z_where, code)))
    evaluation.learn_objects(air, np.arange(50))
    assert air.familiarity(features).abs().max() < 1e-3
    evaluation.learn_objects(air, np.arange(n))
    x = code[:500, 0, 7]
    expected = np.logaddexp(*(norm.logpdf(x, at, 0.2) for at in (-2, 2))) - np.log(2) - norm.logpdf(x)
    assert np.abs(air.familiarity(features).numpy() - expected).mean() < 0.2
    strange = features.clone()
    strange[:, 1 + 7] = 0.0
    assert air.familiarity(strange).max() < air.familiarity(features).min() - 10


def believed(evidence) -> list[Found]:
    """Images of a single cell, with this evidence of each count `[n, T + 1]`."""
    rows = torch.as_tensor(evidence)[:, None]
    return [Found(None, None, torch.zeros(int(row.argmax())), None, row, 0.0, 1.0, None) for row in rows]


def test_how_well_probabilities_are_calibrated():
    """By hand: of four sure of 0.9 three are right, of two with 0.6 none, and one of two is wrong with 0.995."""
    sure, half, surest = [0.05, 0.9, 0.05], [0.6, 0.3, 0.1], [0.001, 0.004, 0.995]
    seen, true = believed(np.log(4 * [sure] + 2 * [half] + 2 * [surest])), np.array([1, 1, 1, 2, 1, 2, 2, 0])
    measured = evaluation.search_metrics(seen, true, 1.0)
    assert measured["count_accuracy_search"] == 4 / 8 and measured["sure_but_wrong"] == 1 / 8
    in_bins = [abs(4 + 0 - 4 * 0.9 - 2 * 0.995), 2 * 0.6]  # 0.9 and 0.995 are in one bin of ten
    assert measured["calibration_error"] == pytest.approx(sum(in_bins) / 8)
    assert evaluation.search_metrics(seen, true, None) == {"count_accuracy_search": 4 / 8, "count_error_search": 6 / 8}


def test_the_temperature_is_found():
    """Of counts that are drawn with the probabilities of some evidence, and of the same evidence made too large."""
    rng = np.random.default_rng(0)
    evidence = 3 * rng.normal(size=(500, 5))
    probs = np.exp(evidence) / np.exp(evidence).sum(1, keepdims=True)
    true = np.array([rng.choice(5, p=row) for row in probs])
    for factor in (1.0, 4.0):
        assert evaluation.calibrate(believed(factor * evidence), true) == pytest.approx(factor, rel=0.2)


def test_recombined_scenes(scenes):
    """Sums of as many scenes of one digit as they say, none brighter than white."""
    made = recombine(scenes.x, scenes.counts, 60, 3)
    singles = scenes.x[scenes.counts == 1]
    assert np.bincount(made.counts).tolist() == [15] * 4 and not made.x[made.counts == 0].any()
    for scene in made.x[made.counts == 1]:
        assert (scene == singles).all((1, 2)).any()
    for scene in made.x[made.counts == 2]:  # One of the two leaves another one.
        assert any((scene - one == singles).all((1, 2)).any() for one in singles if (one <= scene).all())
    with pytest.raises(ValueError, match="one object was found in 3 of 3 images"):
        recombine(singles[:3], np.ones(3, int))
    with pytest.raises(ValueError, match="4 objects do not fit on a canvas of 50 pixels"):
        recombine(np.full((30, 50, 50), 80, np.uint8), np.ones(30, int), 10, 4)


def test_importance_bound(scenes):
    """Where nothing is painted, and q differs from the prior in the count only, all about log p(x) is known."""
    air = AIR(guide="rnn", count_ratio=1.0, **SMALL)
    air.decode.bias = -1e9
    for layer, means in (air.attend.predict[-1], 4), (air.encode.net[-1], 50):
        layer.weight.data.zero_()
        layer.bias.data[:means], layer.bias.data[means:] = 0.0, np.log(np.e - 1)  # of which the softplus is 1
    exact = torch.distributions.Normal(0.0, 0.3).log_prob(torch.from_numpy(scenes.x) / 255).sum((1, 2)).numpy()
    # The prior says 1/4 for each count, q says 1/2, 1/4, 1/8, 1/8.
    below = (exact - importance_bound(air, scenes, 1)) / np.log(2)
    assert np.abs(below - below.round()).max() < 1e-3 and {*below.round()} == {1, 0, -1}
    assert np.mean(exact - importance_bound(air, scenes, 20)) == pytest.approx(0, abs=0.05)


def test_how_much_of_what_follows_the_baseline_explains(air, scenes, monkeypatch):
    """All, if it is told what each step and the later ones will add."""
    x = torch.from_numpy(scenes.x[:50]).float() / 255
    torch.manual_seed(1)
    signed = [(sign, trace.nodes) for sign, trace in zip((-1, 1), traces(air, x))]
    added = [sum(s * n[name]["log_prob"] for s, n in signed for name in n if name[-2:] == f"_{t}") for t in range(3)]
    to_come = [sum(added[t:]) for t in range(3)]
    chosen = [torch.ones(50), *(signed[0][1][f"z_pres_{t}"]["value"] for t in range(2))]
    gains = torch.cat([gain[choice == 1] for gain, choice in zip(to_come, chosen)])
    for share, r2 in ((1, 1), (0, 1 - float(gains.square().mean() / gains.var(correction=0)))):
        told = iter([share * gain for gain in to_come])
        monkeypatch.setattr(air.baseline, "forward", lambda projection, inputs, state: (next(told), state))
        torch.manual_seed(1)
        assert evaluation.baseline_r2(air, x) == pytest.approx(r2)
    assert evaluation.baseline_r2(AIR(max_objects=1, **SMALL), x[:1]) is None  # Nothing varies.


def test_large_pieces_are_looked_at_both_ways(air, monkeypatch):
    """They stay smaller, unless the image as it is was explained better by more than SHRINKS. Nearly: a doubt."""
    x = np.zeros((100, 100), np.uint8)
    x[30:60, 40:60] = 255  # 30 pixels, where 13 are usual
    explained = {100: None, 44: 0.8}  # by the image's side

    def found(air, xs):
        return [SimpleNamespace(explained=explained[len(x)], side=len(x)) for x in xs]

    monkeypatch.setattr(evaluation, "find", found)
    for as_it_is, side, in_doubt in ((0.8, 44, False), (0.9, 44, True), (0.95, 100, True)):
        explained[100] = as_it_is
        ((found, canvas, doubt),) = find_at_scale(air, [to_canvas(x)], [None])
        assert (found.side, len(canvas.x), doubt) == (side, side, in_doubt)
        ((found, *_, doubt),) = find_at_scale(air, [to_canvas(x)], [30.0])  # The length is known.
        assert (found.side, doubt) == (44, False)
