"""Does it learn with every seed? Many runs of main.py, two at a time, one thread each, and tables of them in Markdown.

    python benchmarks/seeds.py                                   # fifty seeds, to step 500 of a default run
    python benchmarks/seeds.py --at 1000 -- --guide rnn          # to step 1,000; what follows -- is for main.py
    python benchmarks/seeds.py --whole --seeds 0 1 2             # whole runs, evaluated on the test scenes
    python benchmarks/seeds.py --whole --seeds 0 1 2 --unseen    # and how they count three, four and five digits
    python benchmarks/seeds.py --without peak                    # without a part of the method, see without.py
    python benchmarks/seeds.py --compare runs/seeds runs/seeds-without-*     # trains nothing: a row for each folder

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

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from report import more_digits
from without import PARTS, left_out

from multi_mnist import load_digits
from training.checkpoint import build_air, read_checkpoint
from training.options import UsageError, one_line_errors
from training.run import read_metrics

ROOT = Path(__file__).parent.parent
# Of a line of metrics.jsonl; "early" is of the validation scenes at step 500.
COLUMNS = {
    "one sample": ("count_accuracy", "{:.2%}"),
    "search": ("count_accuracy_search", "{:.2%}"),
    "ELBO": ("elbo", "{:.1f}"),
    "validation at step 500": ("early", "{:.1%}"),
}


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


def result(run: Path, step: int | None) -> dict:
    """Of metrics.jsonl, the line of a run's first evaluation at `step` or later; None: of its end, with "early"."""
    lines, split = read_metrics(run), "test" if step is None else "validation"
    found = [line for line in lines if line["split"] == split and line["step"] >= (step or 0)]
    if not found:
        raise UsageError(f"{run} has no evaluation at step {step}" if step else f"{run} is not a finished run")
    early = [line["count_accuracy"] for line in lines if line["step"] == 500 and step is None]
    return found[0] | {"early": early[0] if early else None}


def table(runs: list[Path], step: int | None) -> str:
    """A row for each run, and what they come to. A column for what was measured in all of them."""
    lines = [result(run, step) for run in runs]
    heads = [name for name, (key, _) in COLUMNS.items() if all(line[key] is not None for line in lines)]
    keys, forms = zip(*(COLUMNS[name] for name in heads))
    return with_summary(runs, heads, forms, [[(line[key],) for key in keys] for line in lines])


def unseen(runs: list[Path]) -> str:
    """More digits than in training: the share of 1,000 scenes each that one sample of the guide (the search) counts."""
    rows = []
    for run in runs:
        checkpoint, path = read_checkpoint(run)
        counted = more_digits(build_air(checkpoint, path), load_digits(False, checkpoint["flags"]["data_dir"]))
        rows.append([(part["count_accuracy"], part["count_accuracy_search"]) for part in counted])
    heads = [f"{part['digits']} digits, T = {part['max_objects']}" for part in counted]
    return with_summary(runs, heads, ["{:.1%} ({:.1%})"] * len(heads), rows)


def comparison(folders: list[Path], step: int | None) -> str:
    """A row for each folder of runs: by one sample of the guide; of whole runs also by the search, in brackets."""
    rows, form = [], "{count_accuracy:.1%}" if step else "{count_accuracy:.2%} ({count_accuracy_search:.2%})"
    for folder in folders:
        lines = [result(run, step) for run in sorted(folder.glob("seed*/"), key=seed)]
        rows.append([folder.name, *(", ".join(each.format(**line) for line in lines) for each in (form, "{elbo:.1f}"))])
    return markdown(["runs", "accuracy", "ELBO, nats"], rows)


def seed(run: Path) -> int:
    return int(run.name.removeprefix("seed"))


def with_summary(runs: list[Path], heads: list[str], forms: list[str], rows: list[list[tuple]]) -> str:
    """A table of numbers, one or several in a cell, by run, with their mean, median and worst."""
    rows = np.array(rows)  # [runs, columns, numbers in a cell]
    rows = [*rows, rows.mean(0), np.median(rows, 0), rows.min(0)]
    names = [*(f"{seed(run)}" for run in runs), "**mean**", "**median**", "**worst**"]
    return markdown(["seed", *heads], [[name, *map(str.format, forms, *row.T)] for name, row in zip(names, rows)])


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Does it learn with every seed?", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(50), metavar="SEED", help="(default: 0 to 49)")
    until = parser.add_mutually_exclusive_group()
    until.add_argument("--at", type=int, default=500, metavar="STEP", help="where to stop (default: %(default)s)")
    until.add_argument("--whole", action="store_true", help="do not stop; the tables are of the test scenes")
    parser.add_argument("--without", choices=PARTS, help="a part of the method to leave out")
    parser.add_argument("--unseen", action="store_true", help="also measure three to five digits")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: runs/seeds, and what is not as usual)")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="DIR", help="only compare these folders of runs")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of main.py")
    args = parser.parse_args(argv)
    step = None if args.whole else args.at
    name = "-".join(["seeds", *(["without", args.without] if args.without else []), *args.flags])
    out = args.out or Path("runs", re.sub(r"\W+", "-", name))
    program = ("benchmarks/without.py", args.without) if args.without else ("main.py",)
    with one_line_errors("seeds.py"):
        if args.compare:
            print(comparison(args.compare, step))
            return
        runs, flags = [out / f"seed{number}" for number in args.seeds], ["--viz-every", 10**6, "--visdom", "off"]
        with ThreadPoolExecutor(2) as pool:
            made = pool.map(
                lambda run: train_until(run, ["--seed", seed(run), *flags, *args.flags], step, program), runs
            )
            list(tqdm(made, total=len(runs)))
        print("Test scenes" if args.whole else f"Validation scenes at step {step}", table(runs, step), sep="\n\n")
        with left_out(args.without):
            print(f"\n{unseen(runs)}" if args.unseen else "")


if __name__ == "__main__":
    main()
