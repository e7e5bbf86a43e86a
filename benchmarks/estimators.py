"""What the choice of a gradient estimator costs and gains: noise, time, and how soon AIR can count.

    python benchmarks/estimators.py                           # five seeds of each, 1,500 steps: an hour on one core
    python benchmarks/estimators.py --seeds 0 -n 600 --draws 5 --out runs/quick     # minutes; its numbers mean nothing

Every estimator is trained with every seed, by main.py, in runs/estimators. A run that is there is not made again, and
one that was interrupted is resumed: the script may be stopped and started at will.

The noise of the gradients is measured at three points of one run (tracegraph with its RNN baseline, the first seed):
for all estimators at the same parameters and on the same mini-batch, so that all have the same mean and differ in noise
alone. It is the trace of the covariance of a parameter group's gradient, in units of the squared length of its mean.
"""

import argparse
import shutil
import sys
from pathlib import Path
from statistics import median

import pyro
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from seeds import markdown, train_until

from air import AIR
from multi_mnist import load_split
from training.checkpoint import read_checkpoint
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
    print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
    estimator, baseline = ESTIMATORS[name]
    flags = ["--estimator", estimator, "--baseline", baseline, "--seed", seed, "-n", args.num_steps]
    flags += ["-b", args.batch_size, "--data-dir", args.data_dir, "--eval-every", 100, "--visdom", "off", *args.flags]
    if not (folder / "middle.pt").exists():
        train_until(folder, flags, MIDDLE)
        shutil.copy(folder / "checkpoint.pt", folder / "middle.pt")
    return train_until(folder, flags)


def first_at(lines: list[dict], accuracy: float) -> tuple[float, float]:
    """Step and seconds of training of the first evaluation with this accuracy; infinite if there is none."""
    lines = [line for line in lines if line["split"] == "validation" and line["count_accuracy"] >= accuracy]
    return (lines[0]["step"], lines[0]["seconds"]) if lines else (float("inf"), float("inf"))


def gradients(name: str, checkpoint: dict, ratio: float, x: torch.Tensor, draws: int) -> dict[str, torch.Tensor]:
    """Gradients of one mini-batch, by parameter group: `[draws, parameters]`. ratio: of the prior on the count."""
    estimator, baseline = ESTIMATORS[name]
    air = AIR(**checkpoint["air"] | {"baseline": baseline})
    air.load_state_dict(checkpoint["parameters"], strict=baseline == "rnn")
    air.set_count_prior(ratio)
    pyro.set_rng_seed(0)
    svi, _ = make_svi(air, estimator, clip=False)
    rows = {group: [] for group in GROUPS}
    for _ in range(draws):
        air.zero_grad()
        svi.loss_and_grads(svi.model, svi.guide, x)
        for group in GROUPS:
            rows[group].append(torch.cat([p.grad.flatten() for p in getattr(air, group).parameters()]) / len(x))
    return {group: torch.stack(row) for group, row in rows.items()}


def noise(checkpoint: dict, ratio: float, x: torch.Tensor, draws: int) -> dict[str, dict[str, float]]:
    """By estimator and group: trace of the covariance, over the squared length of the mean. See `gradients`.

    All have the same mean, and the first one, traceenum, knows it best; its squared length is overestimated by the
    mean's own variance.
    """
    variances, signal = {}, {}
    for name in ESTIMATORS:
        rows = gradients(name, checkpoint, ratio, x, draws)
        variances[name] = {group: row.var(0).sum().item() for group, row in rows.items()}
        means = {group: row.mean(0).square().sum().item() for group, row in rows.items()}
        signal = signal or {group: means[group] - variances[name][group] / draws for group in GROUPS}
    return {name: {group: row[group] / signal[group] for group in GROUPS} for name, row in variances.items()}


def report(runs: dict) -> str:
    rows = []
    for name, by_seed in runs.items():
        cells = [name]
        for accuracy in ACCURACIES:
            steps, seconds = zip(*(first_at(lines, accuracy) for lines in by_seed))
            cells.append(f"{median(steps):.0f}, {min(steps):.0f} to {max(steps):.0f} ({median(seconds):.0f} s)")
        per_step = 1000 * median(lines[-1]["seconds"] / lines[-1]["step"] for lines in by_seed)
        rows.append([*cells, f"{per_step:.0f}", ", ".join(f"{lines[-1]['count_accuracy']:.2%}" for lines in by_seed)])
    heads = [f"{accuracy:.0%}" for accuracy in ACCURACIES]
    return markdown(["estimator", *heads, "ms per step", "test scenes, at the end"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare the gradient estimators.", allow_abbrev=False)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED", help="(default: 0 to 4)")
    add("-n", "--num-steps", type=int, default=1500, help="of each run (default: %(default)s)")
    add("-b", "--batch-size", type=int, default=128, metavar="IMAGES", help="(default: %(default)s)")
    add("--draws", type=int, default=100, help="gradients from which their noise is estimated (default: %(default)s)")
    add("--data-dir", type=Path, default=Path("data"), help="where MNIST is kept (default: data)")
    add("--out", type=Path, default=Path("runs/estimators"), help="(default: runs/estimators)")
    add("flags", nargs="*", metavar="-- FLAGS", help="further ones of main.py")
    args = parser.parse_args(argv)
    runs = {name: [train(name, seed, args) for seed in args.seeds] for name in ESTIMATORS}
    print(f"\nSteps (seconds) to the first evaluation at an accuracy, median and range of {len(args.seeds)} seeds\n")
    print(report(runs))
    x = torch.from_numpy(load_split("train", args.data_dir).x[: args.batch_size]) / 255
    folder = args.out / f"tracegraph-RNN-seed{args.seeds[0]}"
    points = [read_checkpoint(folder / file)[0] for file in ("middle.pt", "checkpoint.pt")]
    pyro.set_rng_seed(args.seeds[0])
    air, rows = AIR(**points[0]["air"]), []
    for point in [{"step": 0, "air": air.config, "parameters": air.state_dict()}, *points]:
        measured = noise(point, count_ratio(point["step"], args.num_steps), x, args.draws)
        rows += [[f"{point['step']}", name, *(f"{row[g]:.3g}" for g in GROUPS)] for name, row in measured.items()]
    print(f"\nNoise of the gradient of a mini-batch of {args.batch_size}: variance / squared length of the mean\n")
    print(markdown(["step", "estimator", *GROUPS], rows))


if __name__ == "__main__":
    main()
