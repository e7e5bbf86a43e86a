import itertools
import json
import shutil
from functools import partial
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
from pyro import poutine
from scipy.ndimage import label
from skimage.data import coins as coin
from torch.utils.flop_counter import FlopCounterMode

import main
import multi_mnist
from air import AIR
from evaluation import evaluate
from inference import traces
from multi_mnist import Scenes
from training.checkpoint import load_air, read_checkpoint


def test_localisation():
    """Intersection over union in pixels counted one by one, by the best of all assignments."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:40, :40]
    boxes, counts, true_counts = rng.integers(1, 20, (100, 5, 4)), rng.integers(0, 4, 100), rng.integers(0, 3, 100)
    left, top, w, h = boxes.transpose(2, 0, 1)[..., None, None]
    inside = (x >= left) & (x < left + w) & (y >= top) & (y < top + h)  # [100, 5, 40, 40]
    a, b = inside[:, :3, None], inside[:, None, 3:]
    iou = (a & b).sum((-2, -1)) / (a | b).sum((-2, -1))
    for i, (some, few) in enumerate(zip(counts, true_counts)):
        iou[i, some:], iou[i, :, few:] = 0, 0
    best = [max(each[order, [0, 1]].sum() for order in itertools.permutations(range(3), 2)) for each in iou]
    seen = SimpleNamespace(counts=counts, boxes=boxes[:, :3].astype(float), y_att=np.ones((100, 3, 28, 28)))
    found = report.localisation(seen, Scenes(None, true_counts, None, boxes[:, 3:]))["all"]
    assert found["pairs"] == np.minimum(counts, true_counts).sum() and found["inferred_objects"] == counts.sum()
    assert found["mean_iou"] == pytest.approx(sum(best) / found["pairs"])
    painted = np.zeros((2, 28, 28))
    painted[0, 7:14, 14:] = 0.3
    expected = [[17, 17, 14, 14], [3, 3, 28, 56]]  # what is empty is as large as its window
    assert (report.painted_boxes(painted, np.array([[3.0, 3, 28, 56]] * 2)) == expected).all()


def test_report(run, digits, monkeypatch, tmp_path):
    """All of it, as if the run had been trained on multi-MNIST."""
    some = multi_mnist.compose(*digits, 20, np.random.default_rng(0))
    patched = {"load_split": lambda *_: some, "load_digits": lambda *_: digits, "PROBED": (60, 40), "UNLIKE": 10}
    for name, value in (patched | {"MOVES_SHOWN": 3}).items():
        monkeypatch.setattr(report, name, value)
    folder, checkpoint = shutil.copytree(run[0], tmp_path / "run"), torch.load(run[0] / "checkpoint.pt")
    call(report.main, folder, error="is not a finished run on multi-MNIST")
    checkpoint["flags"]["data"], checkpoint["reference"]["temperature"] = None, 2.0
    torch.save(checkpoint, folder / "checkpoint.pt")
    call(report.main, folder)
    measured = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    counting, more = measured["counting"], measured["more_digits"]
    assert counting == counting | evaluate(load_air(run[0]), some, measure_search=True, temperature=2.0).metrics
    low, high = counting["count_accuracy_interval"]
    assert low < counting["count_accuracy"] < high and measured["importance_bound_100"] > counting["elbo"]
    assert [(part["digits"], part["max_objects"]) for part in more] == [(3, 3), (3, 8), (4, 8), (5, 8)]
    for task in measured["representation"].values():
        assert task["mlp_probe_on_codes"] <= 1 and task.keys() == measured["representation"]["sum"].keys()
    assert (folder / "unseen.png").stat().st_size > 10_000 and (folder / "search.png").exists()


def test_speed_counts_the_matrix_products(capsys, monkeypatch):
    """What is recorded of a small network is what its layers need, forward and backward; and tables are printed."""
    layers = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    with speed.MatrixProducts() as recorded:
        layers(torch.ones(2, 7)).square().sum().backward()
    with FlopCounterMode(display=False) as counter:
        recorded.replay("cpu")()
    # Two each of forward, weights and inputs, but for the inputs of the first layer; two images.
    assert counter.get_total_flops() == 2 * 2 * (2 * (7 * 5 + 5 * 3) + 5 * 3)
    monkeypatch.setattr(speed, "AIR", partial(AIR, image_size=20, window_size=9))
    for table in speed.training, speed.inference:
        table(torch.zeros(256, 20, 20, dtype=torch.uint8), 1, 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and [line[:21].strip() for line in lines[1:5]] == [" ".join(v) for v in speed.VERSIONS]


def test_noise_of_the_gradients(x):
    """The exact sum is less noisy than samples, where z_pres is chosen."""
    pyro.enable_validation(False)
    parameters, x = AIR(guide="rnn").state_dict(), x.float()
    measured = estimators.noise(parameters, x, 10, x[:0])
    rows = estimators.gradients("summed out", parameters, x, 10, x[:0]).double()
    mean, (exact, _) = sum(rows) / 10, measured.pop("summed out")
    variance = sum((row - mean).square().sum() for row in rows) / 9
    assert exact == pytest.approx((variance / (mean.square().sum() - variance / 10)).item(), rel=1e-3)
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
    with without.left_out("gains"):
        model = poutine.trace(poutine.replay(air.model, trace=guide)).get_trace(x)
    assert gains.log_prob_sum().item() == pytest.approx(model.log_prob_sum().item()) and "gain_0" not in model


def rows_of(script, *args) -> list[list[str]]:
    lines = call(script.main, *args).stdout.splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]


def test_seeds_trains_until_a_step(run, data_file, tmp_path, monkeypatch):
    """With the schedules of whole runs, and without a part; what is there is not made again."""
    shutil.copytree(run[0], tmp_path / "seed0")
    flags = ["--out", tmp_path, "--", "-n", 100_000, "-b", 8, "--eval-every", 2, "--data", data_file]
    rows = rows_of(seeds, "--seeds", 0, 7, "--at", 4, "--without", "gains", *flags)
    lines = [metrics(tmp_path / f"seed{seed}")[1] for seed in (0, 7)]
    assert lines[0] == metrics(run[0])[1] and lines[1]["step"] == 4 and lines[1]["baseline_r2"] is None
    assert read_checkpoint(tmp_path / "seed7")[0]["flags"]["seed"] == 7
    accuracies, elbos = ([line[key] for line in lines] for key in ("count_accuracy", "elbo"))
    assert rows[0] == ["seed", "one sample", "ELBO"] and rows[3] == ["7", f"{accuracies[1]:.2%}", f"{elbos[1]:.1f}"]
    assert rows[-1] == ["**worst**", f"{min(accuracies):.2%}", f"{min(elbos):.1f}"] and len(rows) == 7
    monkeypatch.setattr(seeds, "unseen", lambda runs: f"| {AIR().decode.bias} | {len(runs)}")
    again = rows_of(seeds, "--seeds", 0, 7, "--at", 4, "--without", "bias", "--unseen", *flags)
    assert again == [*rows, ["0.0", "2"]]
    shown = [", ".join(f"{value:.1%}" for value in accuracies), ", ".join(f"{value:.1f}" for value in elbos)]
    assert rows_of(seeds, "--compare", tmp_path, "--at", 4)[-1] == [tmp_path.name, *shown]
    call(seeds.main, "--compare", tmp_path, "--at", 100, error="no evaluation at step 100")


def test_scripts_print_what_they_measured_of_a_finished_run(run, digits, scenes, tmp_path, monkeypatch):
    shutil.copytree(run[0], tmp_path / "seed3")
    patched = [(report, "UNLIKE", 10), (many, "SCENES", [(3, 90)]), (many, "EACH", 1), (moves, "MOST", (0, 2))]
    patched += [(many, "SIZES", (1.4,)), (coins, "coins", lambda: coin()[:80, :250])]
    patched += [
        (estimators, "load_split", lambda *_: Scenes(*(part[:20] for part in scenes))),
        (estimators, "FIT", 2),
        (estimators, "BATCH", 8),
    ]
    for patch in [*patched, *((script, "load_digits", lambda *_: digits) for script in (many, moves, seeds, unlike))]:
        monkeypatch.setattr(*patch)
    last, rows = metrics(run[0])[-1], rows_of(seeds, "--whole", "--seeds", 3, "--out", tmp_path, "--unseen")
    one, searched, elbo = f"{last['count_accuracy']:.2%}", f"{last['count_accuracy_search']:.2%}", f"{last['elbo']:.1f}"
    assert rows[0] == ["seed", "one sample", "search", "ELBO"] and rows[2] == ["3", one, searched, elbo]
    more = report.more_digits(load_air(run[0]), digits)
    assert rows[8] == ["3", *(f"{part['count_accuracy']:.1%} ({part['count_accuracy_search']:.1%})" for part in more)]
    assert rows_of(seeds, "--whole", "--compare", tmp_path)[-1] == [tmp_path.name, f"{one} ({searched})", elbo]
    flags = ["--seeds", 0, "-n", 4, "--draws", 2, "--out", tmp_path / "estimators", "--figure", tmp_path / "e.png"]
    lines = [line.split(":")[0] for line in call(estimators.main, *flags).stdout.splitlines()]
    assert lines == [*(f"{name}, seed 0" for name in estimators.ESTIMATORS), "update 0", "update 1", "update 4"]
    assert " coins; 24 are there" in call(coins.main, tmp_path / "seed3").stdout
    assert (tmp_path / "seed3" / "coins.png").exists()
    lines = call(many.main, tmp_path / "seed3").stdout.splitlines()
    assert lines[0].startswith("3 digits, 90x90: ") and lines[1].startswith("size 1.4: ")
    monkeypatch.setattr(many, "TIMED", {50: (1, 2)})
    lines = call(many.main, tmp_path / "seed3", "--time", tmp_path / "time.png").stdout.splitlines()
    assert len(lines) == 2 and (tmp_path / "time.png").exists()
    lines = call(moves.main, run[0], tmp_path / "moves.png", "-n", 6).stdout.splitlines()
    assert lines[0].startswith("0 moves, 0 to 2 digits: ") and len(lines) == 8 and (tmp_path / "moves.png").exists()
    lines = call(unlike.main, run[0], "-n", 1).stdout.splitlines()
    assert len(lines) == 15 and all(0 <= float(line.split()[-1].rstrip("%")) <= 100 for line in lines)


def test_sprites(tmp_path):
    """As many pieces of ink as shapes."""
    call(sprites.main, tmp_path / "a.npz", "-n", 60)
    call(sprites.main, tmp_path / "a.npz", error="already exists")
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
