"""Does it learn with every seed? Many runs of main.py, two at a time, one thread each.

    python benchmarks/seeds.py                                   # fifty seeds, to step 500 of a default run
    python benchmarks/seeds.py --whole --seeds 0 1 2             # whole runs, evaluated on the test scenes
    python benchmarks/seeds.py --seeds 0 1 2 -- --guide rnn      # what follows -- is for main.py
    python benchmarks/seeds.py --without exploration             # without a part of the method, see without.py

Each run has the schedules of a whole one; it is stopped at the first evaluation at that step or later. Runs that
are in --out already are not made again, so that the script may be stopped and started at will: after a change to the
code, name another folder.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).parent.parent))

from without import PARTS

from training.run import read_metrics

ROOT = Path(__file__).parent.parent
ACCURACIES = {"sample": "count_accuracy", "mode": "count_accuracy_mode", "looks": "count_accuracy_looks"}


def train_until(folder: Path, flags: list, step: int | None = None, program: tuple = ("main.py",)) -> list[dict]:
    """Run `program` in `folder`, with one thread, until it has evaluated at `step` or later, or to its end.

    A run that is there already is resumed. Returns the lines of its metrics.jsonl.
    """

    def done() -> bool:
        lines = read_metrics(folder)
        return any(line["split"] == "test" or (step is not None and line["step"] >= step) for line in lines)

    if not done():
        there = (folder / "checkpoint.pt").exists()
        if not there:
            shutil.rmtree(folder, ignore_errors=True)  # Stopped before there was anything to resume.
        command = [sys.executable, ROOT / program[0], *program[1:], *flags, "--load" if there else "--out", folder]
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
            sys.exit(f"{program[0]} ended with status {run.returncode}, see {log}")
    return read_metrics(folder)


def accuracies(seed: int, args) -> dict:
    """The line of metrics.jsonl of a run's first evaluation at step `args.stop_at` or later, or of its last one."""
    flags = ["--seed", seed, "--viz-every", 10**6, "--visdom", "off", *args.flags]
    program = ("benchmarks/without.py", args.without) if args.without else ("main.py",)
    lines = train_until(args.out / f"seed{seed}", flags, None if args.whole else args.stop_at, program)
    line = lines[-1] if args.whole else next(line for line in lines if line["step"] >= args.stop_at)
    measured = " ".join(f"{name} {line[key]:.2%}" for name, key in ACCURACIES.items() if line[key] is not None)
    print(
        f"seed {seed:>5}: {measured}, {line['elbo']:.1f} nats at step {line['step']} ({line['seconds']:.0f} s)",
        flush=True,
    )
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description="Does it learn with every seed?", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(50), metavar="SEED", help="(default: 0 to 49)")
    parser.add_argument("--stop-at", type=int, default=500, metavar="STEP", help="(default: %(default)s)")
    parser.add_argument("--whole", action="store_true", help="do not stop; print the test accuracies")
    parser.add_argument("--without", choices=PARTS, help="a part of the method to leave out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: runs/seeds, and what is not as usual)")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of main.py")
    args = parser.parse_args()
    unusual = [f"without-{args.without}"] * bool(args.without) + [
        re.sub(r"\W+", "-", flag).strip("-") for flag in args.flags
    ]
    args.out = args.out or Path("runs", "-".join(["seeds", *unusual]))
    with ThreadPoolExecutor(2) as pool:
        lines = list(pool.map(lambda seed: accuracies(seed, args), args.seeds))
    print(f"{len(lines)} seeds, {lines[0]['split']} scenes; ELBO {mean(line['elbo'] for line in lines):.1f} nats")
    for name, key in ACCURACIES.items():
        values = [line[key] for line in lines if line[key] is not None]
        if values:
            print(
                f"  {name:<6} mean {mean(values):.2%}, median {median(values):.2%}, worst {min(values):.2%}; "
                f"above 97%: {sum(a > 0.97 for a in values)}, 95 to 97%: {sum(0.95 < a <= 0.97 for a in values)}, "
                f"below: {sum(a <= 0.95 for a in values)}"
            )


if __name__ == "__main__":
    main()
