"""A training run: its progress, its folder, and what ends it.

The folder has `config.json`, `metrics.jsonl`, `checkpoint.pt`, the pictures and a lock. Files are replaced at once or
not at all, so that a run that is killed at any moment can be resumed.
"""

import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyro
import torch
import torchvision
from filelock import FileLock, Timeout
from tqdm import tqdm

from air import to_images
from evaluation import Evaluation
from training.checkpoint import CheckpointError, read_usual, save_checkpoint, write_file
from training.parallel import Processes
from training.svi import NonFiniteError

# So many skipped steps within so many end a run.
MAX_SKIPPED_STEPS, SKIPPED_WITHIN = 3, 100


class RunError(Exception):
    """A run cannot begin or go on in this folder; the message says why."""


class Run:
    """A run's progress, and its folder. A context manager: within it, no other run writes to the folder.

    step, seconds: how far it is, and how long that took (training only).
    Raises RunError or CheckpointError, before anything is changed, if `checkpoint` cannot be resumed in the
    folder `args.out`, with the images that have the checksum `data_sha256`.
    """

    def __init__(self, args, air, optimizer, processes: Processes, data_sha256: str, checkpoint: dict | None = None):
        self.args, self.air, self.optimizer, self.processes = args, air, optimizer, processes
        self.folder, self.data_sha256 = args.out, data_sha256
        self.step, self.seconds, self.accuracy, self.usual, self.earlier_lines = 0, 0.0, "-", None, []
        self.advanced, self.skipped = False, []  # whether the latest mini-batch was learned from; steps that were not
        if checkpoint:
            resumed = args.load.parent
            if self.folder.resolve() == resumed.resolve() and checkpoint["data_sha256"] != data_sha256:
                raise RunError(f"{resumed} was trained on other images: name another folder to resume it in with --out")
            self.restore(checkpoint)
            if is_run_folder(resumed):
                lines = read_metrics(resumed)
                self.earlier_lines = [x for x in lines if x["step"] <= self.step and x["split"] != "test"]
        elif not processes.is_main:
            self.seed_own_stream()
        if len(processes.all_gather(torch.tensor([self.step])).unique()) > 1:
            raise RunError("the machines' checkpoints are of different steps: copy the run's folder to all of them")

    def __enter__(self) -> "Run":
        if not self.processes.is_main:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"another process is training in {self.folder}") from None
        for name in ("checkpoint.pt", "config.json", "metrics.jsonl", "*.png"):
            for half_written in self.folder.glob(f".{name}.*"):  # by a process that was killed
                half_written.unlink()
        versions = {"python": platform.python_version(), "torch": torch.__version__, "pyro": pyro.__version__}
        versions |= {"torchvision": torchvision.__version__, "numpy": np.__version__}
        config = {"flags": plain_values(self.args), "air": self.air.config, "versions": versions}
        config |= {"world_size": self.processes.world_size, "threads": torch.get_num_threads()}
        write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.earlier_lines))
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if not self.processes.is_main:
            return
        self.lock.release()
        if error and not isinstance(error, SystemExit) and (self.folder / "checkpoint.pt").exists():
            with perhaps_unread():
                print(f"--load {self.folder} resumes from the last checkpoint", file=sys.stderr)

    # ------------------------------------------------------------------------------- the loop

    def mini_batches(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Mini-batches of floats, drawn from the images `x`, uint8, until the last step or a stop signal."""
        n, size = self.args.num_steps, self.args.batch_size // self.processes.world_size
        bar = tqdm(
            total=n,
            initial=self.step,
            unit="step",
            mininterval=0.5,
            smoothing=0.05,
            disable=not self.processes.is_main,
        )
        # Ctrl-C ends the reader of `2>&1 | tee log` as well.
        with perhaps_unread(), stop_signals(self.processes), bar as self.bar:
            while self.step < n and not self.processes.should_stop:
                self.started = time.perf_counter()
                yield to_images(x[torch.randint(len(x), (size,), device=x.device)])
            stop = torch.tensor([self.processes.stop_signal is not None], dtype=torch.int)  # during an evaluation
            self.processes.should_stop = bool(self.processes.all_gather(stop).any())

    def finish_step(self, loss: float) -> None:
        """Count a step, or skip it if `svi.step` returned a loss that is not finite.

        Raises NonFiniteError where too many were skipped.
        """
        self.advanced = math.isfinite(loss)
        if self.advanced:
            self.step += 1
            self.seconds += time.perf_counter() - self.started
        else:
            self.skip_step()
        if self.processes.should_stop:
            self.save()
        elif self.advanced and not self.processes.stop_signal:  # After a signal nobody may be there to see the bar.
            elbo = -loss / self.args.batch_size
            self.bar.set_postfix_str(f"ELBO {elbo:.1f}, validation accuracy {self.accuracy}", refresh=False)
            self.bar.update()

    def skip_step(self) -> None:
        if self.processes.is_main:
            tqdm.write(f"skipped step {self.step + 1}: loss or gradient is not finite", sys.stderr)
        self.skipped = [step for step in self.skipped if step > self.step - SKIPPED_WITHIN] + [self.step]
        if len(self.skipped) == MAX_SKIPPED_STEPS:
            counts = f"{MAX_SKIPPED_STEPS} of {SKIPPED_WITHIN} steps were skipped"
            raise NonFiniteError(f"{counts}, loss or gradient is not finite; a smaller --learning-rate may help")

    def is_due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and after the last one, is to be done now."""
        return self.advanced and (self.step % every == 0 or self.step == self.args.num_steps)

    # ------------------------------------------------------------------------------ the folder

    def record(self, split: str, evaluation: Evaluation) -> dict:
        """Append a line to metrics.jsonl, and return it. Checkpoints know what is usual on the validation scenes."""
        line = metrics_line(split, self.step, self.seconds, evaluation.metrics)
        if split == "validation":
            self.usual = evaluation.usual
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.accuracy = "-" if line["count_accuracy"] is None else f"{line['count_accuracy']:.2%}"
        return line

    def save(self) -> None:
        """Write the checkpoint; all processes have to call it, for their random numbers.

        Raises NonFiniteError, and leaves the earlier one, if it could not be loaded again.
        """
        self.check_parameters()
        state = self.optimizer.state_dict()
        rng = self.processes.all_gather(torch.get_rng_state())
        cuda_rng = self.processes.all_gather(torch.cuda.get_rng_state()) if self.args.cuda else None
        if self.processes.is_main:
            progress = {"step": self.step, "seconds": self.seconds, "data_sha256": self.data_sha256}
            progress |= {"flags": plain_values(self.args), "optimizer": state}
            progress |= {"usual": self.usual and self.usual._asdict()}
            save_checkpoint(self.folder / "checkpoint.pt", self.air, **progress, rng=rng, cuda_rng=cuda_rng)

    def check_parameters(self) -> None:
        """Raise NonFiniteError if parameters or optimizer are not finite: nothing can be learned from there."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        if not all(value.isfinite().all() for value in [*self.air.parameters(), *moments]):
            raise NonFiniteError(f"after step {self.step} the parameters are not finite, and are not saved")

    def restore(self, checkpoint: dict) -> None:
        """Progress, the optimizer's moments and the random numbers' state as they were. Raises CheckpointError.

        With another number of processes than before, the random numbers are others.
        """
        world_size, rank = self.processes.world_size, self.processes.rank
        try:
            state, groups = checkpoint["optimizer"]["state"], self.optimizer.state_dict()["param_groups"]
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            for number, moments in state.items():
                shapes = {name: parameters[number].shape for name in ("exp_avg", "exp_avg_sq")} | {"step": ()}
                if {name: tuple(value.shape) for name, value in moments.items()} != shapes:
                    raise ValueError("the optimizer's state does not fit the parameters")
                if not all(value.isfinite().all() for value in moments.values()):
                    raise ValueError("the optimizer's state is not finite")
            for group, saved in zip(groups, checkpoint["optimizer"]["param_groups"], strict=True):
                group["running_norm"] = float(saved["running_norm"])
                if not 0 <= group["running_norm"] < math.inf:
                    raise ValueError("the gradient's running norm is not finite")
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            self.step, self.seconds, self.usual = checkpoint["step"], checkpoint["seconds"], read_usual(checkpoint)
            states = checkpoint["rng"].view(-1, len(torch.get_rng_state()))
            if len(states) != world_size or (self.args.cuda and checkpoint["cuda_rng"] is None):
                self.seed_own_stream()
            else:
                torch.set_rng_state(states[rank].clone())  # PyTorch does not take a part of a tensor for one.
                if self.args.cuda:
                    torch.cuda.set_rng_state(checkpoint["cuda_rng"].view(world_size, -1)[rank].clone())
        except Exception as error:  # Whatever goes wrong, the file is at fault.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{self.args.load} cannot be resumed: {reason}") from None

    def seed_own_stream(self) -> None:
        """Random numbers of this process, from this step on."""
        of_this = np.random.SeedSequence([self.args.seed, self.processes.rank, self.step])
        torch.manual_seed(int(of_this.generate_state(1)[0]))

    def exit_on_signal(self) -> None:
        """End the program as one that a signal ended."""
        self.processes.barrier()  # torchrun ends all others as soon as one has ended.
        number = self.processes.stop_signal or signal.SIGTERM  # The other processes were told by the one that was.
        if self.processes.is_main:
            with perhaps_unread():
                print(f"{number.name} after step {self.step}: --load {self.folder} resumes from here", file=sys.stderr)
        sys.exit(128 + number)


@contextmanager
def perhaps_unread() -> Iterator[None]:
    """Within it, stderr may have lost its reader; what is written there from then on is dropped.

    Otherwise Python, which flushes stderr at its end, would end with status 120.
    """
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@contextmanager
def stop_signals(processes: Processes) -> Iterator[None]:
    """Within it, SIGINT and SIGTERM are only noted in `processes`; a second one acts.

    (In a thread that is not the main one, they are left alone: Python does not let it handle signals.)
    """
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}

    def note(number, frame):
        processes.stop_signal = signal.Signals(number)
        signal.signal(number, handlers[number])

    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is note:
                signal.signal(number, handler)


def plain_values(args) -> dict:
    """The flags as plain values, without a password that is in the URL of visdom."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return values | {"visdom": re.sub("//.*@", "//", args.visdom)}


def write_text(path: Path, text: str) -> None:
    write_file(path, text.encode())


def metrics_line(split: str, step: int, seconds: float, metrics: dict) -> dict:
    """A line of metrics.jsonl."""
    steps_per_s = round(step / seconds, 2) if seconds else None
    return {"split": split, "step": step, "seconds": round(seconds, 3), "steps_per_s": steps_per_s} | metrics


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl in a run's folder. Raises RunError if it is damaged."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    try:
        parsed = [json.loads(line) for line in lines if line.endswith("\n")]  # A line cut short is not one.
        if not all(isinstance(line["split"], str) and isinstance(line["step"], int) for line in parsed):
            raise ValueError("a line without split and step")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
    return parsed


def is_run_folder(folder: Path) -> bool:
    """Whether there is a config.json of ours."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).keys() >= {"flags", "air", "versions"}
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
