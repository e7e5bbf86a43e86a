"""main.py as its user calls it: short runs on a few scenes of drawn digits."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, metrics
from PIL import Image

import multi_mnist
from air import AIR
from evaluation import evaluate
from training.checkpoint import load_air
from training.svi import count_ratio, schedule


def parameters(folder):
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    tensors = list(checkpoint["parameters"].values())
    for state in checkpoint["optimizer"]["state"].values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    return [*tensors, checkpoint["rng"]]


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
    assert config["flags"]["batch_size"] == 8 and config["flags"]["seed"] == 0 and config["versions"]["torch"]


def test_eval_only_prints_the_line_of_the_run(run, run_main, tmp_path, scenes):
    folder, _ = run
    evaluated = run_main("--load", folder, "--eval-only")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout) == metrics(folder)[-1]

    more = json.loads(run_main("--load", folder, "--eval-only", "-t", 5).stdout)
    assert np.array(more["confusion"]).shape == (3, 6)

    np.savez(tmp_path / "own.npz", x=scenes.x[:5] / 255)
    evaluated = run_main("--load", folder / "checkpoint.pt", "--eval-only", "--data", tmp_path / "own.npz")
    line = json.loads(evaluated.stdout)
    assert line["split"] == "data" and line["images"] == 5 and line["step"] == 6
    assert line["count_accuracy"] is line["confusion"] is line["count_accuracy_mode"] is None


@pytest.mark.parametrize("flags", [("--estimator", "traceenum"), ("--baseline", "none")], ids=" ".join)
def test_the_other_estimators(flags, run, run_main, tmp_path):
    """They train to other parameters than the default, from the same ones, and can be resumed."""
    finished = run_main(*SHORT, *flags, "--out", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    assert metrics(tmp_path / "run")[-1]["baseline_r2"] is None and metrics(run[0])[-1]["baseline_r2"] < 1
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert not any(name.startswith("baseline.") for name in checkpoint["parameters"])
    decoder = "decode.mlp.0.weight"
    default = torch.load(run[0] / "checkpoint.pt", weights_only=True)["parameters"][decoder]
    assert 0 < (checkpoint["parameters"][decoder] - default).abs().max() < 0.1
    resumed = run_main("--load", tmp_path / "run", "-n", 8, "--out", tmp_path / "longer")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(tmp_path / "longer")[-1]["step"] == 8


def test_the_papers_guide(run_main, tmp_path):
    finished = run_main(*SHORT, "--guide", "rnn", "--out", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    assert load_air(tmp_path / "run").config["guide"] == "rnn"
    resumed = run_main("--load", tmp_path / "run", "-n", 8)
    assert resumed.returncode == 0, resumed.stderr


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
    stopped = run_main("-n", 6, "-b", 8, "--eval-every", 3, "--out", tmp_path / "run", script=script)
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
    air = load_air(tmp_path / "run" / "checkpoint.pt")
    assert air.image_size == 40
    expected = evaluate(air, multi_mnist.Scenes(own.x[-6:], own.counts[-6:])).metrics
    assert lines[-1]["elbo"] == pytest.approx(expected["elbo"])
    assert lines[-1]["count_accuracy"] == (expected["count_accuracy"] if labelled else None)
    assert (tmp_path / "run" / "mistakes.png").exists() == (tmp_path / "run" / "confusion.png").exists() == labelled

    # A run knows its images; what is in a file that is named is what is evaluated.
    evaluated = json.loads(run_main("--load", tmp_path / "run", "--eval-only").stdout)
    assert evaluated["split"] == "test" and evaluated == lines[-1]
    whole = json.loads(run_main("--load", tmp_path / "run", "--eval-only", "--data", tmp_path / "own.npz").stdout)
    assert whole["split"] == "data" and whole["images"] == 60


def test_images_are_known_by_what_they_are(run_main, scenes, monkeypatch, tmp_path):
    """Not by their file's name: the same may be somewhere else, and others may have its name."""
    project, moved = tmp_path / "project", tmp_path / "moved"
    project.mkdir()
    monkeypatch.chdir(project)
    np.savez("my.npz", x=scenes.x[:60])
    assert run_main("-n", 2, "-b", 8, "--data", "my.npz", "--out", "run").returncode == 0
    project.rename(moved)
    monkeypatch.chdir(moved)
    assert run_main("--load", "run", "-n", 3).returncode == 0
    monkeypatch.chdir(tmp_path)
    gone = run_main("--load", moved / "run", "-n", 4)
    assert gone.returncode == 2 and "my.npz, where the run's images were; --data names their place" in gone.stderr
    assert len(gone.stderr.splitlines()) == 1
    assert run_main("--load", moved / "run", "-n", 4, "--data", moved / "my.npz").returncode == 0

    np.savez(moved / "my.npz", x=scenes.x[60:120])
    before = (moved / "run" / "checkpoint.pt").read_bytes()
    for flags in ((), ("--data", moved / "my.npz")):
        refused = run_main("--load", moved / "run", "-n", 5, *flags)
        assert refused.returncode == 2 and "trained on other images" in refused.stderr
    refused = run_main("--load", moved / "run", "--eval-only")
    assert refused.returncode == 2 and "other images than the run was trained on" in refused.stderr
    assert (moved / "run" / "checkpoint.pt").read_bytes() == before
    elsewhere = run_main("--load", moved / "run", "-n", 5, "--out", tmp_path / "new")
    assert elsewhere.returncode == 0, elsewhere.stderr


def test_own_images_that_do_not_do(run, run_main, scenes, tmp_path):
    np.savez(tmp_path / "one.npz", x=scenes.x[:1])
    np.savez(tmp_path / "own.npz", x=scenes.x[:60], counts=scenes.counts[:60])
    np.savez(tmp_path / "empty.npz", x=0 * scenes.x[:60])
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for flags, error in (
        (("--data", tmp_path / "one.npz"), "too few images to hold out a tenth: 1"),
        (("--data", tmp_path / "own.npz", "-t", 1), "--model-steps 1: there are images with 2 objects"),
        (("--data", tmp_path / "empty.npz"), "the images are all empty"),
        (("--data", tmp_path / "folder"), "has no files (subfolders are not looked into)"),
        (("--data", tmp_path / "own.npz", "--object-size", 45), "larger than the canvas of 50 pixels"),
        (("--object-size", 45), "larger than the canvas of 50 pixels"),
    ):
        refused = run_main(*flags, "--visdom", "off", "--out", tmp_path / "run")
        assert refused.returncode == 2 and error in refused.stderr and len(refused.stderr.splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_a_folder_of_images_dark_on_light(run, run_main, scenes, tmp_path):
    """Trained on, resumed, evaluated and predicted by one rule; what was done to them is said."""
    images = tmp_path / "images"
    images.mkdir()
    for i, x in enumerate(scenes.x[:40]):
        Image.fromarray(255 - x).save(images / f"{i:02}.png")
    (images / "notes.txt").write_text("no image")
    np.savez(tmp_path / "light.npz", x=scenes.x[:40])
    folders = [tmp_path / "dark", tmp_path / "light"]
    runs = [
        run_main("-n", 2, "-b", 8, "--visdom", "off", "--out", folder, "--data", data)
        for folder, data in zip(folders, (images, tmp_path / "light.npz"))
    ]
    assert [finished.returncode for finished in runs] == [0, 0], runs[0].stderr
    dark, light = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in folders)
    assert dark["air"] == light["air"]
    for name, parameter in dark["parameters"].items():
        torch.testing.assert_close(parameter, light["parameters"][name], atol=0.01, rtol=0)
    assert "inverted (--no-invert" in runs[0].stderr and "inverted" not in runs[1].stderr
    assert runs[0].stderr.count("notes.txt cannot be read") == 1
    resumed = run_main("--load", folders[0], "-n", 4, "--visdom", "off")
    assert resumed.returncode == 0, resumed.stderr
    held_out, as_they_are = (
        json.loads(run_main("--load", folders[0], "--eval-only", "--data", images, *flags).stdout)
        for flags in ((), ("--no-invert",))
    )
    # Nothing is lighter than a white page: as they are, all are empty, and easy to explain.
    assert held_out["images"] == 40 and held_out["elbo"] < as_they_are["elbo"] - 50


def test_the_prior_on_poses_fits_the_objects(run_main, scenes, tmp_path):
    """Estimated from the images, or as told, in pixels or as a share; and multi-MNIST's own is left alone."""
    small = np.zeros((40, 100, 100), np.uint8)
    small[:, 20:30, 40:48] = small[:, 60:70, 40:48] = 255  # ten pixels long
    np.savez(tmp_path / "small.npz", x=small)
    own = ("--data", tmp_path / "small.npz")
    for i, (flags, s) in enumerate(
        [
            ((), 3),
            (own, 100 / 11.5),
            ((*own, "--object-size", 20), 100 / 23),
            ((*own, "--object-size", 0.3), 100 / 34.5),
        ]
    ):
        folder = tmp_path / str(i)
        finished = run_main("-n", 1, "-b", 8, "--visdom", "off", "--out", folder, *flags)
        assert finished.returncode == 0, finished.stderr
        prior = json.loads((folder / "config.json").read_text())["air"]
        assert prior["z_where_loc"] == pytest.approx([s, 0, 0])
        assert prior["z_where_scale"] == pytest.approx([s / 15, s / 3, s / 3])
        assert ("--object-size" in finished.stderr) == bool(flags)
    assert run_main("--load", folder, "-n", 2, "--visdom", "off").returncode == 0


def test_learning_rate_and_count_prior_follow_their_schedules(run_main, monkeypatch, tmp_path):
    ratios = []
    set_count_prior = AIR.set_count_prior
    monkeypatch.setattr(AIR, "set_count_prior", lambda air, ratio: ratios.append(ratio) or set_count_prior(air, ratio))
    flags = "-n", 5, "-b", 8, "-blr", 0.1, "--object-size", 16, "--visdom", "off", "--out", tmp_path / "run"
    assert run_main(*flags).returncode == 0
    assert ratios == pytest.approx([count_ratio(step, 5, window=16 * 1.15) for step in range(5)])
    assert ratios[0] < count_ratio(0, 5)
    groups = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [schedule(4, 5) * 4e-3, schedule(4, 5) * 0.1]
    assert all(tuple(group["betas"]) == (0.9, 0.95) for group in groups)


def test_in_a_thread(run_main, tmp_path):
    """Where Python does not let it handle signals."""
    results = []
    run = threading.Thread(target=lambda: results.append(run_main("-n", 2, "-b", 8, "--out", tmp_path / "run")))
    run.start()
    run.join()
    assert results[0].returncode == 0, results[0].stderr
    assert metrics(tmp_path / "run")[-1]["step"] == 2


def test_help_is_quick_to_import():
    """What only pictures and benchmarks need is not imported to show the help."""
    command = [sys.executable, "-X", "importtime", ROOT / "main.py", "-h"]
    imported = subprocess.run(command, capture_output=True, text=True).stderr
    names = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in imported.splitlines() if "|" in line}
    assert "torch" in names and not names & {"sklearn", "visdom", "matplotlib"}


@pytest.mark.mnist
@pytest.mark.slow
def test_it_learns_to_count(tmp_path):
    """600 steps on real MNIST: far above the 50% of a model that only tells empty scenes from others."""
    command = [sys.executable, ROOT / "main.py", "-n", "600", "--out", tmp_path / "run", "--data-dir", ROOT / "data"]
    subprocess.run(command, check=True)
    assert metrics(tmp_path / "run")[-1]["count_accuracy"] > 0.93
