"""How many training steps per second, against a naive version of the same model, side by side.

    python benchmarks/speed.py

The naive version is AIR as it is usually written: the LSTMs of guide and baseline, 256 units each,
are fed the raw image at every step; objects are placed with affine_grid and grid_sample; the
likelihood is one site at the end; the mini-batch is subsampled in a plate over all 60,000 images;
Pyro gives every parameter an optimizer of its own, and validates every distribution. No other
slowness was put in. Ours is what main.py trains by default: its baseline has 64 units, and its guide
does a little more (`refine`).

The two take turns in short rounds, so that both see the machine in the same mood. The last line is
a JSON object with the medians.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, TraceGraph_ELBO
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from air import AIR
from evaluation import to_images
from main import make_svi


class NaiveAIR(nn.Module):
    """AIR with the networks of `air.AIR`, written without a thought for speed."""

    def __init__(self, air: AIR, x_all: torch.Tensor, batch_size: int):
        super().__init__()
        self.air, self.x_all, self.batch_size = air, x_all, batch_size
        size = air.image_size**2 + 3 + air.z_what_size
        self.rnn = nn.LSTMCell(size, air.rnn.state_size)
        self.baseline_rnn = nn.LSTMCell(size, air.baseline.rnn.state_size)
        self.predict, self.encode, self.decode = air.predict, air.encode, air.decode
        self.baseline_linear = air.baseline.linear

    def transform(self, z_where, images, size):
        theta = torch.zeros(len(z_where), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = z_where[:, 0]
        theta[:, :, 2] = z_where[:, 1:]
        grid = nn.functional.affine_grid(theta, (len(z_where), 1, size, size), align_corners=False)
        return nn.functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]

    def model(self):
        pyro.module("naive", self)
        air = self.air
        with pyro.plate("scenes", len(self.x_all), subsample_size=self.batch_size) as index:
            x, n = to_images(self.x_all[index]), len(index)
            canvas, z_pres = torch.zeros_like(x), torch.ones(n)
            for t in range(air.num_steps):
                z_pres = pyro.sample(f"z_pres_{t}", dist.Bernoulli(air.p_more[t] * z_pres))
                with poutine.mask(mask=z_pres.bool()):
                    pose = dist.Normal(air.z_where_loc, air.z_where_scale).expand([n, 3])
                    z_where = pyro.sample(f"z_where_{t}", pose.to_event(1))
                    code = dist.Normal(torch.zeros(n, air.z_what_size), 1.0)
                    z_what = pyro.sample(f"z_what_{t}", code.to_event(1))
                y = self.transform(z_where, self.decode(z_what), air.image_size)
                canvas = canvas + z_pres[:, None, None] * y
            pyro.sample("x", dist.Normal(canvas, air.likelihood_sd).to_event(2), obs=x)

    def guide(self):
        pyro.module("naive", self)
        air = self.air
        with pyro.plate("scenes", len(self.x_all), subsample_size=self.batch_size) as index:
            x, n = to_images(self.x_all[index]), len(index)
            state, baseline_state = air.rnn.start(n), air.baseline.rnn.start(n)
            z_pres, z_where, z_what = torch.ones(n), torch.zeros(n, 3), torch.zeros(n, air.z_what_size)
            for t in range(air.num_steps):
                inputs = torch.cat([x.flatten(1), z_where, z_what], -1)
                state = self.rnn(inputs, state)
                baseline_state = self.baseline_rnn(inputs.detach(), baseline_state)
                value = 550 + 100 * self.baseline_linear(baseline_state[0])[:, 0]
                p_more, loc, scale = self.predict(state[0])
                infer = {"baseline": {"baseline_value": value * z_pres.detach()}}
                z_pres = pyro.sample(f"z_pres_{t}", dist.Bernoulli(p_more * z_pres), infer=infer)
                with poutine.mask(mask=z_pres.bool()):
                    z_where = pyro.sample(f"z_where_{t}", dist.Normal(loc, scale).to_event(1))
                    s = z_where[:, :1].clamp(min=1)
                    inverse = torch.cat([1 / s, -z_where[:, 1:] / s], -1)
                    x_att = self.transform(inverse, x, air.window_size)
                    z_what = pyro.sample(f"z_what_{t}", dist.Normal(*self.encode(x_att)).to_event(1))


def naive_step(x_all, batch_size):
    pyro.clear_param_store()
    naive = NaiveAIR(AIR(baseline_size=256), x_all, batch_size)
    rates = {"lr": 1e-3}
    return SVI(naive.model, naive.guide, pyro.optim.Adam(rates), TraceGraph_ELBO(max_plate_nesting=1)).step


def our_step(x_all, batch_size):
    svi, _ = make_svi(AIR())

    def step():
        svi.step(to_images(x_all[torch.randint(len(x_all), (batch_size,))]))

    return step


def main():
    parser = argparse.ArgumentParser(description="Steps per second, against a naive version.")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10, help="times the versions take turns")
    parser.add_argument("--steps", type=int, default=15, help="steps a turn")
    args = parser.parse_args()
    # The images' content makes no difference to the time; a tenth of the pixels is ink, as in MNIST.
    pyro.set_rng_seed(0)
    x_all = (torch.rand(60_000, 50, 50) * 2550 - 2295).clamp(min=0).byte()
    steps = {"naive": naive_step(x_all, args.batch_size), "tracegraph": our_step(x_all, args.batch_size)}
    seconds = {name: [] for name in steps}
    for round in range(args.rounds + 1):
        for name, step in steps.items():
            pyro.enable_validation(name == "naive")  # Pyro's default; main.py turns it off.
            started = time.perf_counter()
            for _ in range(args.steps):
                step()
            if round:  # The first one warms up.
                seconds[name].append((time.perf_counter() - started) / args.steps)
    threads = torch.get_num_threads()
    print(f"batch {args.batch_size}, {threads} threads, {args.rounds} rounds of {args.steps} steps in turn")
    print(f"{'version':>12} {'ms/step':>9} {'steps/s':>9} {'ratio':>7}  (median; ratio: median over rounds)")
    ratios = {name: median(n / o for n, o in zip(seconds["naive"], seconds[name])) for name in steps}
    for name in steps:
        middle = median(seconds[name])
        print(f"{name:>12} {1000 * middle:>9.1f} {1 / middle:>9.1f} {ratios[name]:>7.2f}")
    speeds = {name: round_to(1 / median(seconds[name])) for name in steps}
    print(
        json.dumps(
            {
                "naive_steps_per_s": speeds["naive"],
                "steps_per_s": speeds["tracegraph"],
                "ratio": round_to(ratios["tracegraph"]),
            }
        )
    )


def round_to(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
