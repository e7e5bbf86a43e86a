import itertools
import json
import shutil
import sys
from types import SimpleNamespace

import coins
import estimators
import many
import moves
import nuclei
import numpy as np
import pyro
import pytest
import report
import seeds
import speed
import sprites
import torch
import unlike
import without
from conftest import call, metrics
from PIL import Image
from pyro import poutine
from scipy.ndimage import label

import main
import multi_mnist
from air import AIR
from evaluation import evaluate
from inference import traces
from training.checkpoint import load_air


def test_match_is_the_best_of_all_assignments():
    """By intersection over union, in pixels that are counted one by one."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:40, :40]
    boxes, counts, true_counts = rng.integers(1, 20, (100, 5, 4)), rng.integers(0, 4, 100), rng.integers(0, 3, 100)
    left, top, w, h = boxes.transpose(2, 0, 1)[..., None, None]
    inside = (x >= left) & (x < left + w) & (y >= top) & (y < top + h)  # [100, 5, 40, 40]
    a, b, found, true = inside[:, :3, None], inside[:, None, 3:], boxes[:, :3].astype(float), boxes[:, 3:]
    iou = (a & b).sum((-2, -1)) / (a | b).sum((-2, -1))
    assert np.allclose(report.overlap(found[:, :, None], true[:, None].astype(float)), iou)
    pairs = report.match(found, counts, true, true_counts).T
    for i, (some, few) in enumerate(zip(counts, true_counts)):
        iou[i, some:], iou[i, :, few:] = 0, 0
        best = max(iou[i, order, [0, 1]].sum() for order in itertools.permutations(range(3), 2))
        steps, digits = pairs[pairs[:, 0] == i, 1:].T
        assert len(steps) == len(set(steps)) == len(set(digits)) == min(some, few)
        assert iou[i, steps, digits].sum() == pytest.approx(best, abs=1e-4)


def test_boxes_that_are_right_are_found_right(scenes, digits):
    """With the true boxes as windows that are filled to the edge, of which ten scenes lack one."""
    counts, filled = scenes.counts.copy(), np.ones((len(scenes.x), 2, 28, 28))
    counts[np.flatnonzero(counts == 2)[:10]] = 1
    found = report.localisation(SimpleNamespace(counts=counts, boxes=scenes.boxes.astype(float), y_att=filled), scenes)
    for part, missing in (found["correctly_counted"], 0), (found["all"], 10):
        assert part["inferred_objects"] == part["pairs"] == part["true_objects"] - missing
        for name in ("window", "ink"):
            assert part[f"{name}_pairs_of_iou_50"] == part["pairs"] and part[f"{name}_mean_iou"] == pytest.approx(1)
            assert part[f"{name}_mean_centre_distance_px"] == pytest.approx(0, abs=1e-9)
    patches, windows = digits[0] / 255 * 0.9, np.tile([3.0, 5.0, 28.0, 28.0], (len(digits[0]), 1))
    left, top, right, bottom = np.transpose([Image.fromarray(patch > report.PAINTED).getbbox() for patch in patches])
    expected = np.stack([left + 3, top + 5, right - left, bottom - top], 1)
    assert np.allclose(report.painted_boxes(patches, windows), expected)
    assert np.allclose(report.painted_boxes(0 * patches, windows), windows)


def test_probes_tell_what_is_there_from_what_is_not(digits, monkeypatch):
    """Codes that are the class give it away, and pixels of a window that is always the same do not."""
    made = []

    def compose(images, *args, **options):
        made.append((images.tobytes(), multi_mnist.compose(images, *args, **options)))
        return made[-1][1]

    def look(air, x):
        scenes, one, nowhere = made[-1][1], np.ones((len(x), 2, 28, 28)), np.zeros((len(x), 2, 3))
        boxes = {"counts": scenes.counts, "boxes": scenes.boxes.astype(float)}
        return SimpleNamespace(z_what_mean=np.eye(10)[scenes.labels], z_where=nowhere, x_att=one, **boxes)

    for name, value in {"PROBED": (600, 100), "infer_all": look, "compose": compose}.items():
        monkeypatch.setattr(report, name, value)
    order = np.arange(60).reshape(2, 30).T.ravel()  # all ten classes among every second of them
    measured = report.representation(AIR(image_size=36), *(part[order] for part in digits))
    assert [images for images, _ in made] == [digits[0][order[i::2]].tobytes() for i in (0, 1)]  # none in both
    classes, total, ascending = (measured[task] for task in ("digit_class", "sum", "ascending"))
    assert classes["linear_probe_on_codes"] == 1 and classes["linear_probe_on_pixels"] < 0.3
    assert total["mlp_probe_on_codes"] > 0.4 > total["mlp_probe_on_pixels"] and ascending["mlp_probe_on_codes"] > 0.9


def test_report(run, digits, monkeypatch, tmp_path):
    """All of it, as if the run had been trained on multi-MNIST; and of an AIR that finds nothing."""
    some = multi_mnist.compose(*digits, 20, np.random.default_rng(0))
    patched = {
        "load_split": lambda *_: some,
        "load_digits": lambda *_: digits,
        "PROBED": (60, 40),
        "UNLIKE": 10,
        "MOVES_SHOWN": 3,
    }
    for name, value in patched.items():
        monkeypatch.setattr(report, name, value)
    folder, checkpoint = shutil.copytree(run[0], tmp_path / "run"), torch.load(run[0] / "checkpoint.pt")
    assert "was not trained on multi-MNIST" in call(report.main, folder).stderr
    checkpoint["flags"]["data"] = None
    torch.save(checkpoint, folder / "checkpoint.pt")
    assert "its probabilities are not calibrated" in call(report.main, folder).stderr
    checkpoint["reference"]["temperature"] = 2.0
    torch.save(checkpoint, folder / "checkpoint.pt")
    assert not (reported := call(report.main, folder)).returncode, reported.stderr
    measured = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    counting, more = measured["counting"], measured["more_digits"]
    assert counting == counting | evaluate(load_air(run[0]), some, measure_search=True, temperature=2.0).metrics
    low, high = counting["count_accuracy_interval"]
    assert low < counting["count_accuracy"] < high and counting["importance_bound_100"] > counting["elbo"]
    assert [(part["digits"], part["max_objects"]) for part in more] == [(3, 3), (3, 8), (4, 8), (5, 8)]
    assert sum(number for *_, number in measured["reliability"]) == 10
    assert (folder / "report.png").stat().st_size > (folder / "unseen.png").stat().st_size > 10_000
    assert (folder / "search.png").exists() and (folder / "reliability.png").stat().st_size > 5_000
    air = AIR()
    torch.nn.init.constant_(air.attend.present[-1].bias, -500)
    assert report.localisation(report.infer_all(air, some.x), some)["all"]["pairs"] == 0
    assert report.representation(air, *digits)["digit_class"] is None
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "report.py: error: the probes need scikit-learn: pip install" in call(report.main, folder).stderr


def test_speed_counts_the_matrix_products(capsys):
    """What is recorded of a small network is what its layers need, forward and backward; and tables are printed."""
    layers = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    with speed.MatrixProducts() as recorded:
        layers(torch.ones(2, 7)).square().sum().backward()
    assert recorded.multiply_adds == 2 * (7 * 5 + 5 * 3) + 2 * (7 * 5 + 5 * 3) + 2 * 5 * 3  # forward, weights, inputs
    recorded.replay("cpu")()
    for table in (lambda x: speed.training(x, 8, 1, 1), lambda x: speed.inference(x, 1, 1)):
        table(torch.zeros(40, 50, 50, dtype=torch.uint8))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and [line[:21].strip() for line in lines[1:5]] == [" ".join(v) for v in speed.VERSIONS]


def test_noise_of_the_gradients(x):
    """The exact sum is less noisy than samples, where z_pres is chosen."""
    pyro.enable_validation(False)
    parameters, x = AIR(guide="rnn").state_dict(), x.float()
    measured = estimators.noise(parameters, x, 20, x[:0])
    rows = estimators.gradients("summed out", parameters, x, 20, x[:0]).double()
    mean, (exact, _) = sum(rows) / 20, measured.pop("summed out")
    variance = sum((row - mean).square().sum() for row in rows) / 19
    assert exact == pytest.approx((variance / (mean.square().sum() - variance / 20)).item(), rel=1e-3)
    assert exact < 0.8 * min(value for value, _ in measured.values())


def test_without_a_part(x):
    """Each makes a difference to training, but "gains" none to the density, nor where z_pres is summed out."""
    x, air = x.float(), AIR()

    def train(part: str | None, estimator: str = "tracegraph") -> torch.Tensor:
        pyro.set_rng_seed(0)
        with without.left_out(part):
            air = main.AIR(baseline="none")
            svi, _ = main.make_svi(air, estimator)
            for images in (0 * x, x, x):  # The second gradient is much longer than the first.
                svi.step(images)
        return torch.cat([parameter.detach().flatten() for parameter in air.parameters()])

    whole, exact, other = train(None), train(None, "traceenum"), train("gains", "traceenum")
    assert all(not torch.equal(whole, train(part)) for part in without.PARTS) and torch.equal(whole, train(None))
    assert torch.allclose(exact, other, atol=1e-4) and not torch.allclose(exact, whole, atol=1e-4)
    guide, gains = traces(air, x)
    with without.left_out("gains"):  # only in training
        model = poutine.trace(poutine.replay(air.train().model, trace=guide)).get_trace(x)
    assert gains.log_prob_sum().item() == pytest.approx(model.log_prob_sum().item()) and "gain_0" not in model


def rows_of(script, *args) -> list[list[str]]:
    assert not (called := call(script.main, *args)).returncode, called.stderr
    return [line.strip("| ").split(" | ") for line in called.stdout.splitlines() if line.startswith("|")]


def test_seeds_trains_until_a_step(data_file, tmp_path, monkeypatch):
    """With the schedules of whole runs, and without a part; what is there is not made again."""
    flags = ["--out", tmp_path, "--", "-n", 100_000, "-b", 8, "--eval-every", 2, "--data", data_file]
    rows = rows_of(seeds, "--seeds", 0, 7, "--at", 4, "--without", "gains", *flags)
    lines = [metrics(tmp_path / f"seed{seed}")[1] for seed in (0, 7)]
    assert all(line["step"] == 4 and line["baseline_r2"] is None for line in lines)
    accuracies, elbos = ([line[key] for line in lines] for key in ("count_accuracy", "elbo"))
    assert rows[0] == ["seed", "one sample", "ELBO"] and rows[3] == ["7", f"{accuracies[1]:.2%}", f"{elbos[1]:.1f}"]
    assert rows[-1] == ["**worst**", f"{min(accuracies):.2%}", f"{min(elbos):.1f}"] and len(rows) == 7
    monkeypatch.setattr(seeds, "unseen", lambda runs: f"| {AIR().decode.bias} | {len(runs)}")
    again = rows_of(seeds, "--seeds", 0, 7, "--at", 4, "--without", "bias", "--unseen", *flags)
    assert again == [*rows, ["0.0", "2"]]
    shown = [", ".join(f"{value:.1%}" for value in accuracies), ", ".join(f"{value:.1f}" for value in elbos)]
    assert rows_of(seeds, "--compare", tmp_path, "--at", 4)[-1] == [tmp_path.name, *shown]
    assert "no evaluation at step 100" in call(seeds.main, "--compare", tmp_path, "--at", 100).stderr


def test_scripts_print_what_they_measured_of_a_finished_run(run, digits, scenes, tmp_path, monkeypatch):
    shutil.copytree(run[0], tmp_path / "seed3")
    patched = [(report, "UNLIKE", 10), (many, "SCENES", [(3, 90)]), (estimators, "load_split", lambda *_: scenes)]
    patched += [(estimators, "FIT", 2), (estimators, "BATCH", 8)]
    for patch in [*patched, *((script, "load_digits", lambda *_: digits) for script in (many, moves, seeds, unlike))]:
        monkeypatch.setattr(*patch)
    last, rows = metrics(run[0])[-1], rows_of(seeds, "--whole", "--seeds", 3, "--out", tmp_path, "--unseen")
    one, searched, elbo = f"{last['count_accuracy']:.2%}", f"{last['count_accuracy_search']:.2%}", f"{last['elbo']:.1f}"
    assert rows[0] == ["seed", "one sample", "search", "ELBO"] and rows[2] == ["3", one, searched, elbo]
    more = [counted for _, counted, _ in report.more_digits(load_air(run[0]), *digits, 8, None)]
    assert rows[8] == ["3", *(f"{part['count_accuracy']:.1%} ({part['count_accuracy_search']:.1%})" for part in more)]
    assert rows_of(seeds, "--whole", "--compare", tmp_path)[-1] == [tmp_path.name, f"{one} ({searched})", elbo]
    flags = ["--seeds", 0, "-n", 4, "--draws", 2, "--out", tmp_path / "estimators", "--figure", tmp_path / "e.png"]
    lines = [line.split(":")[0] for line in call(estimators.main, *flags).stdout.splitlines()]
    assert lines == [*(f"{name}, seed 0" for name in estimators.ESTIMATORS), "update 0", "update 1", "update 4"]
    assert " coins; 24 are there" in call(coins.main, tmp_path / "seed3").stdout
    assert (tmp_path / "seed3" / "coins.png").stat().st_size > 10_000
    lines = call(many.main, tmp_path / "seed3", "-n", 2, "--sizes", 2).stdout.splitlines()
    assert lines[0].startswith("3 digits, 90x90: ") and len(lines) == 6
    monkeypatch.setattr(many, "CANVASES", (64, 128))
    rows = rows_of(many, tmp_path / "seed3", "--time", tmp_path / "time.png")
    assert [row.count("-") for row in rows[2:]] == [3, 2] and (tmp_path / "time.png").stat().st_size > 10_000
    rows = rows_of(moves, run[0], "-n", 6, "--moves", 0, 2)
    assert [row[0] for row in rows] == ["moves", "---", "0", "2"] and all(row[4].endswith(" ms") for row in rows[2:])
    lines = call(unlike.main, run[0], "-n", 2).stdout.splitlines()
    assert len(lines) == 15 and all(0 <= float(line.split()[-1].rstrip("%")) <= 100 for line in lines)


def test_sprites(tmp_path):
    """As many pieces of ink as shapes."""
    assert call(sprites.main, tmp_path / "a.npz", "-n", 60).returncode == 0
    assert "already exists" in call(sprites.main, tmp_path / "a.npz").stderr
    x, counts = np.load(tmp_path / "a.npz").values()
    pieces = np.array([label(image > 119)[1] for image in x])
    assert x.shape == (60, 64, 64) and set(counts) == {0, 1, 2, 3} and np.mean(pieces == counts) > 0.7
    assert (pieces <= counts).all() and ((pieces > 0) == (counts > 0)).all()


def test_nuclei_are_scored():
    """By hand: one is found, one twice, one missed, and one centre lies outside; and the watershed finds two discs."""
    mask = np.zeros((40, 60), int)
    mask[2:10, 2:10], mask[2:10, 20:30], mask[20:30, 40:50] = 1, 2, 3
    text = nuclei.score(np.array([[5.0, 5], [22, 4], [28, 8], [15, 35]]), mask)
    assert text == "4 counted of 3; 2 found, 1 missed, 2 false: F1 0.571"
    y, x = np.mgrid[:40, :60]
    discs = [(np.hypot(x - left, y - 20) < 9) for left in (20, 36)]
    assert nuclei.score(nuclei.centres(100.0 * np.any(discs, 0)), discs[0] + 2 * (discs[1] & ~discs[0])).endswith(
        "F1 1.000"
    )
