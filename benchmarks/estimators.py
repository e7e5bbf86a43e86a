"""What the choice of a gradient estimator costs and gains: noise, time, and how soon AIR can count.

    python benchmarks/estimators.py            # five seeds of each, 1,500 steps: an hour on one core
    python benchmarks/estimators.py --quick    # a smoke run: minutes, and its numbers mean nothing

Every estimator is trained with every seed, by main.py, in runs/estimators. A run that is there is
not made again, and one that was interrupted is resumed: the script may be stopped and started at will.

The noise of the gradients is measured at three points of one run (tracegraph with its RNN baseline,
the first seed): for all estimators at the same parameters and on the same mini-batch, so that all
have the same mean and differ in their noise alone. It is the trace of the covariance of a parameter
group's gradient, in units of the squared length of its mean.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pyro
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

from seeds import train_until

from air import AIR, to_images
from multi_mnist import load_split
from training.checkpoint import read_checkpoint
from training.run import read_metrics
from training.svi import count_ratio, make_svi

# name: (--estimator, --baseline)
ESTIMATORS = {
    "traceenum": ("traceenum", "none"),
    "tracegraph, RNN": ("tracegraph", "rnn"),
    "tracegraph, none": ("tracegraph", "none"),
}
GROUPS = ("decode", "attend", "encode")
ACCURACIES = (0.90, 0.95, 0.98)
MIDDLE = 500  # the second point at which the noise is measured; the others are the start and the end


def train(name: str, seed: int, args) -> list[dict]:
    """The lines of metrics.jsonl of a finished run, which is made or completed if need be."""
    folder = args.out / f"{name.replace(', ', '-')}-seed{seed}"
    lines = read_metrics(folder)
    if lines and (lines[-1]["split"], lines[-1]["step"]) == ("test", args.num_steps):
        return lines
    print(f"{name}, seed {seed}", flush=True)
    estimator, baseline = ESTIMATORS[name]
    flags = ["--estimator", estimator, "--baseline", baseline, "--seed", seed, "-n", args.num_steps]
    flags += ["-b", args.batch_size, "--eval-every", args.eval_every, "--data-dir", args.data_dir, "--visdom", "off"]
    if not (folder / "middle.pt").exists():
        train_until(folder, flags, MIDDLE)
        shutil.copy(folder / "checkpoint.pt", folder / "middle.pt")
    return train_until(folder, flags)


def first_at(lines: list[dict], accuracy: float) -> tuple[float, float]:
    """Step and seconds of training of the first evaluation with this accuracy; infinite if there is none."""
    for line in lines:
        if line["split"] == "validation" and line["count_accuracy"] >= accuracy:
            return line["step"], line["seconds"]
    return float("inf"), float("inf")


def gradients(name: str, checkpoint: dict, step: int, x: torch.Tensor, args) -> dict[str, torch.Tensor]:
    """Gradients of one mini-batch, by parameter group: `[draws, parameters]`."""
    estimator, baseline = ESTIMATORS[name]
    air = AIR(**checkpoint["air"] | {"baseline": baseline})
    air.load_state_dict(checkpoint["parameters"], strict=baseline == "rnn")
    air.set_count_prior(count_ratio(step, args.num_steps))
    pyro.set_rng_seed(0)
    svi, _ = make_svi(air, estimator, clip=False)
    rows = {group: [] for group in GROUPS}
    for _ in range(args.draws):
        air.zero_grad()
        svi.loss_and_grads(svi.model, svi.guide, x)
        for group in GROUPS:
            parameters = air.get_submodule(group).parameters()
            rows[group].append(torch.cat([p.grad.flatten() for p in parameters]) / len(x))
    return {group: torch.stack(row) for group, row in rows.items()}


def noise(checkpoint: dict, step: int, x: torch.Tensor, args) -> dict[str, dict[str, float]]:
    """By estimator and group: trace of the covariance, over the squared length of the mean."""
    variances, signal = {}, {}
    for name in args.estimators:
        for group, rows in gradients(name, checkpoint, step, x, args).items():
            variance, mean = rows.var(0).sum().item(), rows.mean(0)
            variances.setdefault(name, {})[group] = variance
            if group not in signal:
                # All have the same mean, and traceenum, if it is there, comes first and knows it best. Its
                # squared length is overestimated by the mean's own variance.
                signal[group] = mean.square().sum().item() - variance / len(rows)
    return {name: {group: row[group] / signal[group] for group in GROUPS} for name, row in variances.items()}


def report(runs: dict, args) -> None:
    print(f"\nSteps (seconds) to the first evaluation at an accuracy, median and range of {len(args.seeds)} seeds\n")
    heads = ["estimator", *(f"{accuracy:.0%}" for accuracy in ACCURACIES), "ms per step", "test scenes, at the end"]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for name, by_seed in runs.items():
        cells = [name]
        for accuracy in ACCURACIES:
            steps, seconds = zip(*(first_at(lines, accuracy) for lines in by_seed))
            cells.append(f"{median(steps):.0f}, {min(steps):.0f} to {max(steps):.0f} ({median(seconds):.0f} s)")
        per_step = 1000 * median(lines[-1]["seconds"] / lines[-1]["step"] for lines in by_seed)
        tests = ", ".join(f"{lines[-1]['count_accuracy']:.2%}" for lines in by_seed)
        print(f"| {' | '.join([*cells, f'{per_step:.0f}', tests])} |")


def report_noise(noises: dict, args) -> None:
    print(f"\nNoise of the gradient of a mini-batch of {args.batch_size}: variance / squared length of the mean\n")
    print(f"| step | estimator | {' | '.join(GROUPS)} |\n" + "|---" * (2 + len(GROUPS)) + "|")
    for step, row in noises.items():
        for name, cells in row.items():
            print(f"| {step} | {name} | {' | '.join(f'{cells[group]:.3g}' for group in GROUPS)} |")


def draw(runs: dict, noises: dict, path: Path) -> None:
    """Left: accuracy over steps, median and range of the seeds. Right: the noise in the network that chooses z_pres."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    styles = ("-", "--", "-.", ":")
    for (name, by_seed), style in zip(runs.items(), styles):
        curves = [[line for line in lines if line["split"] == "validation"] for lines in by_seed]
        steps = [line["step"] for line in curves[0]]
        errors = 100 - 100 * np.array([[line["count_accuracy"] for line in curve] for curve in curves])
        (drawn,) = left.plot(steps, np.median(errors, 0), style, label=name)
        left.fill_between(steps, errors.min(0), errors.max(0), color=drawn.get_color(), alpha=0.15, linewidth=0)
    left.set(xlabel="step", ylabel="scenes counted wrong, %", yscale="log", title="validation error")
    left.legend()
    width = 0.8 / len(runs)
    for i, name in enumerate(runs):
        values = [row[name]["attend"] for row in noises.values()]
        right.bar(np.arange(len(values)) + i * width, values, width, label=name)
    right.set_xticks(np.arange(len(noises)) + 0.4 - width / 2, [f"step {step}" for step in noises])
    right.set(yscale="log", title="variance / squared mean of the gradient\nof the network that chooses z_pres")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description="Compare the gradient estimators.")
    add = parser.add_argument
    names = ", ".join(f'"{name}"' for name in ESTIMATORS)
    add(
        "--estimators",
        nargs="+",
        choices=ESTIMATORS,
        default=list(ESTIMATORS),
        metavar="NAME",
        help=f"(default: {names})",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED", help="(default: 0 to 4)")
    add("-n", "--num-steps", type=int, default=1500, help="of each run (default: %(default)s)")
    add("-b", "--batch-size", type=int, default=128, metavar="IMAGES", help="(default: %(default)s)")
    add("--eval-every", type=int, default=100, metavar="STEPS", help="(default: %(default)s)")
    add("--draws", type=int, default=100, help="gradients from which their noise is estimated (default: %(default)s)")
    add("--data-dir", type=Path, default=Path("data"), help="where MNIST and the scenes are kept (default: data)")
    add("--out", type=Path, default=Path("runs/estimators"), help="(default: runs/estimators)")
    add("--quick", action="store_true", help="smoke run: one seed, 600 steps, 5 draws, in a folder of its own")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.num_steps, args.draws, args.out = [0], 600, 5, args.out / "quick"
    args.estimators = [name for name in ESTIMATORS if name in args.estimators]

    runs = {name: [train(name, seed, args) for seed in args.seeds] for name in args.estimators}

    report(runs, args)
    if "tracegraph, RNN" not in runs:
        return  # The noise is measured along that run.
    x = to_images(load_split("train", args.data_dir).x[: args.batch_size])
    folder = args.out / f"tracegraph-RNN-seed{args.seeds[0]}"
    pyro.set_rng_seed(args.seeds[0])
    start = AIR()
    points = {0: {"air": start.config, "parameters": start.state_dict()}}
    for file in ("middle.pt", "checkpoint.pt"):
        checkpoint, _ = read_checkpoint(folder / file)
        points[checkpoint["step"]] = checkpoint
    noises = {step: noise(checkpoint, step, x, args) for step, checkpoint in points.items()}
    report_noise(noises, args)
    draw(runs, noises, args.out / "estimators.png")
    (args.out / "noise.json").write_text(json.dumps(noises, indent=2) + "\n")
    print(f"figure: {args.out / 'estimators.png'}")


if __name__ == "__main__":
    main()
