"""Small drawn digits and scenes, so that the tests need neither the network nor MNIST."""

import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
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
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import main  # noqa: E402
import multi_mnist  # noqa: E402


@pytest.fixture(autouse=True)
def clean_state():
    """Validation on, and every test from the same random numbers."""
    pyro.clear_param_store()
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)


@pytest.fixture(scope="session")
def digits():
    """60 images uint8 `[60, 28, 28]` of the digits 0 to 9 in six sizes, and their classes."""
    images, classes = [], []
    for size in range(18, 24):
        for digit in range(10):
            image = Image.new("L", (28, 28))
            font = ImageFont.load_default(size)
            ImageDraw.Draw(image).text((14, 14), str(digit), fill=255, font=font, anchor="mm")
            images.append(np.asarray(image))
            classes.append(digit)
    return np.stack(images), np.array(classes)


@pytest.fixture(scope="session")
def scenes(digits):
    return multi_mnist.compose(*digits, n=200, rng=np.random.default_rng(0))


@pytest.fixture
def x(scenes):
    """Six scenes as floats, `[6, 50, 50]`, float64 so that sums can be compared closely."""
    return torch.from_numpy(scenes.x[:6]).double() / 255


@pytest.fixture(scope="session")
def data_dir(digits, tmp_path_factory):
    """A data folder whose caches pass for the real splits but hold a few scenes of drawn digits."""
    folder = tmp_path_factory.mktemp("data")
    for i, split in enumerate(multi_mnist.SPLITS):
        scenes = multi_mnist.compose(*digits, n=64, rng=np.random.default_rng(i))
        multi_mnist.write_cache(folder / f"multi_mnist-{split}.npz", scenes, multi_mnist.cache_key(split))
    return folder


SHORT = ("-n", 6, "-b", 8, "--eval-every", 2)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def call(main, *args) -> subprocess.CompletedProcess:
    """A script's `main` with these arguments, in this process, which saves the seconds that imports take."""
    args = [*map(str, args)]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as exit:
            status = exit.code
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


def call_main(data_dir, *args, script=None) -> subprocess.CompletedProcess:
    """main.py with these flags; with `script` in a process of its own."""
    args = [*map(str, args), "--data-dir", str(data_dir)]
    if not script:
        return call(main.main, *args)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(script), *args], capture_output=True, text=True, env=environment)


@pytest.fixture
def run_main(data_dir):
    return functools.partial(call_main, data_dir)


@pytest.fixture(scope="session")
def run(tmp_path_factory, data_dir):
    """One finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, call_main(data_dir, *SHORT, "--visdom", "off", "--out", folder)
