"""More digits than in training: how many scenes of three, four and five do some runs count right? A Markdown table.

python benchmarks/unseen.py runs/seeds/seed[0-9]

A cell is the share of 1,000 scenes made of test digits that one sample of the guide counts right, and in brackets that
of several looks. `report.py` measures the same, and much else, of one run.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))

from report import more_digits

from multi_mnist import load_digits
from training.checkpoint import load_air
from training.options import one_line_errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="More digits than in training, by several runs.", allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where MNIST is kept (default: data)")
    args = parser.parse_args(argv)
    rows = {}
    with one_line_errors("unseen.py"):
        digits, classes = load_digits(False, args.data_dir)
        for run in args.runs:
            counted = [counted for _, counted, _ in more_digits(load_air(run), digits, classes, num_steps=8)]
            rows[f"{run}"] = [(part["count_accuracy"], part["count_accuracy_looks"]) for part in counted]
            heads = [f"{part['digits']} digits, T = {part['steps']}" for part in counted]
    columns = [[*zip(*column)] for column in zip(*rows.values())]
    for name, of in (("**mean**", mean), ("**worst**", min)):
        rows[name] = [(of(samples), of(looks)) for samples, looks in columns]
    print(" | ".join(["| run", *heads]) + " |\n" + "| --- " * (1 + len(heads)) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(f"{sample:.1%} ({looks:.1%})" for sample, looks in cells) + " |")


if __name__ == "__main__":
    main()
