"""Small drawn digits and scenes, so that the tests need neither the network nor MNIST; and main.py, called on them."""

import contextlib
import io
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
os.environ["OMP_NUM_THREADS"] = "1"  # Two tests run side by side; also for the processes that they start.
os.environ.pop("PYTHONUNBUFFERED", None)  # With it, what cannot be written is forgotten at once.
torch.set_num_threads(1)
# A suite that a script has put into the background was told to ignore Ctrl-C; the runs that it interrupts must not.
signal.signal(signal.SIGINT, signal.default_int_handler)
PATHS = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
sys.path[:0] = PATHS

import evaluation  # noqa: E402
import inference  # noqa: E402
import main  # noqa: E402
import multi_mnist  # noqa: E402
import patches  # noqa: E402
import training.run  # noqa: E402
import training.svi  # noqa: E402
from training.checkpoint import read_checkpoint  # noqa: E402
from training.run import read_metrics as metrics  # noqa: E402

# The search finds little in what was hardly trained, and few images are looked at.
evaluation.recombine.__defaults__ = 12, 5
inference.PATIENCE, inference.TOGETHER = 2, 4
patches.PATIENCE, patches.SWEEPS = 1, 1

LIMIT = 600  # seconds that an event is waited for, however slow the machine is
os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(LIMIT)  # that torchrun gives processes which it tells to stop
STATE = "parameters", "optimizer", "rng", "step"
SHORT = ("-n", 6, "-b", 8, "--eval-every", 2, "--visdom", "off")


@pytest.fixture(autouse=True)
def clean_state():
    """Validation on, and every test from the same random numbers."""
    pyro.clear_param_store()
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)


@pytest.fixture(scope="session")
def digits():
    """60 images uint8 `[60, 28, 28]` of the digits 0 to 9 in six sizes, and their classes."""
    images, classes = [Image.new("L", (28, 28)) for _ in range(60)], np.arange(60) % 10
    for i, image in enumerate(images):
        font = ImageFont.load_default(18 + i // 10)
        ImageDraw.Draw(image).text((14, 14), str(classes[i]), fill=255, font=font, anchor="mm")
    return np.stack(images), classes


@pytest.fixture(scope="session")
def scenes(digits):
    return multi_mnist.compose(*digits, n=200, rng=np.random.default_rng(0))


@pytest.fixture
def x(scenes):
    """Six scenes as floats, `[6, 50, 50]`, float64 so that sums can be compared closely."""
    return torch.from_numpy(scenes.x[:6]).double() / 255


@pytest.fixture(scope="session")
def data_file(digits, tmp_path_factory):
    """160 scenes of drawn digits with their counts: 144 to train on, 16 held out."""
    path = tmp_path_factory.mktemp("data") / "scenes.npz"
    scenes = multi_mnist.compose(*digits, n=160, rng=np.random.default_rng(0))
    np.savez(path, x=scenes.x, counts=scenes.counts)
    return path


def check_same(folder, other, last=0) -> None:
    """Both runs are at the same step, with all that their future depends on, bit for bit, and the same (last) lines."""
    for line, its in zip(metrics(folder)[-last:], metrics(other)[-last:], strict=True):
        assert line | {"seconds": 0, "steps_per_s": 0} == its | {"seconds": 0, "steps_per_s": 0}
    states = [{name: run[name] for name in STATE} for run in (read_checkpoint(folder)[0], read_checkpoint(other)[0])]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def call(main, *args, status=(), error="") -> subprocess.CompletedProcess:
    """A script's `main` with these arguments, in this process, which saves the seconds that imports take.

    It has to end with one of these statuses; if none is given, with 0, or with 2 and this error in its last line."""
    args = [*map(str, args)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as exit:
            code = exit.code
    said = err.getvalue()
    assert code in (status or [2 if error else 0]) and error in said.strip().split("\n")[-1], said
    return subprocess.CompletedProcess(args, code, out.getvalue(), said)


@pytest.fixture(scope="session")
def run_main(data_file):
    """Call main.py with some flags; it trains on the drawn digits if they name no other data."""

    def run_main(*args, **expected):
        return call(main.main, *args, *(() if {"--data", "--load"} & {*args} else ("--data", data_file)), **expected)

    return run_main


@pytest.fixture(scope="session")
def run(tmp_path_factory, run_main):
    """One finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, run_main(*SHORT, "--out", folder)


@pytest.fixture
def start(data_file):
    """Start main.py in a process of its own, with some code before it if there is any, and leave it running."""
    runs = []

    def start(*args, code=None, launcher=(), **options):
        args = [*map(str, args), *(() if "--load" in args else ("--data", str(data_file)))]
        code = f"import sys; sys.path[:0] = {PATHS}; import conftest, main; {code}; main.main()" if code else None
        command = [sys.executable, *launcher, *(("-c", code) if code else (ROOT / "main.py",)), *args]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        runs.append(subprocess.Popen(command, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()
        run.communicate()


def hold(at: int) -> None:
    """After it has saved at that step, main.py goes on only when a signal has arrived. (And it draws nothing.)"""

    def save_and_wait(folder, air, adam, state, processes, *others, save=training.run.save):
        save(folder, air, adam, state, processes, *others)
        while state.step == at and processes.is_main and not processes.stop_signal:
            time.sleep(0.01)

    training.run.save, main.Pictures.show = save_and_wait, lambda *_: None


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs in this process draw nothing, which would take most of their time."""
    monkeypatch.setattr(main.Pictures, "show", lambda *_: None)


def before(monkeypatch, name, do) -> None:
    """Call `do` before main.py's function of that name, with its arguments."""
    function = getattr(main, name)
    monkeypatch.setattr(main, name, lambda *args: do(*args) or function(*args))


def before_steps(monkeypatch, change) -> None:
    """Call `change(number, x)` before each step of SVI: the number of the mini-batch, from 1 on, and its images."""
    numbers, make_svi = itertools.count(1), training.svi.make_svi

    def make(*args):
        svi, adam = make_svi(*args)
        step = svi.step
        svi.step = lambda x: change(next(numbers), x) or step(x)
        return svi, adam

    monkeypatch.setattr(main, "make_svi", make)


def files(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def reached(folder, step) -> bool:
    """Whether the run in this folder has evaluated at this step or later."""
    return any(line["step"] >= step for line in metrics(folder))


def wait_for(event, run=None) -> None:
    """Until `event()` is true; fails if the process `run` ends before, or after a time that no machine needs."""
    until = time.monotonic() + LIMIT
    while not event():
        assert run is None or run.poll() is None or event(), run.communicate()[1]
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.01)
