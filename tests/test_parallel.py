"""Training in two processes, as a user starts it with torchrun."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyro
import pytest
import torch
from conftest import ROOT
from pyro.infer import TraceGraph_ELBO
from test_run import metrics, state

import multi_mnist
from air import AIR
from training.checkpoint import read_checkpoint
from training.svi import count_ratio, make_svi

SHORT = ("-b", 8, "--visdom", "off", "--viz-every", 1000)

# main.py, but it keeps the checkpoint of step 1, each process tells its parameters in the end, and the
# second process has a fault in its third mini-batch.
WORKER = f"""
import os, shutil, sys
sys.path.insert(0, {str(ROOT)!r})
import pyro, torch
import main, training.run

folder, *flags = sys.argv[1:]
calls = []

class KeepingRun(main.Run):
    def save(self):
        super().save()
        if self.step == 1 and self.processes.is_main:
            shutil.copy(self.folder / "checkpoint.pt", folder + "/first.pt")

def poisoned(x, to_images=training.run.to_images):
    calls.append(len(x))
    return to_images(x) * (float("nan") if (os.environ["RANK"], len(calls)) == ("1", 3) else 1)

main.Run, training.run.to_images = KeepingRun, poisoned
try:
    main.main(flags)
finally:
    parameters = {{name: value.detach().clone() for name, value in pyro.get_param_store().items()}}
    torch.save(parameters, folder + "/rank" + os.environ["RANK"] + ".pt")
"""


@pytest.fixture
def torchrun(data_dir):
    """Start a script in two processes."""

    def start(*args, script=ROOT / "main.py"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
        command += [*map(str, args), "--data-dir", str(data_dir)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    return start


def finish(run):
    out, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    return err


def test_two_processes_are_one(torchrun, tmp_path, data_dir):
    """Their first step has the gradient of the whole mini-batch, and they stay the same to the last bit."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    folder = tmp_path / "run"
    errors = finish(torchrun(tmp_path, *SHORT, "-n", 10, "--eval-every", 1, "--out", folder, script=worker))
    # What one of them cannot use is skipped by both, and told once.
    assert errors.count("skipped step") == 1 and "skipped step 3" in errors
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    saved = read_checkpoint(folder / "checkpoint.pt")[0]["parameters"]
    assert len(first) > 20 and first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value, saved[name.removeprefix("air$$$")]), name

    # The gradient, by Pyro's own estimator in one process.
    scenes = multi_mnist.load_split("train", data_dir)
    pyro.set_rng_seed(0)
    air = AIR()
    air.set_count_prior(count_ratio(0, 10))
    _, adam = make_svi(air, "tracegraph")
    for rank in (0, 1):
        if rank == 1:
            torch.manual_seed(int(np.random.SeedSequence([0, 1, 0]).generate_state(1)[0]))
        x = torch.from_numpy(scenes.x[rank::2])
        x = x[torch.randint(len(x), (4,))].float() / 255
        TraceGraph_ELBO(max_plate_nesting=1).loss_and_grads(air.model, air.guide, x)
    moments = read_checkpoint(tmp_path / "first.pt")[0]["optimizer"]["state"]
    parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        # Adam's first moment after one step is a tenth of the gradient.
        gradient = 10 * moments[number]["exp_avg"]
        assert torch.allclose(gradient, parameter.grad, rtol=1e-3, atol=1e-4 * parameter.grad.abs().max())


def test_a_lost_process_ends_the_job_and_another_number_goes_on(torchrun, run_main, tmp_path):
    folder = tmp_path / "run"
    run = torchrun(*SHORT, "-n", 10_000, "--eval-every", 2, "--out", folder)
    while not (folder / "checkpoint.pt").exists():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    ranks = {}
    for child in children:
        with open(f"/proc/{child}/environ") as file:
            ranks[dict(line.split("=", 1) for line in file.read().split("\0") if "=" in line)["RANK"]] = int(child)
    os.kill(ranks["1"], signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0 and "main.py FAILED" in errors
    assert "another process of the job is lost" in errors and "skipped step" not in errors
    reached = read_checkpoint(folder / "checkpoint.pt")[0]["step"]
    assert reached >= 2

    alone = run_main("--load", folder, "-n", reached + 2)
    assert alone.returncode == 0, alone.stderr
    finish(torchrun("--load", folder, "-n", reached + 4))
    assert metrics(folder)[-1]["step"] == reached + 4


@pytest.mark.slow
def test_machines_with_checkpoints_of_different_steps(torchrun, run_main, tmp_path):
    """As when the second has the copy of an earlier interruption: told at once, and nothing is changed."""
    run, worker = tmp_path / "0" / "run", tmp_path / "worker.py"
    assert run_main(*SHORT, "-n", 1, "--out", run).returncode == 0
    shutil.copytree(run, tmp_path / "1" / "run")
    assert run_main("--load", run, "-n", 2).returncode == 0
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    worker.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport main\n"
        f"os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])\nmain.main()"
    )
    job = torchrun("--load", "run", "-n", 4, script=worker)
    _, errors = job.communicate(timeout=60)
    assert job.returncode != 0 and "checkpoints are of different steps" in errors
    assert before == {file.name: file.read_bytes() for file in run.iterdir()}


@pytest.mark.slow
def test_resuming_two_processes_is_exact(torchrun, tmp_path):
    flags = (*SHORT, "-n", 60, "--eval-every", 10)
    finish(torchrun(*flags, "--out", tmp_path / "straight"))
    run = torchrun(*flags, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0 and "SIGTERM after step" in errors
    assert 10 <= read_checkpoint(tmp_path / "run" / "checkpoint.pt")[0]["step"] < 60
    finish(torchrun("--load", tmp_path / "run"))
    expected, actual = state(tmp_path / "straight"), state(tmp_path / "run")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


@pytest.mark.parametrize(
    "flags, error",
    [("-b 8", "cannot be divided equally"), ("-b 9 --eval-only --load {run}", "cannot be combined with torchrun")],
)
def test_errors(flags, error, run_main, monkeypatch, tmp_path):
    if "{run}" in flags:
        assert run_main("-n", 1, "-b", 9, "--visdom", "off", "--out", tmp_path / "run").returncode == 0
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", 3), ("RANK", 0), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    finished = run_main(*flags.format(run=tmp_path / "run").split())
    assert finished.returncode == 2 and error in finished.stderr
