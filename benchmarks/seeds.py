"""Does it learn with every seed? The first steps of many runs of main.py, two at a time, one thread each.

    python benchmarks/seeds.py                                   # fifty seeds, to step 500 of a default run
    python benchmarks/seeds.py --seeds 0 1 2 -- --guide rnn      # others; what follows -- is for main.py

Each run has the schedules of a whole one, and is stopped at the first evaluation at that step or later. Runs that
are there already are not made again, so that the script may be stopped and started at will.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.run import read_metrics

ROOT = Path(__file__).parent.parent


def train_until(folder: Path, flags: list, step: int | None = None) -> list[dict]:
    """Run main.py in `folder`, with one thread, until it has evaluated at `step` or later, or to its end.

    A run that is there already is resumed. Returns the lines of its metrics.jsonl.
    """

    def done() -> bool:
        lines = read_metrics(folder)
        return any(line["split"] == "test" or (step is not None and line["step"] >= step) for line in lines)

    if not done():
        there = (folder / "checkpoint.pt").exists()
        if not there:
            shutil.rmtree(folder, ignore_errors=True)  # Stopped before there was anything to resume.
        command = [sys.executable, ROOT / "main.py", *flags, "--load" if there else "--out", folder]
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        with open(log, "w") as output:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            run = subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=output)
            while run.poll() is None and not done():
                time.sleep(0.2)
            if step is not None:
                run.send_signal(signal.SIGTERM)  # It saves and ends.
            run.wait()
        if not done():
            sys.exit(f"main.py ended with status {run.returncode}, see {log}")
    return read_metrics(folder)


def first_steps(seed: int, args) -> dict:
    """The line of metrics.jsonl of a run's first evaluation at step `args.stop_at` or later."""
    flags = ["--seed", seed, "--viz-every", 10**6, "--visdom", "off", *args.flags]
    lines = train_until(args.out / f"seed{seed}", flags, args.stop_at)
    line = next(line for line in lines if line["step"] >= args.stop_at)
    accuracy, mode = line["count_accuracy"], line["count_accuracy_mode"]
    print(
        f"seed {seed:>5}: {accuracy:.2%} ({mode:.2%} at the mode), {line['elbo']:.1f} nats at step {line['step']}",
        flush=True,
    )
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description="Does it learn with every seed?", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(50), metavar="SEED", help="(default: 0 to 49)")
    parser.add_argument("--stop-at", type=int, default=500, metavar="STEP", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of main.py")
    args = parser.parse_args()
    with ThreadPoolExecutor(2) as pool:
        lines = list(pool.map(lambda seed: first_steps(seed, args), args.seeds))
    accuracies = [line["count_accuracy_mode"] for line in lines]
    print(
        f"{len(lines)} seeds, validation scenes, accuracy at the mode: median {median(accuracies):.2%}, "
        f"worst {min(accuracies):.2%}; above 97%: {sum(a > 0.97 for a in accuracies)}, "
        f"95 to 97%: {sum(0.95 < a <= 0.97 for a in accuracies)}, below: {sum(a <= 0.95 for a in accuracies)}"
    )


if __name__ == "__main__":
    main()
