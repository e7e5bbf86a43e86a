import csv
import json
import shutil
import sys
from functools import partial

import coins
import estimators
import numpy as np
import pyro
import pytest
import seeds
import speed
import sprites
import table
import torch
import unlike
import without
from conftest import ROOT, metrics
from pyro import poutine
from scipy.ndimage import label

from air import AIR
from images import read_arrays


def test_speed_counts_the_matrix_products():
    """What is recorded of a small network is what its layers need, forward and backward."""
    layers = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    with speed.MatrixProducts() as recorded:
        layers(torch.ones(2, 7)).square().sum().backward()
    forward, weights, inputs = 2 * (7 * 5 + 5 * 3), 2 * (7 * 5 + 5 * 3), 2 * 5 * 3
    assert recorded.multiply_adds == forward + weights + inputs
    recorded.replay()()


def test_speed_compares(capsys):
    """Both guides and estimators, none of them faster than its floor."""
    args = type("Args", (), {"batch_size": 8, "rounds": 3, "steps": 1})
    line = speed.training(torch.zeros(100, 50, 50, dtype=torch.uint8), args)
    assert list(line) == ["residual tracegraph", "residual traceenum", "rnn tracegraph", "rnn traceenum"]
    assert all(version["floor_ratio"] > 1 for version in line.values())
    assert "residual traceenum" in capsys.readouterr().out


@pytest.mark.slow
def test_estimators_compares_them_and_goes_on_where_it_was(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimators, "MIDDLE", 20)
    flags = ["--seeds", "0", "-n", "40", "-b", "8", "--draws", "2", "--eval-every", "20"]
    flags += ["--data-dir", str(data_dir), "--out", str(tmp_path), "--estimators", "traceenum", "tracegraph, RNN"]
    monkeypatch.setattr("sys.argv", ["estimators.py", *flags])
    estimators.main()
    out = capsys.readouterr().out
    assert "traceenum, seed 0" in out and "tracegraph, RNN, seed 0" in out
    noise = json.loads((tmp_path / "noise.json").read_text())
    middle = int(list(noise)[1])  # where the signal found it
    assert list(noise) == ["0", str(middle), "40"] and 20 <= middle < 40
    assert set(noise["40"]) == {"traceenum", "tracegraph, RNN"}
    assert (tmp_path / "estimators.png").stat().st_size > 10_000

    # An interrupted run goes on, a finished one is left as it is.
    finished, interrupted = tmp_path / "traceenum-seed0", tmp_path / "tracegraph-RNN-seed0"
    before = (finished / "metrics.jsonl").read_bytes(), torch.load(interrupted / "checkpoint.pt")["parameters"]
    shutil.copy(interrupted / "middle.pt", interrupted / "checkpoint.pt")
    lines = (interrupted / "metrics.jsonl").read_text().splitlines(keepends=True)
    (interrupted / "metrics.jsonl").write_text(lines[0])
    estimators.main()
    out = capsys.readouterr().out
    assert "tracegraph, RNN, seed 0" in out and "traceenum, seed 0" not in out
    assert (finished / "metrics.jsonl").read_bytes() == before[0]
    after = torch.load(interrupted / "checkpoint.pt")["parameters"]
    assert all(torch.equal(after[name], value) for name, value in before[1].items())


def test_noise_of_the_gradients(x):
    """The exact sum is less noisy than samples, where z_pres is chosen."""
    args = type("Args", (), {"num_steps": 4000, "draws": 30, "estimators": list(estimators.ESTIMATORS)})
    pyro.set_rng_seed(0)
    air = estimators.AIR()
    checkpoint = {"air": air.config, "parameters": air.state_dict()}
    measured = estimators.noise(checkpoint, 0, x.float(), args)
    attend = {name: row["attend"] for name, row in measured.items()}
    assert attend["traceenum"] < 0.8 * min(value for name, value in attend.items() if name != "traceenum")


def test_seeds_stops_each_run_at_its_step(data_dir, tmp_path, monkeypatch, capsys):
    """Runs with the schedules of whole ones; what is there is not made again."""
    own = ["--", "-n", "100000", "-b", "8", "--eval-every", "2", "--data-dir", str(data_dir)]
    monkeypatch.setattr(sys, "argv", ["seeds.py", "--seeds", "0", "7", "--stop-at", "4", "--out", str(tmp_path), *own])
    seeds.main()
    out = capsys.readouterr().out
    assert "seed     0:" in out and "seed     7:" in out and "2 seeds" in out and "at step 4" in out
    for seed in (0, 7):
        config = json.loads((tmp_path / f"seed{seed}" / "config.json").read_text())
        assert config["flags"]["seed"] == seed and config["flags"]["num_steps"] == 100_000
    monkeypatch.setattr(seeds.subprocess, "Popen", None)
    seeds.main()
    assert capsys.readouterr().out.splitlines()[-1] == out.splitlines()[-1]


def test_seeds_of_whole_runs(data_dir, tmp_path, monkeypatch, capsys):
    own = ["--", "-n", "4", "-b", "8", "--data-dir", str(data_dir)]
    monkeypatch.setattr(sys, "argv", ["seeds.py", "--whole", "--seeds", "3", "--out", str(tmp_path), *own])
    seeds.main()
    out, last = capsys.readouterr().out, json.loads((tmp_path / "seed3/metrics.jsonl").read_text().splitlines()[-1])
    assert last["split"] == "test" and "test scenes" in out
    assert f"sample {last['count_accuracy']:.2%}" in out and f"looks {last['count_accuracy_looks']:.2%}" in out


def test_without_a_part(data_dir, tmp_path, monkeypatch):
    """There is such a part, the likelihood in one piece is the same density, and a run goes without."""
    for replacements in without.PARTS.values():
        assert all(hasattr(where, name) for where, name, _ in replacements)

    air, x = AIR(num_steps=2).eval(), torch.rand(5, 50, 50)
    guide, model = air.traces(x)
    other = poutine.trace(poutine.replay(partial(without.one_likelihood, air), trace=guide)).get_trace(x)
    assert other.log_prob_sum().item() == pytest.approx(model.log_prob_sum().item())

    dot = torch.zeros(1, 50, 50)
    dot[:, 10, 30] = dot[:, 20, 40] = 1  # Halfway between is (35.5, 15.5), in pixels from the corner.
    x_and_y = without.mean_place(air.attend, dot)[0]
    assert x_and_y.tolist() == pytest.approx([2 * 35.5 / 50 - 1, 2 * 15.5 / 50 - 1])

    canvas, pose = torch.full((5, 50, 50), 0.1, requires_grad=True), torch.tensor([[3.0, 0.0, 0.0]]).expand(5, 3)
    for replacement in without.PARTS["stop-gradient"]:
        monkeypatch.setattr(*replacement)
    for part in (air.attend.residual(x, canvas), air.attend.crop(pose, x, canvas, 28)):
        assert torch.autograd.grad(part.sum(), canvas)[0].abs().sum() > 0

    own = ["--", "-n", "2", "-b", "8", "--data-dir", str(data_dir)]
    flags = ["--whole", "--seeds", "0", "--without", "gains", "--out", str(tmp_path), *own]
    monkeypatch.setattr(sys, "argv", ["seeds.py", *flags])
    seeds.main()
    monkeypatch.setattr(sys, "argv", ["seeds.py", *flags[:3], "--out", str(tmp_path / "all"), *own])
    seeds.main()
    lines = [metrics(folder / "seed0")[-1]["elbo"] for folder in (tmp_path, tmp_path / "all")]
    assert lines[0] != lines[1]


def test_sprites_are_as_many_as_they_say(monkeypatch, tmp_path):
    """As many pieces of ink as shapes, or fewer where they touch; and no file that is there is replaced."""
    monkeypatch.setattr(sys, "argv", ["sprites.py", str(tmp_path / "a.npz"), "-n", "60"])
    sprites.main()
    with pytest.raises(SystemExit, match="already exists"):
        sprites.main()
    x, counts = read_arrays(tmp_path / "a.npz")
    assert x.shape == (60, 64, 64) and set(counts) == {0, 1, 2, 3}
    for image, count in zip(x, counts):
        inside = label(image >= 120)[1]
        assert inside <= count and (inside > 0) == (count > 0)
    assert np.mean([label(image > 0)[1] == count for image, count in zip(x, counts)]) > 0.7
    monkeypatch.setattr(sys, "argv", ["sprites.py", str(tmp_path / "five.npz"), "-n", "5", "--shapes", "5", "5"])
    sprites.main()
    assert read_arrays(tmp_path / "five.npz")[1].tolist() == [5] * 5
    with pytest.raises(ValueError, match="do not fit"):
        sprites.scene(40, np.random.default_rng(0))
    monkeypatch.setattr(sys, "argv", ["sprites.py", str(tmp_path / "b")])
    with pytest.raises(SystemExit):
        sprites.main()


def test_first_evaluation_at_an_accuracy():
    lines = [
        {"split": "validation", "step": step, "seconds": step / 10, "count_accuracy": accuracy}
        for step, accuracy in ((100, 0.5), (200, 0.91), (300, 0.89), (400, 0.96))
    ]
    assert estimators.first_at(lines, 0.90) == (200, 20.0) and estimators.first_at(lines, 0.95) == (400, 40.0)
    assert estimators.first_at(lines, 0.98) == pytest.approx((float("inf"), float("inf")))


def test_the_table_of_runs(run):
    """Of one run: its own numbers, three times."""
    folder, _ = run
    last = metrics(folder)[-1]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.table([folder]).splitlines()]
    assert rows[0] == ["seed", "one sample", "five looks", "ELBO", "validation at step 500"]
    assert [row[0] for row in rows[2:]] == ["0", "**mean**", "**worst**"]
    expected = [f"{last['count_accuracy']:.2%}", f"{last['count_accuracy_looks']:.2%}", f"{last['elbo']:.1f}", ""]
    assert all(row[1:] == expected for row in rows[2:])


def test_the_comparison_of_settings(tmp_path):
    for folder, seed, accuracy in (("a", 2, 0.5), ("a", 10, 0.7), ("b", 0, 0.9)):
        lines = [
            {"split": split, "step": 500, "count_accuracy": accuracy, "elbo": 600 + seed}
            for split in ("validation", "test")
        ]
        (tmp_path / folder / f"seed{seed}").mkdir(parents=True)
        (tmp_path / folder / f"seed{seed}" / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    rows = table.comparison([tmp_path / "a", tmp_path / "b"], 500).splitlines()
    assert rows[2:] == ["| a | 50.0%, 70.0% | 602.0, 610.0 |", "| b | 90.0% | 600.0 |"]
    with pytest.raises(SystemExit, match="0 of 2 runs"):
        table.comparison([tmp_path / "a"], 1000)


def test_the_coins_are_counted_by_hand_and_others_are_trained_on():
    """The hand count is that of the marked circles, and no crop to learn from shows anything of the hundred."""
    with open(ROOT / "benchmarks/coins_counts.csv", newline="") as file:
        rows = [{name: int(value) for name, value in row.items()} for row in csv.DictReader(file)]
    held_out = np.array([(r["left"], r["top"], r["left"] + r["width"], r["top"] + r["height"]) for r in rows])
    _, inside = coins.coins_in(held_out)
    assert len(rows) == 100 and inside.sum(1).tolist() == [row["count"] for row in rows]
    cut = []
    photograph = np.arange(303 * 384, dtype=np.uint32).reshape(303, 384)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coins, "canvas", lambda crop, rng: cut.append(crop))
        list(coins.training_crops(photograph, 60, np.random.default_rng(0)))
    seen = np.unique(np.concatenate([crop.ravel() for crop in cut]))
    shown = np.zeros(photograph.size, bool)
    for left, top, right, bottom in held_out:
        shown[photograph[top:bottom, left:right].ravel()] = True
    assert len(cut) == 60 and not shown[seen].any()


def test_unlike_prints_a_share_for_each_kind(run, digits, monkeypatch, capsys):
    monkeypatch.setattr(unlike, "load_digits", lambda *_: digits)
    monkeypatch.setattr(sys, "argv", ["unlike.py", str(run[0]), "-n", "3"])
    unlike.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 17 and all(0 <= float(line.split()[-1].rstrip("%")) <= 100 for line in lines)
