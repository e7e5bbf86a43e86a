"""A run's folder: `config.json`, `metrics.jsonl`, `checkpoint.pt`, the pictures and a lock; and what stops a run.

Files are replaced at once or not at all, so that a run that is killed at any moment can be resumed.
"""

import json
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from air import AIR
from evaluation import ReferenceStats
from multi_mnist import DataError, one_line
from training.checkpoint import read_reference, save_checkpoint, write_file
from training.parallel import Processes

# Ctrl-C, and what schedulers, terminals and resource limits send.
STOP_SIGNALS = [getattr(signal, name) for name in "SIGINT SIGTERM SIGHUP SIGUSR1 SIGUSR2 SIGXCPU".split()]


class UsageError(Exception):
    """What the flags ask for cannot be done; the message says why."""


@dataclass
class State:
    """How far a run is."""

    step: int = 0
    seconds: float = 0.0  # of training only
    reference: ReferenceStats | None = None  # once the run is finished

    def is_due(self, every: int, num_steps: int) -> bool:
        """Whether something that is done every so many steps, and after the last one, is to be done now."""
        return self.step % every == 0 or self.step == num_steps


# ------------------------------------------------------------------------------------------ the folder


@contextmanager
def claim(folder: Path, resumes: bool) -> Iterator[None]:
    """Within it, no other run writes to the folder, which is made if it is not there.

    What is in the folder has to be read within it: before, another run may still change it.
    Raises UsageError if another run has it, or if there are files in it although no run `resumes` there.
    """
    made, lock = not folder.exists(), FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"another process is training in {folder}") from None
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to: {error.strerror or error}") from None
    try:
        if not resumes and has_files(folder):
            raise UsageError(f"{folder} already exists and is not empty: another run began there meanwhile")
        yield
    finally:
        if made and not has_files(folder):  # It failed before it began.
            (folder / ".lock").unlink()
            folder.rmdir()
        lock.release()


def has_files(folder: Path) -> bool:
    """Whether there is anything in it but the lock, and what a run that was killed had not finished writing."""
    return folder.is_dir() and any(file.name[0] != "." for file in folder.iterdir())


def begin(
    folder: Path, load: Path | None, checkpoint: dict | None, air: AIR, optimizer, processes: Processes, flags: dict
) -> State:
    """Where a run begins: at step 0, or where the checkpoint at `load` was. Writes the first files of its folder.

    Raises DataError or UsageError, before anything is changed, if the checkpoint cannot be resumed.
    """
    state, has_stream = resume(checkpoint, load, optimizer, processes) if checkpoint else (State(), processes.is_main)
    if not has_stream:
        stream = np.random.SeedSequence([flags["seed"], processes.rank, state.step])
        torch.manual_seed(int(stream.generate_state(1)[0]))
    if len(processes.all_gather(torch.tensor([state.step])).unique()) > 1:
        raise UsageError("the machines' checkpoints are of different steps: copy the run's folder to all of them")
    if processes.is_main:
        lines = read_metrics(load.parent) if load else []
        lines = [json.dumps(line) for line in lines if line["step"] <= state.step and line["split"] != "test"]
        versions = {package.__name__: package.__version__ for package in (torch, pyro, np)}
        config = {"flags": flags, "air": air.config, "versions": {"python": platform.python_version()} | versions}
        config |= {"world_size": processes.world_size, "threads": torch.get_num_threads()}
        write_file(folder / "config.json", f"{json.dumps(config, indent=2)}\n".encode())
        write_file(folder / "metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())
    return state


def save(folder: Path, air: AIR, optimizer, state: State, processes: Processes, flags: dict, data_sha256: str) -> None:
    """Write the checkpoint. All processes have to call it, for their random numbers."""
    cuda = processes.device.type == "cuda"
    rng = processes.all_gather(torch.get_rng_state()).view(processes.world_size, -1)
    cuda_rng = processes.all_gather(torch.cuda.get_rng_state()).view(processes.world_size, -1) if cuda else None
    if processes.is_main:
        reference = state.reference and state.reference._asdict()
        others = {"step": state.step, "seconds": state.seconds, "reference": reference, "data_sha256": data_sha256}
        others |= {"flags": flags, "optimizer": optimizer.state_dict(), "rng": rng, "cuda_rng": cuda_rng}
        save_checkpoint(folder / "checkpoint.pt", air, **others)


def resume(checkpoint: dict, path: Path, optimizer, processes: Processes) -> tuple[State, bool]:
    """Progress, optimizer and random numbers as they were; and whether this process has such random numbers.

    It has not where the number of processes or the kind of device was another. Raises DataError.
    """
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, moments in optimizer.state.items():
            for name, value in moments.items():
                if not value.isfinite().all() or (name != "step" and value.shape != parameter.shape):
                    raise ValueError("the optimizer's state is not finite or does not fit the parameters")
        rng, cuda_rng, cuda = checkpoint["rng"], checkpoint["cuda_rng"], processes.device.type == "cuda"
        has_stream = len(rng) == processes.world_size and not (cuda and cuda_rng is None)
        if has_stream:
            torch.set_rng_state(rng[processes.rank].clone())  # PyTorch does not take a part of a tensor for one.
            if cuda:
                torch.cuda.set_rng_state(cuda_rng[processes.rank].clone())
        state = State(int(checkpoint["step"]), float(checkpoint["seconds"]), read_reference(checkpoint, path))
    except Exception as error:  # Whatever goes wrong, the file is at fault.
        raise DataError(f"{path} cannot be resumed: {one_line(error)}") from None
    return state, has_stream


def plain_flags(args) -> dict:
    """The flags as plain values, without a password that is in the URL of visdom."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return values | {"visdom": re.sub("//.*@", "//", args.visdom)}


def metrics_line(split: str, state: State, metrics: dict) -> dict:
    """A line of metrics.jsonl."""
    speed = round(state.step / state.seconds, 2) if state.seconds else None
    return {"split": split, "step": state.step, "seconds": round(state.seconds, 3), "steps_per_s": speed} | metrics


def record(folder: Path, split: str, state: State, metrics: dict) -> dict:
    """Append a line to metrics.jsonl, and return it."""
    line = metrics_line(split, state, metrics)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl in a run's folder, if there is one. Raises UsageError if it is damaged."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # A line cut short is not one.
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from None


# ----------------------------------------------------------------------------- the loop, and its end


@contextmanager
def progress_bar(state: State, num_steps: int, processes: Processes) -> Iterator[Callable[[str], None]]:
    """A bar of steps; yields what is to be called after each step, with what is to be shown beside it."""
    bar = tqdm(total=num_steps, initial=state.step, unit="step", mininterval=0.5, disable=not processes.is_main)

    def advance(text: str) -> None:
        with ignore_broken_pipe():
            bar.set_postfix_str(text, refresh=False)
            bar.update()

    try:
        yield advance
    finally:
        with ignore_broken_pipe():
            bar.close()


@contextmanager
def stop_signals(processes: Processes) -> Iterator[None]:
    """Within it, the signals that stop a run are only noted, in `processes`; those that are ignored stay so."""

    def note(number, frame):
        processes.stop_signal = signal.Signals(number)

    noted = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    earlier = [signal.signal(number, note) for number in noted]
    try:
        yield
    finally:
        for number, handler in zip(noted, earlier):
            signal.signal(number, handler)


def exit_on_signal(processes: Processes, folder: Path, step: int) -> None:
    """End the program as one that a signal ended."""
    processes.barrier()  # torchrun ends all others as soon as one has ended.
    number = processes.stop_signal or signal.SIGTERM  # The other processes were told by the one that was sent it.
    if processes.is_main:
        with ignore_broken_pipe():
            tqdm.write(f"{number.name} after step {step}: --load {folder} resumes from here", sys.stderr)
    sys.exit(128 + number)


@contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """Within it, stderr may have lost its reader: Ctrl-C ends that of `2>&1 | tee log` as well, SIGHUP the terminal.

    Without it, Python, which flushes stderr at its end, would end with status 120.
    """
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
