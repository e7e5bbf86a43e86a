"""What goes wrong in a long run, made to go wrong: nothing is lost, and nothing goes wrong in silence."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from filelock import FileLock, Timeout

import main
import multi_mnist
import training.run
from training.checkpoint import load_air, read_checkpoint
from training.run import read_metrics

SHORT = ("-b", 8, "--visdom", "off")


def metrics(folder):
    """Lines of metrics.jsonl without the timings."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "steps_per_s")} for line in lines]


def state(folder):
    """All that a run's future depends on, as one flat dictionary of tensors."""
    checkpoint = read_checkpoint(folder / "checkpoint.pt")[0]
    flat = {"rng": checkpoint["rng"], **checkpoint["parameters"]}
    groups = checkpoint["optimizer"]["param_groups"]
    flat["running_norm"] = torch.tensor([group["running_norm"] for group in groups])
    for number, moments in checkpoint["optimizer"]["state"].items():
        flat |= {f"{name} {number}": value for name, value in moments.items()}
    return flat


@pytest.fixture
def start(data_dir):
    """Start main.py and leave it running."""

    def start(*args, **options):
        command = [sys.executable, ROOT / "main.py", *map(str, args), "--data-dir", data_dir]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
        )

    return start


def wait_until(run, folder, step):
    """Until the running `run` has evaluated at `step` or later."""
    while not (folder / "metrics.jsonl").exists() or not metrics(folder) or metrics(folder)[-1]["step"] < step:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.005)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LONG = [(300, flags) for flags in (("traceenum",), ("tracegraph",))]


@pytest.mark.parametrize(
    "n, flags",
    [
        (60, ("traceenum",)),
        (60, ("tracegraph",)),
        pytest.param(60, ("tracegraph", "--cuda"), marks=NEEDS_GPU),
        *(pytest.param(*long, marks=pytest.mark.slow) for long in LONG),
    ],
)
def test_resuming_is_exact(n, flags, start, run_main, tmp_path):
    """Interrupted by signals after about a third and two thirds of its steps, a run ends bit for bit as without."""
    often = ("--eval-every", n // 6, "--viz-every", 1000)
    flags = (*SHORT, *often, "-n", n, "--estimator", *flags)
    straight = run_main(*flags, "--out", tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    for step, number, status in ((n // 3, signal.SIGINT, 130), (2 * n // 3, signal.SIGTERM, 143)):
        where = ("--load", tmp_path / "run") if step > n // 3 else ("--out", tmp_path / "run", *flags)
        run = start(*where)
        wait_until(run, tmp_path / "run", step)
        run.send_signal(number)
        _, errors = run.communicate(timeout=60)
        assert run.returncode == status, errors
        assert f"{signal.Signals(number).name} after step" in errors.splitlines()[-1] and "Traceback" not in errors
        assert step <= read_checkpoint(tmp_path / "run" / "checkpoint.pt")[0]["step"] < step + n // 6
        assert (tmp_path / "run" / "attention.png").exists()
    finished = run_main("--load", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    expected, actual = state(tmp_path / "straight"), state(tmp_path / "run")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "run")


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_any_moment(kills, start, run_main, tmp_path, data_dir):
    """A run that saves at every second step, killed at random: whatever it leaves can be resumed."""
    folder, rng = tmp_path / "run", random.Random(kills)
    flags = (*SHORT, "-n", 100_000, "--eval-every", 2, "--viz-every", 7, "--out", folder)
    reached = 0
    for _ in range(kills):
        resume = (folder / "checkpoint.pt").exists()
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        run = start(*(("--load", folder) if resume else flags))
        wait_until(run, folder, reached + 3)
        time.sleep(rng.uniform(0, 1))
        run.kill()
        run.communicate()
        evaluated = read_metrics(folder)[-1]["step"]
        checkpoint = read_checkpoint(folder / "checkpoint.pt")[0]  # complete, with its checksums
        assert evaluated - 2 <= checkpoint["step"] and checkpoint["step"] >= reached
        load_air(folder / "checkpoint.pt")
        reached = checkpoint["step"]
    finished = run_main("--load", folder, "-n", reached + 2, "--viz-every", 7)
    assert finished.returncode == 0, finished.stderr
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == [".lock"]


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import numpy as np
import multi_mnist
scenes = multi_mnist.compose(np.full((1, 28, 28), 9, np.uint8), np.zeros(1, int), 20_000, np.random.default_rng(0))
while True:
    multi_mnist.write_cache(Path({path!r}), scenes, multi_mnist.cache_key("train"))
    print("written", flush=True)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_while_it_writes_the_data(kills, tmp_path, capsys):
    path, rng = tmp_path / "multi_mnist-train.npz", random.Random(kills)
    code = WRITER.format(root=str(ROOT), path=str(path))
    for _ in range(kills):
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"written\n"
        time.sleep(rng.uniform(0, 0.2))
        writer.kill()
        writer.communicate()
        scenes = multi_mnist.read_cache(path, multi_mnist.cache_key("train"))
        assert len(scenes.x) == 20_000 and not capsys.readouterr().err
    left = [file for file in tmp_path.iterdir() if file != path]
    for file in left:
        os.utime(file, (0, 0))
    multi_mnist.write_cache(path, scenes, multi_mnist.cache_key("train"))
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk(run_main, start, tmp_path):
    """A limit on the size of files stands for it: the checkpoint no longer fits, the earlier one stays."""
    folder = tmp_path / "run"
    assert run_main(*SHORT, "-n", 2, "--out", folder).returncode == 0
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    limit = len(before["checkpoint.pt"]) // 2
    full = start(
        "--load", folder, "-n", 4, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, errors = full.communicate(timeout=60)
    assert full.returncode != 0 and "File too large" in errors.splitlines()[-1] and "Traceback" not in errors
    assert "checkpoint.pt" in errors.splitlines()[-1]
    assert (folder / "checkpoint.pt").read_bytes() == before["checkpoint.pt"]
    assert set(before) == {file.name for file in folder.iterdir()}


def test_an_earlier_run_is_not_replaced(run, run_main, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    finished = run_main(*SHORT, "-n", 1, "--out", folder)
    assert finished.returncode == 2 and "already exists and is not empty" in finished.stderr.splitlines()[-1]
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_that_cannot_be_written_to(run_main, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # Nothing is read-only to root.
    finished = run_main(*SHORT, "-n", 1, "--out", tmp_path / "some" / "run")
    assert finished.returncode == 2 and f"{tmp_path} cannot be written to" in finished.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def plant(monkeypatch, calls, value=float("nan")):
    """A NaN, or another value, in one pixel of the mini-batches (of 8) with these numbers."""
    images, made = training.run.to_images, []

    def planted(x):
        result = images(x)
        made.append(result)
        if len(made) in calls:
            result[3, 20, 20] = value
        return result

    monkeypatch.setattr(training.run, "to_images", planted)


@pytest.mark.parametrize("estimator", ["tracegraph", "traceenum"])
def test_a_nan_in_a_mini_batch_is_not_learned_from(estimator, run_main, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        plant(patch, [2, 5])
        finished = run_main(*SHORT, "-n", 6, "--estimator", estimator, "--out", tmp_path / "run")
    assert finished.returncode == 0
    told = [line for line in finished.stderr.splitlines() if "skipped" in line]
    assert [line.split(":")[0] for line in told] == ["skipped step 2", "skipped step 4"]
    assert all(value.isfinite().all() for value in state(tmp_path / "run").values())


def test_too_many_skipped_steps_end_a_run(run_main, monkeypatch, tmp_path):
    plant(monkeypatch, [2, 4, 5])
    finished = run_main(*SHORT, "-n", 6, "--eval-every", 2, "--out", tmp_path / "run")
    assert finished.returncode == 1
    hint, error = finished.stderr.splitlines()[-2:]
    assert "3 of 100 steps were skipped" in error and f"--load {tmp_path / 'run'} resumes" in hint
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")[0]["step"] == 2


def test_skipped_steps_far_apart_do_not_end_a_run(run_main, monkeypatch, tmp_path):
    plant(monkeypatch, [1, 4, 7, 10])
    monkeypatch.setattr(training.run, "SKIPPED_WITHIN", 3)
    finished = run_main(*SHORT, "-n", 8, "--out", tmp_path / "run")
    assert finished.returncode == 0 and finished.stderr.count("skipped step") == 4


@pytest.mark.parametrize("estimator", ["tracegraph", "traceenum"])
def test_an_absurd_learning_rate(estimator, run_main, tmp_path):
    finished = run_main(*SHORT, "-n", 200, "--estimator", estimator, "-lr", 1e6, "--out", tmp_path / "run")
    assert finished.returncode == 1 and "a smaller --learning-rate" in finished.stderr.splitlines()[-1]


@pytest.mark.parametrize("stopped", [False, True])
def test_parameters_that_are_not_finite_are_not_saved(stopped, run_main, monkeypatch, tmp_path):
    """Neither when a checkpoint is due nor when a signal stops the run."""
    folder = tmp_path / "run"
    assert run_main(*SHORT, "-n", 2, "--out", folder).returncode == 0
    before = (folder / "checkpoint.pt").read_bytes()
    finish_step = training.run.Run.finish_step

    def spoiled(run, loss):
        with torch.no_grad():
            next(run.air.parameters()).fill_(float("inf"))
        if stopped:
            run.processes.stop_signal, run.processes.should_stop = signal.SIGTERM, True
        finish_step(run, loss)

    monkeypatch.setattr(training.run.Run, "finish_step", spoiled)
    finished = run_main("--load", folder, "-n", 4, "--eval-every", 1)
    assert (
        finished.returncode == 1
        and "after step 3 the parameters are not finite, and are not saved" in finished.stderr.splitlines()[-1]
    )
    assert (folder / "checkpoint.pt").read_bytes() == before
    load_air(folder)


def test_one_folder_has_one_run_at_a_time(run_main, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with FileLock(folder / ".lock"):
        finished = run_main(*SHORT, "-n", 1, "--out", folder)
    assert finished.returncode == 2 and "another process is training" in finished.stderr.splitlines()[-1]
    assert [file.name for file in folder.iterdir()] == [".lock"]
    assert run_main(*SHORT, "-n", 1, "--out", folder).returncode == 0


def test_all_is_written_before_the_folder_is_free(run_main, monkeypatch, tmp_path):
    """The last evaluation and its pictures too."""
    folder, locked = tmp_path / "run", []
    show = main.Pictures.show

    def watched(pictures, air, split, *args):
        try:
            FileLock(folder / ".lock").acquire(timeout=0)
        except Timeout:
            locked.append(split)
        show(pictures, air, split, *args)

    monkeypatch.setattr(main.Pictures, "show", watched)
    assert run_main(*SHORT, "-n", 2, "--out", folder).returncode == 0
    assert locked == ["validation", "validation", "test"]


def test_a_copied_checkpoint_does_not_write_where_it_lies(run, run_main, tmp_path):
    folder, other = run[0], tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("mine")
    (other / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes())
    (other / "link.pt").symlink_to(folder / "checkpoint.pt")
    for name in ("checkpoint.pt", "link.pt"):
        refused = run_main("--load", other / name, "--visdom", "off", "-n", 8)
        assert refused.returncode == 2 and "not in the folder of a run" in refused.stderr.splitlines()[-1]
    resumed = run_main("--load", other / "link.pt", "--visdom", "off", "-n", 7, "--out", tmp_path / "new")
    assert resumed.returncode == 0, resumed.stderr
    assert {file.name for file in other.iterdir()} == {"config.json", "checkpoint.pt", "link.pt"}
    assert (other / "config.json").read_text() == "mine"


@pytest.mark.parametrize("line", ["{}", "3", '{"step": "3", "split": "validation"}', "[" * 100_000, "{"])
def test_damaged_metrics(line, run, run_main, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    (folder / "metrics.jsonl").write_text(f"{line}\n")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    refused = run_main("--load", folder, "--visdom", "off", "-n", 8)
    assert refused.returncode == 2 and "metrics.jsonl is damaged" in refused.stderr.splitlines()[-1]
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_ctrl_c_with_a_reader_that_it_ends_too(start, tmp_path):
    """As in `python main.py 2>&1 | tee log`: the run is saved though nobody reads what it says."""
    folder = tmp_path / "run"
    run = start(*SHORT, "-n", 100_000, "--eval-every", 1000, "--out", folder)
    while not (folder / "attention.png").exists():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.05)
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    run.stderr.close()
    assert run.wait(timeout=60) == 130
    assert read_checkpoint(folder)[0]["step"] > 4
