import itertools
import json

import numpy as np
import pytest
import report
import torch
import unseen
from conftest import call

import multi_mnist
from air import AIR, Inference
from evaluation import evaluate, importance_bound
from multi_mnist import Scenes


def test_overlap_is_that_of_pixels():
    rng = np.random.default_rng(0)
    corners, sides = rng.integers(0, 20, (200, 2, 2)), rng.integers(1, 15, (200, 2, 2))
    boxes = np.concatenate([corners, sides], -1)
    filled = np.zeros((200, 2, 40, 40), bool)
    for i, j in np.ndindex(200, 2):
        x, y, w, h = boxes[i, j]
        filled[i, j, y : y + h, x : x + w] = True
    common, either = filled.all(1).sum((1, 2)), filled.any(1).sum((1, 2))
    assert 0 < (common > 0).mean() < 1
    assert np.allclose(report.overlap(boxes[:, 0].astype(float), boxes[:, 1].astype(float)), common / either)


def test_match_is_the_best_of_all_assignments():
    rng = np.random.default_rng(0)
    n = 100
    boxes = np.concatenate([rng.uniform(0, 20, (n, 3, 2)), rng.uniform(5, 20, (n, 3, 2))], -1)
    true_boxes = rng.integers(1, 20, (n, 2, 4))
    counts, true_counts = rng.integers(0, 4, n), rng.integers(0, 3, n)
    pairs = report.match(boxes, counts, true_boxes, true_counts)
    for i in range(n):
        mine = pairs.scene == i
        some, few = counts[i], true_counts[i]
        assert mine.sum() == min(some, few)
        assert len(set(pairs.step[mine])) == len(set(pairs.digit[mine])) == mine.sum()
        iou = report.overlap(boxes[i, :some, None], true_boxes[i, None, :few].astype(float))
        if few > some:
            iou = iou.T
        best = max(
            sum(iou[s, d] for d, s in enumerate(p)) for p in itertools.permutations(range(len(iou)), iou.shape[1])
        )
        matched = report.overlap(boxes[i, pairs.step[mine]], true_boxes[i, pairs.digit[mine]].astype(float))
        assert matched.sum() == pytest.approx(best, abs=1e-4)


def test_boxes_that_are_right_are_found_right(scenes):
    """With the true boxes as windows that are filled to the edge, of which some scenes lack one."""
    counts = scenes.counts.copy()
    short = np.flatnonzero(counts == 2)[:10]
    counts[short] = 1
    n = len(counts)
    nothing = np.zeros((n, 2, 1))
    seen = Inference(
        counts, *[nothing] * 6, scenes.boxes.astype(float), nothing, np.ones((n, 2, 28, 28)), nothing, nothing
    )
    found = report.localisation(seen, report.match(seen.boxes, counts, scenes.boxes, scenes.counts), scenes)
    for part, missing in (("correctly_counted", 0), ("all", 10)):
        assert found[part]["true_objects"] - found[part]["pairs"] == missing
        for name in ("window", "ink"):
            assert found[part][f"{name}_pairs_of_iou_50"] == found[part]["pairs"]
            assert found[part][f"{name}_mean_iou"] == pytest.approx(1)
            assert found[part][f"{name}_mean_centre_distance_px"] == pytest.approx(0, abs=1e-9)
    assert found["all"]["scenes"] == n == found["correctly_counted"]["scenes"] + 10


def test_ink_boxes_of_painted_objects(digits):
    patches = digits[0] / 255 * 0.9
    windows = np.tile([3.0, 5.0, 28.0, 28.0], (len(patches), 1))
    expected = multi_mnist.ink_boxes((patches > report.PAINTED).astype(np.uint8)) + [3, 5, 0, 0]
    assert np.allclose(report.painted_boxes(patches, windows), expected)
    assert np.allclose(report.painted_boxes(0 * patches, windows), windows)


def test_importance_bound(scenes):
    """Where nothing is ever painted, log p(x) is known: the bound lies below it, and rises towards it from the ELBO."""
    air = AIR(exploration=0.0)
    air.decode.bias = -1e9
    some = Scenes(*(part[:50] for part in scenes))
    x = torch.from_numpy(some.x) / 255
    exact = torch.distributions.Normal(0.0, air.likelihood_sd).log_prob(x).sum((1, 2)).mean().item()
    one, ten, many = (importance_bound(air, some, samples).mean() for samples in (1, 10, 100))
    assert evaluate(air, some).metrics["elbo"] == pytest.approx(one, abs=5)
    assert one < ten < many < exact + 0.5
    assert exact - many < (exact - one) / 3


def test_report(run_main, digits, monkeypatch, tmp_path):
    """All of it, after a run of a few steps."""
    monkeypatch.setattr(report, "load_digits", lambda *_: digits)
    monkeypatch.setattr(report, "PROBED", (100, 60))
    monkeypatch.setattr(report, "UNLIKE", 40)
    folder = tmp_path / "run"
    assert run_main("-n", 4, "-b", 8, "--visdom", "off", "--out", folder).returncode == 0
    reported = call(report.main, folder)
    assert reported.returncode == 0, reported.stderr
    measured = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    assert list(measured) == ["step", "counting", "localisation", "representation", "generalisation"]
    counting, evaluated = measured["counting"], json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("elbo", "count_accuracy", "count_accuracy_mode", "confusion", "last_step_rate"):
        assert counting[name] == evaluated[name]
    low, high = counting["count_accuracy_interval"]
    assert low < counting["count_accuracy"] < high
    assert counting["importance_bound_100"] > counting["elbo"]
    more = measured["generalisation"]["more_digits"]
    assert [(part["digits"], part["steps"], sum(part["inferred_counts"])) for part in more] == [
        (3, 3, 40),
        (3, 8, 40),
        (4, 8, 40),
        (5, 8, 40),
    ]
    assert [part["size_px"] for part in measured["generalisation"]["sizes"]] == list(report.SIZES)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8 and "None" not in page and "nan" not in page.split("base64,")[0]

    monkeypatch.setattr(unseen, "load_digits", lambda *_: digits)
    table = call(unseen.main, folder, folder / "checkpoint.pt").stdout.splitlines()
    assert len(table) == 6 and table[2].split(" | ")[1:] == table[3].split(" | ")[1:]
    assert table[2].split(" | ")[3].split()[0] == f"{more[2]['count_accuracy']:.1%}"

    assert call(report.main, folder / "checkpoint.pt").stderr.endswith("is not the folder of a run\n")


def test_an_air_that_finds_nothing(digits, scenes, monkeypatch):
    monkeypatch.setattr(report, "PROBED", (20, 10))
    monkeypatch.setattr(report, "UNLIKE", 10)
    air = AIR()
    with torch.no_grad():
        air.attend.present[-1].bias[0] = -500
    measured, pictures = report.report(air, Scenes(*(part[:20] for part in scenes)), *digits)
    assert measured["localisation"]["all"]["pairs"] == 0 and measured["representation"]["digit_class"] is None
    assert "Scenes of another kind" in report.page("Nothing", json.loads(json.dumps(measured)), pictures)


def test_probes_tell_what_is_there_from_what_is_not(scenes, digits, monkeypatch):
    """Codes that are the class give it away, and pixels of a window that is always the same do not."""
    monkeypatch.setattr(report, "PROBED", (1200, 150))

    def look(air, x, num_steps=None):
        n = len(x)
        labels, boxes, counts = known[n]
        codes = np.eye(10)[labels].astype(np.float32)
        one = np.ones((n, 2, 28, 28), np.float32)
        where = np.zeros((n, 2, 3), np.float32)
        return Inference(counts, where, where, where, where, codes, codes, boxes.astype(float), one, one, one, one)

    known, used = {}, []

    def compose(*args, **options):
        used.append({image.tobytes() for image in args[0]})
        made = multi_mnist.compose(*args, **options)
        known[len(made.x)] = (made.labels, made.boxes, made.counts)
        return made

    monkeypatch.setattr(report, "infer_all", look)
    monkeypatch.setattr(report, "compose", compose)
    order = np.arange(60).reshape(2, 30).T.ravel()  # all ten classes among every second of them
    measured = report.representation(AIR(), *(part[order] for part in digits))
    assert not used[0] & used[1], "tested on digits that it was trained on"
    assert measured["digit_class"]["linear_probe_on_codes"] == 1
    assert measured["digit_class"]["linear_probe_on_pixels"] < 0.3
    assert measured["ascending"]["linear_probe_on_codes"] > 0.9
    assert measured["sum"]["mlp_probe_on_codes"] > measured["sum"]["mlp_probe_on_pixels"] + 0.3


@pytest.mark.parametrize("shrink, width", [((28 / 12.5, 0.0), 12), ((28 / 32.5, 0.0), 32)])
def test_sizes_are_what_they_say(shrink, width):
    """A digit that is all ink shows the size that it is drawn in."""
    full = np.full((1, 28, 28), 100, np.uint8)
    scenes = multi_mnist.compose(full, np.zeros(1, int), 20, np.random.default_rng(0), max_digits=1, shrink=shrink)
    assert {tuple(box[2:]) for box in scenes.boxes[scenes.counts == 1, 0]} == {(width, width)}
