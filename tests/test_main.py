"""main.py as its user calls it: short runs on a few scenes of drawn digits."""

import json
import os
import signal

import numpy as np
import pytest
from conftest import ROOT, SHORT, before_steps, call, check_same, files, metrics
from PIL import Image

import main
import multi_mnist
import training.data
from evaluation import evaluate
from images import letterbox, to_canvas
from multi_mnist import Scenes
from training.checkpoint import load_air, read_checkpoint
from training.data import load_own_scenes
from training.svi import schedule

no_pictures = pytest.mark.usefixtures("no_pictures")
QUICK = (*SHORT, "-n", 2)


def test_a_run_leaves_what_it_should(run):
    folder, finished = run
    assert "count accuracy" in finished.stdout and str(folder) in finished.stdout
    assert "6/6" in finished.stderr and "loss -" in finished.stderr and "validation accuracy" in finished.stderr
    assert "ELBO" not in finished.stderr  # That of metrics.jsonl has another prior on the count.
    pictures = "attention.png reconstruction.png steps.png mistakes.png curves.png confusion.png"
    assert files(folder).keys() == {*pictures.split(), "checkpoint.pt", "config.json", "metrics.jsonl", ".lock"}
    lines = metrics(folder)
    assert [(line["split"], line["step"]) for line in lines] == [*(("validation", n) for n in (2, 4, 6)), ("test", 6)]
    for line in lines:
        assert np.sum(line["confusion"]) == line["images"] == 16 and np.isfinite(line["elbo"])
        assert line["seconds"] > 0 and line["steps_per_s"] > 0
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["batch_size"] == 8 and config["flags"]["seed"] == 0 and config["versions"]["torch"]


@no_pictures
@pytest.mark.parametrize("flags", ["--estimator traceenum", "--baseline none", "--guide rnn"])
def test_other_ways_to_train(flags, run, run_main, monkeypatch, tmp_path):
    """They train to other parameters than the default; interrupted and resumed, to the same to the last bit."""
    run_main(*SHORT, "-n", 3, *flags.split(), "--out", tmp_path / "run")
    checkpoint, default = read_checkpoint(tmp_path / "run")[0], read_checkpoint(run[0])[0]
    has_baseline, decoder = flags == "--guide rnn", "decode.mlp.0.weight"
    assert any(name.startswith("baseline.") for name in checkpoint["parameters"]) == has_baseline
    assert (metrics(tmp_path / "run")[-1]["baseline_r2"] is not None) == has_baseline
    assert checkpoint["air"]["guide"] == ("rnn" if has_baseline else "residual")
    assert 0 < (checkpoint["parameters"][decoder] - default["parameters"][decoder]).abs().max() < 0.1
    with monkeypatch.context() as patch:
        before_steps(patch, lambda i, x: os.kill(os.getpid(), signal.SIGTERM) if i == 2 else None)
        run_main(*SHORT, "-n", 3, *flags.split(), "--out", tmp_path / "other", status=[143])
    run_main("--load", tmp_path / "other")
    check_same(tmp_path / "run", tmp_path / "other")


@no_pictures
def test_the_same_run_in_other_circumstances(run, run_main, tmp_path):
    """Evaluated at other times; and lines past a checkpoint are dropped on resuming."""
    folder = tmp_path / "run"
    run_main(*SHORT, "--eval-every", 500, "--out", folder)
    check_same(run[0], folder, last=2)
    lines = (run[0] / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines + lines.replace('"step": 6', '"step": 7') + '{"step": 3')
    run_main("--load", folder, "-n", 8, "--eval-every", 4)
    assert [line["step"] for line in metrics(folder)] == [2, 4, 6, 2, 4, 8, 8]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_users_own_images(labelled, run_main, digits, tmp_path):
    """60 images of 40 x 36 pixels, an array with true counts, or a folder of files dark on light without."""
    own = multi_mnist.compose(*digits, n=60, rng=np.random.default_rng(3), canvas_size=40)
    x = own.x[:, :, 2:-2]
    data, folder = tmp_path / ("own.npz" if labelled else "own"), tmp_path / "run"
    if labelled:
        np.savez(data, x=x, counts=own.counts)
    else:
        data.mkdir()
        for i, image in enumerate(x):
            Image.fromarray(255 - image).save(data / f"{i:02}.png")
        (data / "notes.txt").write_text("no image")
    finished = run_main(*QUICK, "--data", data, "--out", folder)
    assert finished.stderr.count("notes.txt cannot be read") == finished.stderr.count("inverted (") == (not labelled)
    lines, air = metrics(folder), load_air(folder)
    assert [line["images"] for line in lines] == [6, 6] and ("count accuracy" in finished.stdout) == labelled
    length = load_own_scenes(data, None, None, 3, None, None)[-1]  # estimated; windows are a little longer
    assert air.image_size == 40 and air.usual_window == pytest.approx(1.15 * length)
    held_out = np.stack([letterbox(to_canvas(image), 40).x for image in x[-6:]])
    expected = evaluate(air, Scenes(held_out, own.counts[-6:])).metrics
    assert lines[-1]["elbo"] == pytest.approx(expected["elbo"])
    assert lines[-1]["count_accuracy"] == (expected["count_accuracy"] if labelled else None)
    assert (folder / "mistakes.png").exists() == (folder / "confusion.png").exists() == labelled
    # A run knows its images; what is in a file that is named is what is evaluated.
    assert json.loads(run_main("--load", folder, "--eval-only").stdout) == lines[-1]
    whole = json.loads(run_main("--load", folder / "checkpoint.pt", "--eval-only", "--data", data, "-t", 5).stdout)
    assert whole["split"] == "data" and whole["images"] == 60 and whole["step"] == 2
    assert np.shape(whole["confusion"]) == ((3, 6) if labelled else ())
    flags = "--load", folder, "--eval-only", "--data", data, "--object-size"
    seen = [json.loads(run_main(*flags, size).stdout)["count_error_search"] for size in (10, 60)]
    assert (seen[0] != seen[1]) == labelled and (seen[0] is None) != labelled


@no_pictures
def test_images_are_known_by_what_they_are(run_main, scenes, tmp_path):
    """Not by their file's name: the same may be somewhere else, and others may have its name."""
    data, moved, folder = tmp_path / "my.npz", ("--data", tmp_path / "moved.npz"), tmp_path / "run"
    np.savez(data, x=scenes.x[:60])
    run_main(*QUICK, "--data", data, "--out", folder)
    data.rename(moved[1])
    run_main("--load", folder, "--eval-only", error=f"no such file or folder: {data}")
    run_main("--load", folder, "-n", 3, *moved)
    np.savez(moved[1], x=scenes.x[60:120])
    earlier = files(folder)
    run_main("--load", folder, "-n", 4, error="was trained on other images")
    run_main("--load", folder, "--eval-only", error="has other images than the run")
    assert files(folder) == earlier
    run_main("--load", folder, "-n", 4, "--out", tmp_path / "new")


def test_own_images_that_do_not_do(run_main, scenes, tmp_path):
    """They are refused in one line, and no folder is left behind."""
    np.savez(tmp_path / "one.npz", x=scenes.x[:1])
    np.savez(tmp_path / "own.npz", x=scenes.x[:60], counts=scenes.counts[:60])
    np.savez(tmp_path / "empty.npz", x=0 * scenes.x[:60])
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for flags, error in (
        ("one.npz", "too few images to hold out a tenth: 1"),
        ("own.npz -t 1", "--max-objects 1: there are images with 2 objects"),
        ("empty.npz", "the images are all empty"),
        ("folder", "has no files (subfolders are not looked into)"),
        ("own.npz --object-size 45", "larger than the canvas of 50 pixels"),
        ("own.npz --crop 51", "no image is as large as a crop"),
    ):
        run_main(*SHORT, "--out", tmp_path / "run", "--data", *f"{tmp_path}/{flags}".split(), error=error)
        assert not (tmp_path / "run").exists()


@no_pictures
def test_by_default_multi_mnist(run, monkeypatch, scenes, tmp_path):
    """With the prior on poses of the paper, and by the schedule; a run's evaluation is on its test scenes."""
    parts, folder = {"train": 0, "validation": 40, "test": 60}, tmp_path / "run"
    splits = {split: Scenes(*(part[i : i + 20 + 20 * (i == 0)] for part in scenes)) for split, i in parts.items()}
    monkeypatch.setattr(training.data, "load_split", lambda split, data_dir: splits[split])
    finished = call(main.main, *QUICK, "-n", 5, "--eval-every", 5, "-blr", 0.1, "--out", folder)
    assert "--object-size" not in finished.stderr
    checkpoint = read_checkpoint(folder)[0]
    groups = checkpoint["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [schedule(4, 5) * 4e-3, schedule(4, 5) * 0.1]
    assert checkpoint["air"]["z_where_loc"] == (3, 0, 0) and checkpoint["air"]["z_where_scale"] == (0.2, 1, 1)
    evaluated = json.loads(call(main.main, "--load", folder, "--eval-only").stdout)
    assert evaluated == metrics(folder)[-1] and evaluated["split"] == "test" and evaluated["images"] == 20


@pytest.mark.parametrize("crop, size, told", [(40, None, 40), (None, None, 36), (80, 40.0, 80)])
def test_crops_of_large_images(crop, size, told, tmp_path, capsys):
    """Each is a window of one of the images, turned or mirrored; large objects are made smaller."""
    objects = np.random.default_rng(0).integers(150, 255, (2, 6, 8)).astype(np.uint8)
    x = np.kron(objects, np.pad(np.ones((1, 12, 8), np.uint8), ((0, 0), (5, 5), (5, 9))))
    np.savez(tmp_path / "own.npz", x=x)
    train, held_out, _, length = load_own_scenes(tmp_path / "own.npz", None, None, 3, crop, size)
    assert f"10,000 random crops of {told} pixels" in capsys.readouterr().err
    side = 40 if size else told
    assert train.x.shape == (9000, side, side) and held_out.x.shape == (1000, side, side)
    assert length == (20 if size else 12) and train.counts is None
    if not size:
        images = [to_canvas(image).x for image in x]
        windows = [np.lib.stride_tricks.sliding_window_view(image, (side, side)) for image in images]
        ways = [np.rot90(held_out.x[0], k)[:, ::step] for k in range(4) for step in (1, -1)]
        assert any((window == way).all((2, 3)).any() for window in windows for way in ways)
        assert len(np.unique(held_out.x.reshape(1000, -1), axis=0)) > 900


@pytest.mark.mnist
@pytest.mark.slow
def test_it_learns_to_count(tmp_path):
    """600 steps on real MNIST: far above the 50% of a model that only tells empty scenes from others."""
    call(main.main, "-n", 600, "--visdom", "off", "--out", tmp_path / "run", "--data-dir", ROOT / "data")
    assert metrics(tmp_path / "run")[-1]["count_accuracy"] > 0.93
