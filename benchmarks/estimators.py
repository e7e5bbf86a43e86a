"""Five estimators of the same gradient: how noisy each is, and what it learns. It draws figures/estimators.png.

    OMP_NUM_THREADS=1 python benchmarks/estimators.py

The guide is the paper's RNN; an object costs 6 nats. Each estimator is trained with each seed. The noise is measured at
three points of one run (`POINTS_OF`, the first seed), for all at the same parameters and on the same scenes, so that
all have the same mean: it is the trace of the covariance of the gradient of the network that chooses z_pres and
z_where (`attend`), over the squared length of the mean. The other baseline is first trained for FIT updates at those
parameters (but not at update 0: there it knows nothing). What is kept in --out is not measured again.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from PIL import Image
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate

sys.path.insert(0, str(Path(__file__).parent.parent))

import viz
from air import AIR
from inference import infer
from multi_mnist import load_split


class InOnePiece(AIR):
    """Observes the whole image at once, so that each choice is charged with all of it; the same density."""

    def model(self, x=None, num_scenes=1, max_objects=None):
        if x is None:
            return super().model(x, num_scenes, max_objects)
        return poutine.condition(super().model, {"x": x})(None, len(x), max_objects)


# name: (the model, the baseline, the ELBO)
ESTIMATORS = {
    "in one piece": (InOnePiece, "none", TraceGraph_ELBO),
    "in one piece, baseline": (InOnePiece, "rnn", TraceGraph_ELBO),
    "gains": (AIR, "none", TraceGraph_ELBO),
    "gains, baseline": (AIR, "rnn", TraceGraph_ELBO),
    "summed out": (AIR, "none", TraceEnum_ELBO),
}
POINTS_OF, BATCH, FIT = "gains, baseline", 64, 200


def make(name: str, seed: int = 0, rate: float = 2e-3) -> tuple[AIR, SVI]:
    kind, baseline, elbo = ESTIMATORS[name]
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    air = kind(guide="rnn", baseline=baseline, count_ratio=float(np.exp(-6)))
    adam = pyro.optim.Adam(lambda name: {"lr": 1e-2 if "baseline" in name else rate})
    guide = config_enumerate(air.guide) if elbo is TraceEnum_ELBO else air.guide
    return air, SVI(air.model, guide, adam, elbo(max_plate_nesting=1))


def train(name: str, seed: int, x: torch.Tensor, scenes, args) -> list[tuple[int, float]]:
    """Updates and accuracies on the scenes, at 17 evaluations. Keeps some parameters in --out."""
    (air, svi), n, lines = make(name, seed), args.num_updates, []
    for update in range(n + 1):
        if update in (0, n // 4, n) and (name, seed) == (POINTS_OF, args.seeds[0]):
            torch.save(air.state_dict(), args.out / f"{update}.pt")
        if update % max(1, n // 16) == 0:
            right = infer(air, scenes.x[:2000]).counts.numpy() == scenes.counts[:2000]
            lines.append((update, right.mean().item()))
        svi.step(x[torch.randint(len(x), (BATCH,))].float() / 255)
    print(f"{name}, seed {seed}: " + ", ".join(f"{right:.1%}" for _, right in lines), flush=True)
    return lines


def gradients(name: str, parameters: dict, x: torch.Tensor, draws: int, batches: torch.Tensor) -> torch.Tensor:
    """Gradients of `attend` on a mini-batch, `[draws, parameters]`; batches: for a baseline to learn from before."""
    air, svi = make(name, rate=0.0)
    air.load_state_dict(parameters, strict=False)  # without a baseline, if they have none
    for batch in batches if air.baseline and name != POINTS_OF else ():
        svi.step(batch.float() / 255)
    rows = []
    for _ in range(draws):
        air.zero_grad()
        svi.loss_and_grads(svi.model, svi.guide, x)
        rows.append(torch.cat([p.grad.flatten() for p in air.attend.parameters()]) / len(x))
    return torch.stack(rows)


def noise(parameters: dict, x: torch.Tensor, draws: int, batches: torch.Tensor) -> dict[str, tuple[float, float]]:
    """For each estimator its noise and the standard error of that; the last one, summed out, knows the mean best."""
    spreads = {}
    for name in ESTIMATORS:
        rows = gradients(name, parameters, x, draws, batches)
        mean = rows.mean(0)  # Row by row: 400 draws are 5 GB.
        spreads[name] = torch.stack([(row - mean).square().sum() for row in rows]) * draws / (draws - 1)
    signal = mean.square().sum() - spreads[name].mean() / draws  # less the mean's own variance
    return {k: ((v.mean() / signal).item(), (v.std() / draws**0.5 / signal).item()) for k, v in spreads.items()}


def draw(runs: dict, measured: dict) -> np.ndarray:
    """The noise as bars, point by point; and the accuracies of all runs over updates."""
    figure = Figure(figsize=(9, 3.6), dpi=viz.DPI, layout="constrained")
    bars, curves = figure.subplots(1, 2)
    for i, (name, by_seed) in enumerate(runs.items()):
        height, error = np.array([row[name] for row in measured.values()]).T
        bars.bar(np.arange(len(measured)) + 0.16 * (i - 2), height, 0.15, yerr=error, color=f"C{i}", capsize=2)
        for k, lines in enumerate(by_seed):
            curves.plot(*np.array(lines).T * [[1], [100]], color=f"C{i}", lw=1.3, label=None if k else name)
    names = [f"update {point}" for point in measured]
    bars.set(yscale="log", xticks=range(len(measured)), xticklabels=names, title="noise: variance / squared mean")
    curves.set(xlabel="update", ylabel="% counted right", ylim=(0, 101), title="accuracy, a line for each seed")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return viz.render(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare five gradient estimators.", allow_abbrev=False)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 to 2)")
    add("-n", "--num-updates", type=int, default=800, help="of each run (default: %(default)s)")
    add("--draws", type=int, default=200, help="gradients from which the noise is estimated (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/estimators"), help="(default: runs/estimators)")
    add("--figure", type=Path, default=Path("figures/estimators.png"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    pyro.enable_validation(False)
    args.out.mkdir(parents=True, exist_ok=True)
    x, scenes = torch.from_numpy(load_split("train").x), load_split("validation")

    def measure(key: str, function, *arguments):
        if not (file := args.out / f"{key}.json").exists():
            file.write_text(json.dumps(function(*arguments)))
        return json.loads(file.read_text())

    runs = {
        name: [measure(f"{name}, seed {seed}", train, name, seed, x, scenes, args) for seed in args.seeds]
        for name in ESTIMATORS
    }
    pyro.set_rng_seed(0)
    measured, batches = {}, x[torch.randint(len(x), (FIT, BATCH))]
    for point in (0, args.num_updates // 4, args.num_updates):
        arguments = torch.load(args.out / f"{point}.pt"), x[:BATCH].float() / 255, args.draws
        measured[point] = measure(f"noise {point}", noise, *arguments, batches if point else batches[:0])
        print(f"update {point}: " + ", ".join(f"{k} {v:.2f} ± {e:.2f}" for k, (v, e) in measured[point].items()))
    Image.fromarray(draw(runs, measured)).save(args.figure)


if __name__ == "__main__":
    main()
