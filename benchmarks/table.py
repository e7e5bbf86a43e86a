"""Tables of runs, from their metrics.jsonl, in Markdown as they are in docs/.

python benchmarks/table.py runs/seeds/seed[0-9]                           # how each run ended, and the mean
python benchmarks/table.py --at 500 runs/seeds runs/seeds-without-*       # folders of runs, at a step: a row for each
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.run import read_metrics

COLUMNS = {
    "one sample": ("count_accuracy", "{:.2%}"),
    "five looks": ("count_accuracy_looks", "{:.2%}"),
    "ELBO": ("elbo", "{:.1f}"),
    "validation at step 500": ("early", "{:.1%}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="A table of runs, in Markdown.", allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="with --at: a folder of runs")
    parser.add_argument("--at", type=int, metavar="STEP", help="compare folders of runs, on the validation scenes")
    args = parser.parse_args()
    print(table(args.runs) if args.at is None else comparison(args.runs, args.at))


def comparison(folders: list[Path], step: int) -> str:
    rows = [["runs", "accuracy", "ELBO, nats"], ["---"] * 3]
    for folder in folders:
        runs = sorted(folder.glob("seed*/"), key=lambda run: int(run.name.removeprefix("seed")))
        lines = [line for run in runs for line in read_metrics(run) if line["split"] == "validation"]
        lines = [line for line in lines if line["step"] == step]
        if not runs or len(lines) != len(runs):  # None is left out without a word.
            sys.exit(f"{folder}: {len(lines)} of {len(runs)} runs have an evaluation at step {step}")
        accuracies = ", ".join(f"{line['count_accuracy']:.1%}" for line in lines)
        elbos = ", ".join(f"{line['elbo']:.1f}" for line in lines)
        rows.append([folder.name, accuracies, elbos])
    return markdown(rows)


def table(folders: list[Path]) -> str:
    lines = {}
    for folder in folders:
        metrics = read_metrics(folder)
        if not metrics or metrics[-1]["split"] != "test":
            sys.exit(f"{folder} is not a finished run")
        seed = json.loads((folder / "config.json").read_text())["flags"]["seed"]
        early = next((line for line in metrics if (line["split"], line["step"]) == ("validation", 500)), {})
        lines[seed] = metrics[-1] | {"early": early.get("count_accuracy")}
    rows = [["seed", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for seed, line in sorted(lines.items()):
        rows.append(
            [str(seed), *("" if line[key] is None else form.format(line[key]) for key, form in COLUMNS.values())]
        )
    for name, of in (("mean", mean), ("worst", min)):
        cells = []
        for key, form in COLUMNS.values():
            values = [line[key] for line in lines.values() if line[key] is not None]
            cells.append(form.format(of(values)) if values else "")
        rows.append([f"**{name}**", *cells])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
