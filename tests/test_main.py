"""main.py as its user calls it: short runs on a few scenes of drawn digits."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, call_main

import main
import multi_mnist
from air import AIR
from evaluation import evaluate

SHORT = ("-n", 6, "-b", 8, "--eval-every", 2, "--save-every", 3)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def parameters(folder):
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    tensors = list(checkpoint["parameters"].values())
    for state in checkpoint["optimizer"]["state"].values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    return [*tensors, checkpoint["rng"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """One finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, call_main(data_dir, *SHORT, "--out", folder, script=ROOT / "main.py")


def test_a_run_leaves_what_it_should(run):
    folder, finished = run
    assert finished.returncode == 0, finished.stderr
    assert "count accuracy" in finished.stdout and str(folder) in finished.stdout
    assert "6/6" in finished.stderr and "ELBO" in finished.stderr and "validation accuracy" in finished.stderr
    pictures = ("attention", "reconstruction", "steps", "mistakes", "prior", "curves", "confusion")
    names = {"checkpoint.pt", "config.json", "metrics.jsonl", ".lock", *(f"{name}.png" for name in pictures)}
    assert {file.name for file in folder.iterdir()} == names
    lines = metrics(folder)
    assert [(line["split"], line["step"]) for line in lines] == [
        ("validation", 2),
        ("validation", 4),
        ("validation", 6),
        ("test", 6),
    ]
    for line in lines:
        confusion = np.array(line["confusion"])
        assert confusion.shape == (3, 4) and confusion.sum() == line["images"] == 64
        assert line["count_accuracy"] == pytest.approx(np.trace(confusion) / 64)
        assert line["last_step_rate"] == pytest.approx(confusion[:, 3].sum() / 64)
        assert line["seconds"] > 0 and line["steps_per_s"] > 0 and np.isfinite(line["elbo"])
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["batch_size"] == 8 and config["seed"] == 0 and config["versions"]["torch"]


def test_eval_only_prints_the_line_of_the_run(run, run_main, tmp_path, scenes):
    folder, _ = run
    evaluated = run_main("--load", folder, "--eval-only")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout) == metrics(folder)[-1]

    np.savez(tmp_path / "own.npz", x=scenes.x[:5] / 255)
    evaluated = run_main("--load", folder / "checkpoint.pt", "--eval-only", "--data", tmp_path / "own.npz")
    line = json.loads(evaluated.stdout)
    assert line["split"] == "data" and line["images"] == 5 and line["step"] == 6
    assert line["count_accuracy"] is line["confusion"] is line["count_accuracy_mode"] is None


@pytest.mark.parametrize(
    "flags", [("--estimator", "traceenum"), ("--baseline", "average"), ("--baseline", "none")], ids=" ".join
)
def test_the_other_estimators(flags, run, run_main, tmp_path):
    """They train to other parameters than the default, from the same ones, and can be resumed."""
    finished = run_main(*SHORT, *flags, "--out", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert not any(name.startswith("baseline.") for name in checkpoint["parameters"])
    decoder = "decode.mlp.0.weight"
    default = torch.load(run[0] / "checkpoint.pt", weights_only=True)["parameters"][decoder]
    assert 0 < (checkpoint["parameters"][decoder] - default).abs().max() < 0.1
    resumed = run_main("--load", tmp_path / "run", "-n", 8, "--out", tmp_path / "longer")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(tmp_path / "longer")[-1]["step"] == 8


def test_plain_is_the_papers_guide_and_a_fixed_prior(run_main, tmp_path):
    finished = run_main(*SHORT, "--plain", "--likelihood-sd", 0.7, "--out", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    air = AIR.load(tmp_path / "run" / "checkpoint.pt")
    assert air.refine is None and air.exploration == 0 and air.likelihood_sd == 0.7
    assert air.p_more.cumprod(0)[2] == pytest.approx(1e-6 / (1 + 1e-2 + 1e-4 + 1e-6))


def test_schedules():
    rates = [main.schedule(step, 4000) for step in range(4000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) > 0.99 and rates[-1] < 1e-6
    assert rates[2000] == pytest.approx(0.5)
    ratios = [main.count_ratio(step, 4000) for step in range(4000)]
    assert ratios[0] == pytest.approx(1e-4) and ratios[1000] == pytest.approx(1e-2)
    assert set(ratios[2000:]) == {1.0} and ratios == sorted(ratios)


INTERRUPTED = """
import sys
sys.path.insert(0, {root!r})
import main
from air import AIR
save = main.Run.save
def save_and_stop(run):
    save(run)
    raise KeyboardInterrupt
main.Run.save = save_and_stop
main.main()
"""


def test_a_resumed_run_is_the_run_that_was_never_interrupted(run, run_main, tmp_path):
    """Bit for bit, though it was also evaluated at other times: evaluation disturbs nothing."""
    straight, _ = run
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED.format(root=str(ROOT)))
    stopped = run_main(
        "-n", 6, "-b", 8, "--eval-every", 100, "--save-every", 3, "--out", tmp_path / "run", script=script
    )
    assert stopped.returncode == 130
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 3

    resumed = run_main("--load", tmp_path / "run", "--eval-every", 2)
    assert resumed.returncode == 0, resumed.stderr
    assert all(torch.equal(a, b) for a, b in zip(parameters(straight), parameters(tmp_path / "run")))
    (*_, expected), (*_, actual) = metrics(straight), metrics(tmp_path / "run")
    assert {**expected, "seconds": 0, "steps_per_s": 0} == {**actual, "seconds": 0, "steps_per_s": 0}

    # From a finished run there is nothing to train; and lines past a checkpoint are dropped.
    elsewhere = run_main("--load", straight, "-n", 8, "--out", tmp_path / "longer", "--eval-every", 4)
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert [line["step"] for line in metrics(tmp_path / "longer")] == [2, 4, 6, 8, 8]
    assert [line["step"] for line in metrics(straight)] == [2, 4, 6, 6]


def test_the_baseline_has_its_own_learning_rate(run_main, tmp_path):
    assert run_main(*SHORT, "-blr", 1e-9, "--out", tmp_path / "run").returncode == 0
    torch.manual_seed(0)
    before, after = AIR().state_dict(), AIR.load(tmp_path / "run").state_dict()
    for name in ("baseline.linear.weight", "baseline.rnn.rest.weight"):
        assert torch.allclose(before[name], after[name], atol=1e-7), name
    assert not torch.allclose(before["rnn.rest.weight"], after["rnn.rest.weight"], atol=1e-5)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_users_own_images(labelled, run_main, digits, tmp_path):
    """60 images of 40 x 36 pixels: trained on 54, the last 6 held out; accuracy is told only if counts are there."""
    own = multi_mnist.compose(*digits, n=60, rng=np.random.default_rng(3), canvas_size=40)
    own = own._replace(x=own.x * (np.abs(np.arange(40) - 19.5) < 18))  # 2 empty columns on each side
    flags = (*SHORT, "-n", 4, "--eval-every", 2, "--data", tmp_path / "own.npz", "--out", tmp_path / "run")
    np.savez(tmp_path / "own.npz", x=own.x[:, :, 2:-2], **({"counts": own.counts} if labelled else {}))
    finished = run_main(*flags)
    assert finished.returncode == 0, finished.stderr
    lines = metrics(tmp_path / "run")
    assert [line["images"] for line in lines] == [6, 6, 6] and ("count accuracy" in finished.stdout) == labelled
    air = AIR.load(tmp_path / "run" / "checkpoint.pt")
    assert air.image_size == 40
    held_out = multi_mnist.Scenes(own.x[-6:], own.counts[-6:])
    expected = evaluate(air, held_out)
    assert lines[-1]["elbo"] == pytest.approx(expected["elbo"])
    assert lines[-1]["count_accuracy"] == (expected["count_accuracy"] if labelled else None)
    assert (tmp_path / "run" / "mistakes.png").exists() == (tmp_path / "run" / "confusion.png").exists() == labelled
    assert run_main("--load", tmp_path / "run", "--redraw").returncode == 0

    # A run knows its images, and can be given others; what is in a file is what is evaluated.
    evaluated = json.loads(run_main("--load", tmp_path / "run", "--eval-only").stdout)
    assert evaluated["split"] == "test" and evaluated == lines[-1]
    whole = json.loads(run_main("--load", tmp_path / "run", "--eval-only", "--data", tmp_path / "own.npz").stdout)
    assert whole["split"] == "data" and whole["images"] == 60
    np.savez(tmp_path / "others.npz", x=own.x[:7])
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for flags in (("--data", tmp_path / "others.npz"), ("--test-data", tmp_path / "others.npz")):
        in_place = run_main("--load", tmp_path / "run", "-n", 6, *flags)
        assert in_place.returncode == 2 and "trained on other images" in in_place.stderr
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    others = ("--data", tmp_path / "own.npz", "--test-data", tmp_path / "others.npz")
    longer = run_main("--load", tmp_path / "run", "-n", 6, "--out", tmp_path / "longer", *others)
    assert longer.returncode == 0, longer.stderr
    assert metrics(tmp_path / "longer")[-1]["images"] == 7 and metrics(tmp_path / "longer")[0]["images"] == 6


def test_own_images_that_do_not_do(run, run_main, scenes, tmp_path):
    np.savez(tmp_path / "few.npz", x=scenes.x[:9])
    np.savez(tmp_path / "own.npz", x=scenes.x[:60], counts=scenes.counts[:60])
    np.savez(tmp_path / "small.npz", x=scenes.x[:60, :40, :40])
    own = ("--data", tmp_path / "own.npz")
    for flags, error in (
        (("--data", tmp_path / "few.npz"), "9 images are too few"),
        ((*own, "-t", 1), "--model-steps 1: there are images with 2 objects"),
        ((*own, "--test-data", tmp_path / "small.npz"), "are 40 pixels wide or high"),
        (("--load", run[0], "-n", 8, "--data", tmp_path / "small.npz"), "or high, the model's canvas is 50"),
    ):
        refused = run_main(*flags, "--out", tmp_path / "run")
        assert refused.returncode == 2 and error in refused.stderr and len(refused.stderr.splitlines()) == 2
        assert not (tmp_path / "run").exists()


GREATER = "greater than 0"
BAD = [
    ("-n -5", "--num-steps: invalid int greater than 0, at most 1,000,000,000 value: '-5'"),
    ("-n 0", GREATER),
    ("-n 1e3", GREATER),
    ("-n 10000000000", "at most 1,000,000,000"),
    ("-b many", GREATER),
    ("-b 1000000", "at most 100,000"),
    ("-lr nan", GREATER),
    ("-lr inf", GREATER),
    ("-lr 1e7", "at most 1,000,000"),
    ("-blr 0", GREATER),
    ("--estimator exact", "invalid choice: 'exact'"),
    ("--estimator traceenum --baseline rnn", "--baseline rnn has no use with traceenum"),
    ("--baseline mean", "invalid choice: 'mean'"),
    ("--plain yes", "unrecognized arguments: yes"),
    ("-t 0", GREATER),
    ("--likelihood-sd 0", GREATER),
    ("-t 2.5", GREATER),
    ("-t 51", "at most 50"),
    ("--seed -1", "invalid seed value: '-1'"),
    ("--seed 4294967296", "invalid seed value"),
    ("--seed one", "invalid seed value"),
    ("--cuda", "no CUDA device"),
    ("--eval-every 0", GREATER),
    ("--viz-every -1", GREATER),
    ("--save-every x", GREATER),
    ("--visdom maybe", "invalid choice: 'maybe'"),
    ("--visdom on --visdom-server http://127.0.0.1 --visdom-port 9", "no visdom server answers at http://127.0.0.1:9"),
    ("--visdom on --visdom-server http://[::1", "no visdom server answers at http://[::1"),
    ("--visdom-server", "expected one argument"),
    ("--visdom-port 65536", "at most 65,535"),
    ("--visdom-env", "expected one argument"),
    (f"--data-dir {ROOT}/README.md", "README.md is not a folder"),
    ("--mnist-root nowhere", "nowhere is not a folder"),
    ("--mnist-root . --data-dir nowhere", "no intact MNIST in ."),
    (f"--out {ROOT}/README.md", "README.md is not a folder"),
    (f"--out {ROOT}/README.md/run", "README.md is not a folder"),
    (f"--out {ROOT}/tests", "not empty"),
    (f"--out {ROOT}/tests --overwrite", "not the folder of a run"),
    ("--overwrite", "--overwrite is for --out"),
    ("--load nowhere", "no such checkpoint: nowhere"),
    (f"--load {ROOT}/README.md", "not a checkpoint"),
    ("--eval-only", "needs --load"),
    ("--redraw", "needs --load"),
    ("--report", "needs --load"),
    ("--data x.npz", "no such file"),
    ("--test-data x.npz", "--test-data needs --data"),
    ("--data x.npz --test-data x.npz --eval-only --load x", "holds nothing out"),
    ("--data x.npz --predict . --load x", "--data has no use with --predict"),
    ("--predict images", "needs --load"),
    ("--invert", "--invert needs --predict"),
    ("--json found.json", "--json needs --predict"),
    ("--steps 5", "unrecognized arguments"),
    ("--num 5", "unrecognized arguments"),
]


@pytest.mark.parametrize("flags, error", BAD, ids=[flags for flags, _ in BAD])
def test_bad_flags_are_told_in_two_lines(flags, error, monkeypatch, capsys, tmp_path, data_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py", "--data-dir", str(data_dir), *flags.split()])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        main.main()
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and not out
    assert len(err.splitlines()) == 2 and error in err
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_every_flag_has_been_tried_with_something_bad():
    tried = {word for flags, _ in BAD for word in flags.split()}
    for action in main.make_parser()._actions:
        assert action.dest == "help" or tried & set(action.option_strings), action.option_strings


def test_a_resumed_run_keeps_what_it_is(run, monkeypatch, capsys, data_dir, scenes, tmp_path):
    folder, _ = run

    def error(*flags):
        monkeypatch.setattr(
            "sys.argv", ["main.py", "--data-dir", str(data_dir), "--load", str(folder), *map(str, flags)]
        )
        with pytest.raises(SystemExit) as exit:
            main.main()
        assert exit.value.code == 2
        return capsys.readouterr().err

    assert "--batch-size 16 contradicts" in error("-b", 16)
    assert "--seed 1 contradicts" in error("--seed", 1)
    assert "--estimator traceenum contradicts" in error("--estimator", "traceenum", "--baseline", "none")
    assert "--baseline average contradicts" in error("--baseline", "average")
    assert "--likelihood-sd 0.5 contradicts" in error("--likelihood-sd", 0.5)
    assert "already at step 6" in error("-n", 5)
    assert "has no use" in error("--eval-only", "--out", tmp_path / "out")
    AIR().save(tmp_path / "only_parameters.pt")
    assert "not of a run of this script" in error("--load", tmp_path / "only_parameters.pt")
    np.savez(tmp_path / "small.npz", x=scenes.x[:, :40, :40])
    assert "40 pixels" in error("--eval-only", "--data", tmp_path / "small.npz")
    assert [line["step"] for line in metrics(folder)] == [2, 4, 6, 6]


@pytest.mark.mnist
@pytest.mark.slow
def test_it_learns_to_count(tmp_path):
    """600 steps on real MNIST: far above the 50% of a model that only tells empty scenes from others."""
    import subprocess
    import sys

    command = [sys.executable, ROOT / "main.py", "-n", "600", "--out", tmp_path / "run", "--data-dir", ROOT / "data"]
    subprocess.run(command, check=True)
    assert metrics(tmp_path / "run")[-1]["count_accuracy"] > 0.93
