"""What goes wrong in a long run, made to go wrong: nothing is lost, and nothing goes wrong in silence."""

import fcntl
import itertools
import os
import pty
import random
import resource
import shutil
import signal
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import LIMIT, SHORT, before, before_steps, check_same, files, reached, wait_for
from filelock import FileLock, Timeout

import main
import training.svi
from training.checkpoint import load_air, read_checkpoint
from training.run import read_metrics

pytestmark = pytest.mark.usefixtures("no_pictures")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def kill(moment: int, folder: str) -> None:
    """main.py is killed before that one of its accesses to files in the folder; each is written in two parts."""
    moments = itertools.count(1)

    def count(event, args):
        if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(folder) and next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_bytes(path, content):
        for mode, part in (("wb", content[: len(content) // 2]), ("ab", content[len(content) // 2 :])):
            with open(path, mode) as file:
                file.write(part)

    Path.write_bytes = write_bytes
    sys.addaudithook(count)


@pytest.mark.parametrize(
    "flags",
    [
        "tracegraph",
        pytest.param("traceenum", marks=pytest.mark.slow),
        pytest.param("tracegraph --cuda", marks=NEEDS_GPU),
    ],
)
@pytest.mark.parametrize("n", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_resuming_is_exact(n, flags, start, run_main, tmp_path):
    """Stopped after a third of its steps by Ctrl-C, which ends the reader of `2>&1 | tee log` too, and after two thirds
    because its terminal was closed, a run ends bit for bit as without, though nobody can read what it says."""
    straight, folder = tmp_path / "straight", tmp_path / "run"
    flags = (*SHORT, "-n", n, "--eval-every", n // 6, "--estimator", *flags.split())
    run_main(*flags, "--out", straight)

    run = start(*flags, "--out", folder, code=f"conftest.hold({n // 3})")
    wait_for(lambda: reached(folder, n // 3), run)
    run.stderr.close()
    run.send_signal(signal.SIGINT)
    assert run.wait(LIMIT) == 130 and read_checkpoint(folder)[0]["step"] == n // 3 + 1

    terminal, slave = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(2, termios.TIOCSCTTY)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # Under nohup the tests ignore it, and so would the run.

    options = {"stderr": slave, "start_new_session": True, "preexec_fn": take_terminal}
    run = start("--load", folder, code=f"conftest.hold({2 * n // 3})", **options)
    os.close(slave)
    os.set_blocking(terminal, False)

    def read_and_reached() -> bool:
        with suppress(BlockingIOError):  # A terminal that nobody reads would be full some time.
            os.read(terminal, 65536)
        return reached(folder, 2 * n // 3)

    wait_for(read_and_reached, run)
    os.close(terminal)
    assert run.wait(LIMIT) == 129 and read_checkpoint(folder)[0]["step"] == 2 * n // 3 + 1

    run_main("--load", folder)
    check_same(straight, folder)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_stops_a_run(name, run_main, monkeypatch, tmp_path):
    number, folder, missed, at = signal.Signals[name], tmp_path / "run", [], []
    monkeypatch.setattr(main.Pictures, "show", lambda *_: at.append(len(at) and read_checkpoint(folder)[0]["step"]))
    earlier = signal.signal(number, lambda *_: missed.append(name))
    try:
        before_steps(monkeypatch, lambda i, x: os.kill(os.getpid(), number) if i == 3 else None)
        finished = run_main(*SHORT, "-n", 20, "--eval-every", 500, "--out", folder, status=[128 + number])
        assert not missed and at == [0, 3]
        assert f"{name} after step 3: --load {folder} resumes from here\n" in finished.stderr
        assert read_checkpoint(folder)[0]["step"] == 3
        os.kill(os.getpid(), number)
        wait_for(lambda: missed)  # After the run it means what it meant before.
        if name == "SIGHUP":  # Ignored, as under nohup, it stays so.
            signal.signal(number, signal.SIG_IGN)
            before_steps(monkeypatch, lambda i, x: os.kill(os.getpid(), number))
            run_main("--load", folder, "-n", 5, "--visdom", "off")
    finally:
        signal.signal(number, earlier)


MANY = random.Random(0).choices(range(1, 61), k=30)


@pytest.mark.parametrize("n, moments", [(12, [44, 12]), pytest.param(120, MANY, marks=pytest.mark.slow)])
def test_killed_at_any_moment(n, moments, start, run_main, tmp_path):
    """A run that saves at every second step: whatever it leaves can be resumed, and it ends as if it had lived."""
    folder, straight, saved = tmp_path / "run", tmp_path / "straight", 0
    flags = (*SHORT, "-n", n)
    run_main(*flags, "--out", straight)
    for moment in moments:
        if not saved:
            shutil.rmtree(folder, ignore_errors=True)
        where = ("--load", folder) if saved else (*flags, "--out", folder)
        run = start(*where, code=f"import test_run; test_run.kill({moment}, {str(folder)!r})")
        errors = run.communicate(timeout=LIMIT)[1]
        assert run.returncode == -signal.SIGKILL or (run.returncode == 0 and saved > n - 40), errors
        if saved or (folder / "checkpoint.pt").exists():
            load_air(folder)
            earlier, saved = saved, read_checkpoint(folder)[0]["step"]  # whole, by its checksums
            assert saved >= max(earlier, *(line["step"] - 2 for line in read_metrics(folder)), 2)
    run_main("--load", folder)
    check_same(straight, folder)


# ---------------------------------------------------------------------------------------- the folder


def test_a_full_disk(run, run_main, tmp_path):
    """A limit on the size of files stands for it: the checkpoint no longer fits, the earlier one stays."""
    folder = shutil.copytree(run[0], tmp_path / "run")
    earlier, limits = files(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(earlier["checkpoint.pt"]) // 2, limits[1]))
    error = f"main.py: error: [Errno 27] File too large: '{folder / 'checkpoint.pt'}'"
    try:
        run_main("--load", folder, "-n", 8, "--visdom", "off", status=[1], error=error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(folder)["checkpoint.pt"] == earlier["checkpoint.pt"] and files(folder).keys() == earlier.keys()


def test_nothing_is_overwritten(run, run_main, monkeypatch, tmp_path):
    """Neither a run that was there, nor one that began and ended while this one was getting ready."""
    earlier, meanwhile = files(run[0]), tmp_path / "meanwhile"
    run_main(*SHORT, "--out", run[0], error="already exists and is not empty")
    before(monkeypatch, "Processes", lambda *_: shutil.copytree(run[0], meanwhile) and None)
    run_main(*SHORT, "--out", meanwhile, error="another run began there meanwhile")
    assert files(run[0]) == files(meanwhile) == earlier


def test_one_run_at_a_time(run_main, monkeypatch, tmp_path):
    """From before it reads its images until its last picture is drawn."""
    folder, locked = tmp_path / "run", []

    def look(what):
        with pytest.raises(Timeout):
            FileLock(folder / ".lock").acquire(timeout=0)
        locked.append(what)

    before(monkeypatch, "load_scenes", lambda *_: look("images"))
    monkeypatch.setattr(main.Pictures, "show", lambda pictures, air, split, *_: look(split))
    folder.mkdir()
    with FileLock(folder / ".lock"):
        run_main(*SHORT, "--out", folder, error=f"another process is training in {folder}")
    assert list(files(folder)) == [".lock"] and not locked
    run_main(*SHORT, "-n", 2, "--out", folder)
    assert locked == ["images", "validation", "validation", "test"]


def test_a_requeued_run_goes_on_from_the_last_checkpoint(run, run_main, monkeypatch, tmp_path):
    """From the one that is there when it has the lock: until then, the job that is stopping may still save."""
    folder, later, steps = *(shutil.copytree(run[0], tmp_path / name) for name in ("run", "later")), []
    with monkeypatch.context() as patch:
        before_steps(patch, lambda i, x: os.kill(os.getpid(), signal.SIGTERM))
        run_main("--load", later, "-n", 8, "--visdom", "off", status=[143])
    assert read_checkpoint(later)[0]["step"] == 7
    before_steps(monkeypatch, lambda i, x: steps.append(i))
    before(monkeypatch, "Processes", lambda *_: shutil.copytree(later, folder, dirs_exist_ok=True) and None)
    run_main("--load", folder, "-n", 8, "--visdom", "off")
    assert steps == [1] and read_checkpoint(folder)[0]["step"] == 8


# ------------------------------------------------------------------------- numbers that are not finite


def test_too_many_skipped_steps_end_a_run(run_main, monkeypatch, tmp_path):
    """A NaN in one pixel of some mini-batches: each is told of, and not learned from."""

    def plant(numbers):
        before_steps(monkeypatch, lambda i, x: i in numbers and x[3, 20, 20].fill_(torch.nan) is None)

    folder = tmp_path / "run"
    plant([2, 4, 5])
    error = "3 of 100 steps were skipped, loss or gradient is not finite; a smaller --learning-rate may help"
    run_main(*SHORT, "--out", folder, status=[1], error=error)
    assert read_checkpoint(folder)[0]["step"] == 2
    # Far apart they do not.
    plant([1, 4, 7, 10])
    monkeypatch.setattr(training.svi, "SKIPPED_WITHIN", 3)
    finished = run_main("--load", folder, "-n", 10, "--visdom", "off", "--eval-every", 500)
    told = [line.split(":")[0] for line in finished.stderr.splitlines() if "skipped" in line]
    assert told == [f"skipped step {n}" for n in (3, 5, 7, 9)]
    load_air(folder)  # It would refuse parameters that are not finite.


@pytest.mark.parametrize("stopped", [False, True])
def test_parameters_that_are_not_finite_are_not_saved(stopped, run, run_main, monkeypatch, tmp_path):
    """Neither when a checkpoint is due nor when a signal stops the run."""
    folder = shutil.copytree(run[0], tmp_path / "run")
    checkpoint = (folder / "checkpoint.pt").read_bytes()
    before(monkeypatch, "check_finite", lambda air, *_: next(air.parameters()).data.fill_(torch.inf) is None)
    if stopped:
        before_steps(monkeypatch, lambda i, x: os.kill(os.getpid(), signal.SIGTERM))
    error, flags = "after step 7 the parameters are not finite, and are not saved", ("-n", 9, "--visdom", "off")
    run_main("--load", folder, *flags, "--eval-every", 500 if stopped else 1, status=[1], error=error)
    assert (folder / "checkpoint.pt").read_bytes() == checkpoint
