"""Training in two processes, as a user starts it with torchrun."""

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from conftest import LIMIT, ROOT, SHORT, before_steps, check_same, files, reached, wait_for
from pyro.infer import TraceGraph_ELBO

import main
import training.run
from air import AIR
from training.checkpoint import read_checkpoint
from training.data import load_own_scenes
from training.parallel import Processes
from training.svi import make_svi

QUICK, LOAD = (*SHORT, "--viz-every", 10**6), ("--visdom", "off", "--load")


def work(folder: str) -> None:
    """main.py keeps the checkpoint of step 1, each process tells its parameters at the end, and the second one has a
    fault in its third mini-batch. (Nothing is drawn.)"""
    rank = os.environ["RANK"]

    def save_and_keep(to, air, adam, state, processes, *others, save=training.run.save):
        save(to, air, adam, state, processes, *others)
        if state.step == 1 and processes.is_main:
            shutil.copy(to / "checkpoint.pt", folder + "/first.pt")
        elif state.step == 6:
            parameters = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
            torch.save(parameters, f"{folder}/rank{rank}.pt")

    training.run.save, main.Pictures.show = save_and_keep, lambda *_: None
    before_steps(pytest.MonkeyPatch(), lambda i, x: (rank, i) == ("1", 3) and x.fill_(torch.nan) is None)


@pytest.fixture
def torchrun(start):
    """Start two processes; the launcher itself starts files only."""

    def torchrun(*args, code=None, **options):
        launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
        launcher += ("--no-python", sys.executable) if code else ()
        return start(*args, code=code, launcher=launcher, cwd=ROOT, **options)

    return torchrun


def finish(run):
    _, errors = run.communicate(timeout=LIMIT)
    assert run.returncode == 0, errors
    return errors


def test_two_processes_are_one(torchrun, tmp_path, data_file):
    """Their first step has the gradient of the whole mini-batch, and they stay the same to the last bit."""
    folder, code = tmp_path / "run", f"import test_parallel; test_parallel.work({str(tmp_path)!r})"
    errors = finish(torchrun(*QUICK, "--eval-every", 1, "--out", folder, code=code))
    # What one of them cannot use is skipped by both, and told once.
    assert errors.count("skipped step") == 1 and "skipped step 3" in errors
    ranks, checkpoint = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)], read_checkpoint(folder)[0]
    assert len(ranks[0]) > 20 and ranks[0].keys() == ranks[1].keys()
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name
        assert torch.equal(value, checkpoint["parameters"][name.removeprefix("air$$$")]), name

    # The gradient, by Pyro's own estimator in one process.
    scenes = load_own_scenes(data_file, None, None, 3, None, None)[0]
    pyro.set_rng_seed(0)
    air = AIR(**checkpoint["air"])
    for rank in (0, 1):
        if rank == 1:
            torch.manual_seed(int(np.random.SeedSequence([0, 1, 0]).generate_state(1)[0]))
        x = torch.from_numpy(scenes.x[rank::2])
        x = x[torch.randint(len(x), (4,))].float() / 255
        TraceGraph_ELBO(max_plate_nesting=1).loss_and_grads(air.model, air.guide, x)
    moments = read_checkpoint(tmp_path / "first.pt")[0]["optimizer"]["state"]
    parameters = [parameter for group in make_svi(air, "tracegraph")[1].param_groups for parameter in group["params"]]
    assert len(moments) == len(parameters) == len(ranks[0])
    for number, parameter in enumerate(parameters):
        gradient = 10 * moments[number]["exp_avg"]  # Adam's first moment after one step is a tenth of it.
        assert torch.allclose(gradient, parameter.grad, rtol=1e-3, atol=1e-4 * parameter.grad.abs().max())


def test_a_lost_process_ends_the_job_and_another_number_goes_on(torchrun, run_main, no_pictures, tmp_path):
    """And SIGHUP to torchrun stops the job so that it saves, though it was started with nohup."""
    folder = tmp_path / "run"
    run = torchrun(*QUICK, "-n", 10**6, "--out", folder)
    wait_for(lambda: reached(folder, 4), run)  # so that the checkpoint of step 2 is there
    ranks = {}
    for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_text().split("\0")
        ranks[dict(line.split("=", 1) for line in environment if "=" in line)["RANK"]] = int(child)
    assert ranks.keys() == {"0", "1"}
    os.kill(ranks["1"], signal.SIGKILL)
    _, errors = run.communicate(timeout=LIMIT)
    assert run.returncode != 0 and "main.py FAILED" in errors
    assert "another process of the job is lost" in errors and "skipped step" not in errors
    step = read_checkpoint(folder)[0]["step"]
    assert step >= 2
    run_main(*LOAD, folder, "-n", step + 1)
    nohup = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    hold = f"conftest.hold({step + 2})"
    run = torchrun(*LOAD, folder, "-n", step + 4, "--eval-every", 1, code=hold, **nohup)
    wait_for(lambda: reached(folder, step + 2), run)
    run.send_signal(signal.SIGHUP)
    _, errors = run.communicate(timeout=LIMIT)
    assert run.returncode != 0 and f"SIGHUP after step {step + 3}" in errors
    assert read_checkpoint(folder)[0]["step"] == step + 3


@pytest.mark.slow
def test_resuming_two_processes_is_exact(torchrun, tmp_path):
    straight, folder = tmp_path / "straight", tmp_path / "run"
    flags = (*QUICK, "-n", 60, "--eval-every", 10)
    finish(torchrun(*flags, "--out", straight))
    run = torchrun(*flags, "--out", folder, code="conftest.hold(20)")
    wait_for(lambda: reached(folder, 20), run)
    run.send_signal(signal.SIGTERM)
    assert "SIGTERM after step 21" in run.communicate(timeout=LIMIT)[1] and run.returncode != 0
    finish(torchrun(*LOAD, folder))
    check_same(straight, folder)


def test_machines_with_checkpoints_of_different_steps(run, run_main, monkeypatch):
    """As when the second has the copy of an earlier interruption: told at once, and nothing is changed."""
    earlier = files(run[0])
    monkeypatch.setattr(Processes, "all_gather", lambda self, step: torch.cat([step, step - 2]))
    run_main(*LOAD, run[0], "-n", 8, error="checkpoints are of different steps")
    assert files(run[0]) == earlier


def test_a_mini_batch_that_cannot_be_divided(run_main, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    run_main("-b", 9, error="cannot be divided equally among 2 processes")
